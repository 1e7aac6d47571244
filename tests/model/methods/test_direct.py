"""Direct prediction: frames from noise and caption in one call, through the programs that know no method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import evaluate
from model.methods.base import SampleSettings
from model.methods.curves import curve
from model.methods.direct import Direct, DirectOptions
from model.methods.draws import Draws
from model.recipes import train_recipe
from model.settings import override
from model.train import train
from model.training.checkpoint import Run
from model.training.data import Clips, Collate
from storage import version
from storage.layout import Lake
from tests.model.methods.test_per_frame import FIGURES, request
from tests.model.test_train import logged
from tests.model.tiny_lake import make_lake
from tests.model.wrapped_method import Told


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("direct") / "lake")


def test_the_loss_is_the_error_of_the_frames_that_it_tells_the_places_of(lake: Lake) -> None:
    clips = Clips(lake, version.load(lake), "train")
    batch = Collate(torch.zeros(1, 64).half().numpy(), Direct.members)([clips[0], clips[1]]).to("cpu")
    method, network = Direct.build(DirectOptions(times_per_clip=5), FIGURES, clips.version.clip), Told(0.25)
    losses = method.loss(network, batch, Draws(3, 2))
    (given,), (place,) = network.given, network.times
    assert not given.context_given.any()
    assert bool(((place > 0) & (place < 1)).all())
    frames, _ = curve(batch.part("coefficients"), place.view(2, 5))
    found = 0.25 * FIGURES["mean_scale"]
    expected = float((frames - found).square().mean()) / FIGURES["mean_scale"] ** 2
    assert float(losses["loss"]) == pytest.approx(expected, rel=1e-4)
    assert losses["errors"].shape == losses["place"].shape == (2, 5)


def test_a_sample_is_one_call_for_each_part_of_the_times_and_guided_by_two() -> None:
    method = Direct.build(DirectOptions(), FIGURES, {"latent_shape": [3, 4, 4]})
    network, asked = Told(0.25), request()
    made = method.sample(network, asked)
    read = made.read([0.0, 0.5, 1.0])
    assert read.shape == (3, 2, 3, 4, 4)
    assert bool((read == 0.5).all())
    assert network.times[0].flatten().tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert made.network_calls == 1
    guided = method.sample(network, request(settings=SampleSettings(guidance=2.0), unconditional=asked.conditioning))
    assert torch.equal(guided.read([0.5]), read[1:2])
    assert guided.network_calls == 2
    with pytest.raises(ValueError, match=r"guidance is 2.0, so the empty caption must be given"):
        method.sample(network, request(settings=SampleSettings(guidance=2.0)))
    with pytest.raises(ValueError, match="takes no given frame"):
        method.sample(network, request(frames=torch.zeros(2, 1, 3, 4, 4)))


def test_a_run_through_the_same_programs(lake: Lake, tmp_path: Path) -> None:
    changes = {
        "method": "direct", "width": 32, "depth": 1, "heads": 2, "batch": 4, "steps": 30, "log_every": 1,
        "learning_rate_warmup": 2, "ema_decay": 0.5, "validate_every": 30,
    }  # fmt: skip
    run = tmp_path / "run"
    train(lake.root, run, override(train_recipe("demo"), changes))
    loss = logged(run, "loss")
    assert loss[30] < 0.8 * loss[1]
    assert logged(run, "validation_error/clip_1").keys() == {30}
    metrics = evaluate.evaluate(run, lake.root, tmp_path / "report", most=2)
    assert metrics["run"]["recipe"]["method"] == "direct"
    assert Run(run).steps()[-1] == 30
