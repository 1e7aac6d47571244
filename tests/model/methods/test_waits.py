"""A step never waits for the device: on one that holds no values, whatever reads a value on the host fails."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.backbones.dit import Backbone, BackboneConfig
from model.methods.autoregressive import Autoregressive, AutoregressiveOptions
from model.methods.base import Batch, Method
from model.methods.draws import Draws
from model.methods.flowception import Flowception, FlowceptionOptions
from model.methods.full import Full, FullOptions
from model.methods.per_frame import PerFrame, PerFrameOptions
from model.methods.vlfm import VLFM, VLFMOptions
from model.training.ema import MovingAverage
from model.training.grams import Grams
from model.training.loop import Recent
from model.training.muon import Muon
from model.training.processes import Processes
from model.training.state import TrainingState
from model.training.updates import Updates, _OnItsWay

FRAMES = {"latent_scale": 2.0, "shortest": 5.0, "longest": 5.0}
FIGURES, FORMAT = {"mean_scale": 1.0, "derivative_scale": 2.0}, {"latent_shape": (3, 4, 4)}
METHODS: dict[str, Method] = {
    "first": VLFM.build(VLFMOptions(error_focus=1.0, start_anywhere=0.5), FIGURES, FORMAT),
    "ends": VLFM.build(VLFMOptions(anchor="ends", warmup_law="logit_normal"), FIGURES, FORMAT),
    "none": VLFM.build(VLFMOptions(anchor="none", warmup_focus=1.0), FIGURES, FORMAT),
    "per_frame": PerFrame.build(PerFrameOptions(error_focus=1.0), FIGURES, FORMAT),
    "flowception": Flowception.build(FlowceptionOptions(weighting="elbo", snr_shift=3.0), FRAMES, FORMAT),
    "keys": Flowception.build(FlowceptionOptions(finished="keys", time_law="beta"), FRAMES, FORMAT),
    "full": Full.build(FullOptions(), FRAMES, FORMAT),
    "autoregressive": Autoregressive.build(AutoregressiveOptions(), FRAMES, FORMAT),
}


class Copies(TorchDispatchMode):
    """Notes copies from the host's memory, which is not pinned here, to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if isinstance(made, torch.Tensor) and made.is_meta and any(t.device.type == "cpu" and t.dim() for t in tensors):
            self.found.append(str(func))
        return made


@pytest.mark.parametrize("kind", METHODS)
def test_a_step_reads_no_value_on_the_host(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: contextlib.nullcontext())  # it knows no such device
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(_OnItsWay, "__init__", lambda self, step, values: None)  # what a GPU copies without waiting
    method, clips = METHODS[kind], 4
    config = BackboneConfig(3, 4, 4, 8, 32, 2, 2, 2, outputs=method.heads, temporal=method.temporal, rates=method.rates)
    network = Backbone(config).to("meta")
    matrices = [p for p in network.blocks.parameters() if p.ndim == 2]
    optimizers = [
        torch.optim.AdamW(network.embed_latents.parameters(), fused=True), Grams(network.text.parameters()),
        Muon(matrices),
    ]  # fmt: skip
    state = TrainingState(network, MovingAverage(network, 0.9), optimizers)
    updates = Updates(state, 1.0, 0, tmp_path, Processes(0, 1, torch.device("meta")), spike_factor=20.0, late=9)
    batch = Batch(
        clip_ids=("",) * clips, text=torch.zeros(clips, 3, 8), text_length=torch.ones(clips, dtype=torch.long),
        empty_text=torch.zeros(1, 8), clip_start=torch.zeros(clips), duration=torch.ones(clips),
        coefficients=torch.zeros(clips, 6, 3, 4, 4), latents=torch.zeros(clips, 5, 3, 4, 4),
        valid=torch.ones(clips, 5, dtype=torch.bool),
    ).to("meta")  # fmt: skip

    def step(number: int) -> torch.Tensor:
        """All that the loop does between two lines of the log, but for reading the outcomes of older steps."""
        losses = method.loss(network, batch, Draws(number, 2 * clips, 0, 2, "meta"))
        torch.autograd.backward(losses["loss"])
        update = updates.apply(number, losses["loss"])
        recent.add({**losses, "gradient_norm": update.gradient_norm}, update.skipped)
        return update.skipped

    recent = Recent(mean=True)
    step(1)  # what is copied once, such as the basis' matrix, is there from then on
    monkeypatch.setattr(torch, "tensor", None)  # it would bring a list from the host
    with Copies() as copies:
        assert step(2).is_meta
    assert copies.found == []
