"""Sample strips in a real training: into TensorBoard, the same on two processes, and never in its way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model.sample import LoadedSampler, Sampler
from model.settings import override
from model.stop import Stopped
from model.train import train
from model.training.checkpoint import Run
from model.training.log import read_log
from storage.layout import Lake
from tests.model.test_train import TINY, command, environment
from tests.model.tiny_lake import make_lake

SAMPLED = override(TINY, {"steps": 2, "sample_every": 1, "checkpoint_every": 1, "validate_every": 2})


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("strips") / "lake", clips=4, validation=2)


def pictures(run: Path) -> dict[str, dict[int, bytes]]:
    """The strips that TensorBoard has, by tag and step, as PNG."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    return {
        tag: {event.step: event.encoded_image_string for event in board.Images(tag)} for tag in board.Tags()["images"]
    }


def test_strips_are_the_sampler_s_and_change_nothing(lake: Lake, tmp_path: Path) -> None:
    train(lake.root, tmp_path / "run", SAMPLED)
    train(lake.root, tmp_path / "plain", override(SAMPLED, {"sample_every": 0}))
    found = pictures(tmp_path / "run")
    assert {tag.split(" ", 1)[0] for tag in found} == {"sample/0", "sample/1"}, "one for each validation clip"
    assert all(set(strips) == {1, 2} for strips in found.values())
    assert pictures(tmp_path / "plain") == {}
    losses = [[line["loss"] for line in read_log(tmp_path / run / "log.jsonl") if "loss" in line]
              for run in ("run", "plain")]  # fmt: skip
    assert losses[0] == losses[1]

    (tag, strips), *_ = found.items()
    shown = np.asarray(Image.open(BytesIO(strips[2])))
    sampler = Sampler(tmp_path / "run", 2, "cpu")
    (frames,) = sampler.videos([tag.split(" ", 1)[1]], 6 / sampler.window, sampler.window, seeds=[0])
    assert np.array_equal(shown, np.concatenate(list(frames), axis=1))


def test_the_first_of_two_processes_makes_the_same_strips(lake: Lake, tmp_path: Path) -> None:
    train(lake.root, tmp_path / "one", SAMPLED)
    two = command(lake, tmp_path / "two", "--set=sample_every=1", "--set=steps=2", "--processes", "2")
    done = subprocess.run([sys.executable, *two], env=environment(), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert {tag: set(strips) for tag, strips in pictures(tmp_path / "two").items()} == {
        tag: set(strips) for tag, strips in pictures(tmp_path / "one").items()
    }


def test_a_codec_that_is_not_here_is_one_warning(
    lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacks = property(lambda sampler: (_ for _ in ()).throw(OSError("no weights of sd15 here; copy them")))
    monkeypatch.setattr(LoadedSampler, "codec", lacks)
    train(lake.root, tmp_path / "run", SAMPLED)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    expected = "warning: no sample strips from step 1 on: no weights of sd15 here; copy them; training goes on"
    assert warnings == [expected]
    assert Run(tmp_path / "run").steps() == [1, 2]


def test_a_stop_during_the_strips_is_honoured(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sampled = LoadedSampler.sample

    def interrupted(self: LoadedSampler, *given: object, **more: object) -> object:
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        return sampled(self, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(LoadedSampler, "sample", interrupted)
    with pytest.raises(Stopped, match="stopped at step 2"):
        train(lake.root, tmp_path / "run", override(SAMPLED, {"steps": 9}))
    assert len(calls) == 1, "no other strip is begun"
    assert pictures(tmp_path / "run") == {}
    assert Run(tmp_path / "run").steps() == [1, 2]
