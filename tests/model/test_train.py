"""The trainer on real shards: it learns, resumes bit by bit, stops on a signal, and runs on two processes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.flow.path import WarmupPath
from model.methods.curves import curve, curve_scales
from model.methods.draws import Draws
from model.methods.vlfm import VLFM, VLFMOptions
from model.recipes import TrainRecipe, train_recipe
from model.settings import override
from model.stop import STOPPED
from model.train import main, train
from model.training import parts
from model.training.checkpoint import Run
from model.training.data import Clips, Collate, Steps
from model.training.optimizers import learning_rate_factor
from model.training.seeds import mixed_seed
from storage import version
from storage.layout import Lake
from tests.model.tiny_lake import make_lake

TINY = override(
    train_recipe("demo"),
    {
        "width": 32, "depth": 2, "heads": 2, "patch": 2, "batch": 4, "times_per_clip": 2, "steps": 6,
        "checkpoint_every": 3, "validate_every": 3, "log_every": 1, "learning_rate_warmup": 2,
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("train") / "lake")


def logged(run: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def weights(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    folder = Run(run).checkpoint(step)
    if not (folder / "backbone.safetensors").is_file():
        return parts.read(folder, lambda name: None)
    return {f"{name}/{key}": value for name in ("backbone", "average", "optimizers")
            for key, value in load_file(folder / f"{name}.safetensors").items()}  # fmt: skip


def test_the_loss_falls(lake: Lake, tmp_path: Path) -> None:
    train(lake.root, tmp_path / "run", override(TINY, {"steps": 120, "log_every": 20, "checkpoint_every": 120}))
    loss = logged(tmp_path / "run", "mean")
    assert loss[120] < 0.5 * loss[20], loss
    assert set(logged(tmp_path / "run", "validation_loss")) == {3 * k for k in range(1, 41)}
    assert all(0 <= wait <= 1 for wait in logged(tmp_path / "run", "data_wait").values())
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert {tag.partition("/")[0] for tag in board.Tags()["scalars"]} == {"train", "validation", "pace"}


GRAMS = {
    "optimizer": "grams", "weight_decay": 0.1, "qk_norm": "layer", "activation_checkpointing": True,
    "caption_padding": "seen",
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"matrix_learning_rate": 1e-3}, GRAMS], ids=["adamw", "muon", "grams"])
def test_a_resumed_run_is_the_same_run_bit_by_bit(lake: Lake, tmp_path: Path, changes: dict[str, object]) -> None:
    recipe = override(TINY, {**changes, "learning_rate_decay": 0.0})
    train(lake.root, tmp_path / "whole", recipe)
    train(lake.root, tmp_path / "parts", override(recipe, {"steps": 3}))
    assert Run(tmp_path / "parts").steps() == [3]
    train(lake.root, tmp_path / "parts", recipe)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert logged(tmp_path / "whole", "loss") == logged(tmp_path / "parts", "loss")


def test_a_finished_run_is_not_run_again(lake: Lake, tmp_path: Path) -> None:
    folder = train(lake.root, tmp_path / "run", TINY)
    before = (folder / "state.json").stat().st_mtime_ns
    assert train(lake.root, tmp_path / "run", TINY) == folder
    assert (folder / "state.json").stat().st_mtime_ns == before
    assert Run(tmp_path / "run").steps() == [3, 6]


def test_another_setting_or_version_is_refused(lake: Lake, tmp_path: Path) -> None:
    train(lake.root, tmp_path / "run", override(TINY, {"steps": 1}))
    with pytest.raises(ValueError, match=r"was started with sigma_end=0.1, not 0.3; give another --run"):
        train(lake.root, tmp_path / "run", override(TINY, {"sigma_end": 0.3}))
    other = make_lake(tmp_path / "other", clips=4)
    with pytest.raises(ValueError, match="trains on version 1 of its lake"):
        train(other.root, tmp_path / "run", TINY)


def command(lake: Lake, run: Path, *more: str) -> list[str]:
    demo = dataclasses.asdict(train_recipe("demo"))
    settings = [f"--set={k}={v}" for k, v in dataclasses.asdict(TINY).items() if v != demo[k] and k != "options"]
    return ["-m", "model.train", "--lake", str(lake.root), "--run-dir", str(run), "--recipe", "demo", *settings, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


KEEPING = """
import os, sys
from safetensors.torch import save_file
from model.train import main
from model.training import checkpoint
inner, rank = checkpoint.tensors_by_file, os.environ["RANK"]
def kept(state):
    files = inner(state)
    flat = {f"{file}/{name}": value.contiguous() for file, own in files.items() for name, value in own.items()}
    save_file(flat, f"{sys.argv[1]}/rank-{rank}-{state.step}.safetensors")
    return files
