"""A validation tells the loss by place on the flow, whatever the method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.settings import override
from model.train import train
from model.training.log import read_log
from model.training.objective import RANGES, by_range
from tests.model.test_train import TINY
from tests.model.tiny_lake import make_lake


def test_errors_are_sorted_by_place() -> None:
    place = torch.tensor([[-1.0, -0.75], [-0.5, 0.0], [0.1, 1.0]])
    errors = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]])
    found = [float(value) for value in by_range({"errors": errors, "place": place})]
    assert dict(zip(RANGES, found[::2], strict=True)) == {
        "warmup_1": 7, "warmup_2": 8, "clip_1": 16, "clip_2": 0, "clip_3": 0, "clip_4": 32,
    }  # fmt: skip
    assert found[1::2] == [3, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set(RANGES)),
        ({"method": "per_frame"}, {"warmup_1", "warmup_2"}),
        ({"path": "paper", "anchor": "none"}, {"clip_1", "clip_2", "clip_3", "clip_4"}),
    ],
    ids=["vlfm", "per_frame", "paper"],
)
def test_the_log_has_the_validation_by_place(tmp_path: Path, changes: dict[str, str], expected: set[str]) -> None:
    lake = make_lake(tmp_path / "lake", clips=4, validation=8)
    train(lake.root, tmp_path / "run", override(TINY, {"steps": 2, "times_per_clip": 4, **changes}))
    (line,) = (line for line in read_log(tmp_path / "run" / "log.jsonl") if "validation_loss" in line)
    errors = {name.split("/")[1]: value for name, value in line.items() if name.startswith("validation_error/")}
    assert errors.keys() == expected
    assert all(value > 0 for value in errors.values())
    assert min(errors.values()) <= line["validation_loss"] <= max(errors.values())