checkpoint.tensors_by_file = kept
sys.exit(main(sys.argv[2:]))
"""
"""The trainer, in which each process keeps what it would write as a checkpoint."""


def test_two_processes_see_one_order_and_keep_one_model(lake: Lake, tmp_path: Path) -> None:
    program = tmp_path / "keeping.py"
    program.write_text(KEEPING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    words = [str(program), str(tmp_path), *command(lake, tmp_path / "two")[2:]]
    subprocess.run([*launch, *words], check=True, env=environment(), capture_output=True)
    assert Run(tmp_path / "two").steps() == [3, 6]
    for step in (3, 6):
        written = weights(tmp_path / "two", step)
        for rank in range(2):
            own = load_file(tmp_path / f"rank-{rank}-{step}.safetensors")
            assert own.keys() == written.keys()
            assert all(torch.equal(own[name], written[name]) for name in written), f"step {step}, rank {rank}"
    assert not torch.equal(
        weights(tmp_path / "two", 3)["backbone/embed_latents.weight"], written["backbone/embed_latents.weight"]
    )
    one = Steps(6, 4, 0, 0, 5)
    ranks = [list(Steps(6, 4, 0, 0, 5, rank, 2)) for rank in range(2)]
    for whole, first, second in zip(one, *ranks, strict=True):
        assert whole == [index for pair in zip(first, second, strict=True) for index in pair]
    # A run of two processes goes on with one: nothing in the checkpoint knows how many there were.
    train(lake.root, tmp_path / "two", override(TINY, {"steps": 8}))
    assert Run(tmp_path / "two").steps()[-1] == 8


def test_a_signal_ends_the_run_with_a_checkpoint(lake: Lake, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *command(lake, run, "--set=steps=100000", "--set=checkpoint_every=100000")],
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (run.joinpath("log.jsonl").exists() and len(logged(run, "loss")) > 2):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == STOPPED, errors
    assert "with a checkpoint; the same command goes on" in errors
    assert Run(run).steps()[-1] >= 3


def test_errors_are_one_line(lake: Lake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lake", str(tmp_path / "nowhere"), "--run", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert main(["--lake", str(lake.root), "--run", str(tmp_path / "run"), "--set", "patch=3"]) == 1
    assert "patch 3 does not divide the latents 4x4" in capsys.readouterr().err
    assert main(["--lake", str(lake.root), "--run", str(tmp_path / "run"), "--set", "steps"]) == 1
    assert "--set takes key=value" in capsys.readouterr().err
    assert main(["--lake", str(lake.root), "--run", str(tmp_path / "run"), "--set", "path=straight"]) == 1
    assert "path is 'straight'; it must be warmup or paper" in capsys.readouterr().err


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    lake = make_lake(tmp_path / "lake", clips=2)
    shard = lake.shards / "block0.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard block0.tar of version 1 has \d+ bytes instead of \d+; `vlfm verify"):
        Clips(lake, version.load(lake), "train")
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        Clips(lake, version.load(lake), "train")


def test_steps_resume_and_cover_every_epoch() -> None:
    whole = list(Steps(7, 3, 5, 0, 14))
    assert whole[6:] == list(Steps(7, 3, 5, 6, 14))
    flat = [index for step in whole for index in step]
    for epoch in range(6):
        assert sorted(flat[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert whole != list(Steps(7, 3, 6, 0, 14))
    with pytest.raises(ValueError, match="batch 3 is no multiple of the 2 processes"):
        Steps(7, 3, 0, 0, 1, 0, 2)
    with pytest.raises(ValueError, match="there are no clips to train on"):
        Steps(0, 3, 0, 0, 1)


def test_scales_are_the_root_mean_squares_of_the_curves(lake: Lake) -> None:
    clips = Clips(lake, version.load(lake), "train")
    scales = curve_scales(clips, clips.version.clip["order"])
    coefficients = torch.stack(
        [torch.from_numpy(clip.members["coefficients"].astype("float32")) for clip in clips.every()]
    )
    r = ((torch.arange(4000) + 0.5) / 4000).expand(len(clips), -1)
    mean, derivative = curve(coefficients.double(), r.double())
    assert scales[0] == pytest.approx(float(mean.square().mean().sqrt()), rel=1e-4)
    assert scales[1] == pytest.approx(float(derivative.square().mean().sqrt()), rel=1e-4)


def test_learning_rate_rises_stays_and_falls() -> None:
    recipe = override(TINY, {"steps": 100, "learning_rate_warmup": 10, "learning_rate_decay": 0.5})
    factors = [learning_rate_factor(step, recipe) for step in range(1, 101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:50] == [1.0] * 41
    assert factors[-1] == pytest.approx(0.02)
    assert mixed_seed(1, 2, 3) != mixed_seed(1, 3, 2)
    assert 0 <= mixed_seed(0, 0, -1) < 2**63


def test_the_loss_of_the_truth_is_zero_and_dropping_hides(lake: Lake) -> None:
    """A network that knows the clip has loss 0 in every part; dropped captions and contexts are the empty ones."""
    clips = Clips(lake, version.load(lake), "train")
    batch = Collate(version.read_empty_text(lake, version.load(lake)), VLFM.members)([clips[0], clips[1]]).to("cpu")
    mean_scale, derivative_scale = curve_scales(clips, clips.version.clip["order"])
    options = VLFMOptions(times_per_clip=3, state_jitter=0.2, caption_dropout=0.5, clip_start_dropout=0.2)
    method = VLFM(options, WarmupPath(), mean_scale, derivative_scale)
    seen = {}

    class Oracle(torch.nn.Module):
        def forward(self, latents, flow_time, given):  # type: ignore[no-untyped-def]
            seen.update(vars(given), latents=latents, flow_time=flow_time)
            mean, slope = curve(batch.coefficients, flow_time.view(2, 3).clamp(min=0))
            return {
                "mean": mean.flatten(0, 1)[:, None] / mean_scale,
                "derivative": slope.flatten(0, 1)[:, None] / derivative_scale,
            }

    losses = method.loss(Oracle(), batch, Draws(3, 2))
    assert all(float(value.max()) < 1e-8 for name, value in losses.items() if name != "place"), losses
    times = seen["flow_time"]
    assert float(times.min()) >= -0.25
    assert float(times.max()) <= 1
    for row in range(6):
        dropped = int(seen["text_length"][row // 3]) == len(batch.empty_text)
        assert not (dropped and seen["start_given"][row]), "without its caption a clip has no place either"
        assert bool(seen["context_given"][row]) == bool(seen["context"][row].abs().sum() > 0)
        assert not (seen["context_given"][row] and times[row] <= 0), "the warm-up makes the anchor"
    assert {0.0, 1.0} == set(seen["start_given"].tolist()) | set(seen["context_given"].float().flatten().tolist())


def test_every_field_of_the_recipe_changes_something(lake: Lake, tmp_path: Path) -> None:
    """No option that nothing reads: each field, changed alone, changes the run's files or its log."""
    changes = {
        "name": None, "method": "per_frame",
        "width": 64, "depth": 1, "heads": 4, "patch": 4, "qk_norm": "rms", "architecture": "dit", "optimizer": "grams",
        "stem": 8, "stem_depth": 1,
        "activation_checkpointing": None, "path": "paper", "warmup": 0.5, "sigma_end": 0.3,
        "warmup_share": 0.6, "warmup_focus": 1.5, "signal_weight": 5.0, "warmup_law": "mode", "anchor": "none",
        "anchor_noise": 0.5, "least_signal": 1.0,
        "anchor_dropout": 0.9, "start_anywhere": 0.5, "clip_start_dropout": 0.0,
        "state_jitter": 0.0, "error_focus": 1.0, "derivative_weight": 1.0, "caption_dropout": 0.9,
        "context_dropout": 0.1, "batch": 2, "times_per_clip": 1, "steps": 4, "learning_rate": 1e-4,
        "matrix_learning_rate": 1e-3, "weight_decay": 0.5, "learning_rate_warmup": 1, "learning_rate_decay": 1.0,
        "gradient_clip": 1e-3, "ema_decay": 0.0, "precision": "bfloat16", "seed": 1, "checkpoint_every": 1,
        "checkpoints_kept": 1, "log_every": 2, "validate_every": 2, "loader_workers": None, "bad_steps_allowed": None,
        "spike_factor": None, "accumulate": None, "sharding": None, "sample_every": None,
        "learning_rate_fall": "cosine", "compile": None, "checkpoints": None, "caption_padding": "seen",
    }  # fmt: skip
    base = override(TINY, {"steps": 3, "checkpoint_every": 1, "weight_decay": 0.01, "validate_every": 3})
    fields = [*dataclasses.fields(TrainRecipe), *dataclasses.fields(VLFMOptions)]
    assert set(changes) == {field.name for field in fields} - {"options"}

    def outcome(name: str, recipe: TrainRecipe) -> tuple[object, ...]:
        run = tmp_path / name
        train(lake.root, run, recipe)
        values = [value.double().sum().item() for value in weights(run).values()]
        losses = [logged(run, part) for part in ("loss", "validation_loss")]
        return values, losses, Run(run).steps()

    reference = outcome("reference", base)
    assert reference == outcome("again", base)
    unanchored, stemmed = override(base, {"anchor": "none"}), override(base, {"stem": 8})
    # Those that count only with another option, and the outcome of that option alone.
    alone = {name: (unanchored, outcome("unanchored", unanchored)) for name in ("path", "context_dropout")}
    alone["stem_depth"] = (stemmed, outcome("stemmed", stemmed))
    for name, value in changes.items():
        if name in alone:
            with_it, before = alone[name]
            assert outcome(name, override(with_it, {name: value})) != before, name
        elif value is not None and name != "checkpoint_every":
            assert outcome(name, override(base, {name: value})) != reference, name
    kept_all = outcome("checkpoint_every", override(base, {"checkpoint_every": 3}))
    assert kept_all[2] == [3] != reference[2]
