"""What text encoders know, measured: on encoders and clips whose answers are known."""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.text.encoder import builtin_text_encoder
from model.text_train import Paths
from pipeline.corpus import attributes_of, combinations
from pipeline.experiments import text
from pipeline.experiments.text import ATTRIBUTES, additive_share, probe_accuracy, retrieval, swap_cosines, swapped


class Sum:
    """Stands for a text encoder whose pooled row is a sum of one vector per value, which is the ideal."""

    id = "sum@0"

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        rows = torch.zeros(len(captions), 1, 64)
        for row, caption in zip(rows, captions, strict=True):
            for name in ATTRIBUTES:
                seed = zlib.crc32(f"{name} {getattr(attributes_of(caption), name)}".encode())
                row[0] += torch.randn(64, generator=torch.Generator().manual_seed(seed))
        return rows, torch.ones(len(captions), dtype=torch.int64)


def test_a_swap_changes_one_attribute() -> None:
    random = np.random.default_rng(0)
    for one in combinations()[::97]:
        for attribute in ATTRIBUTES:
            other = swapped(one, attribute, random)
            assert attributes_of(other.caption) == other, "a caption of the grammar"
            differ = {name for name in ATTRIBUTES if getattr(one, name) != getattr(other, name)}
            assert differ == ({"motion", "direction"} if attribute == "motion" else {attribute})


def test_a_sum_is_read_by_linear_probes_and_found_to_be_one() -> None:
    ideal: Any = Sum()
    assert min(probe_accuracy(ideal, count=120).values()) == 1
    assert additive_share(ideal, count=120) == pytest.approx(1, abs=1e-6)
    assert 0.7 < float(swap_cosines(ideal, count=10)["colour"].mean()) < 0.95
    random = builtin_text_encoder()
    assert additive_share(random, count=120) < 0.5
    assert probe_accuracy(random, count=120)["direction"] < 0.9


def test_clips_find_their_captions_where_there_is_something_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "GRID", 4)
    ideal: Any = Sum()
    chosen = combinations(False)[::60][:40]
    # A clip that shows its caption's row itself, in a channel each, and one that shows nothing.
    rows = ideal.encode([one.caption for one in chosen])[0][:, 0, :8]
    shown = rows[:, None, :, None, None].expand(-1, text.TIMES, -1, 4, 4).half()
    captions = [one.caption for one in chosen]
    telling, silent = (Paths(captions, captions, paths) for paths in (shown, torch.zeros_like(shown)))
    assert retrieval(ideal, [telling], telling, steps=60) > 0.8
    assert retrieval(ideal, [silent], silent, steps=10) < 0.3


def test_the_table_and_its_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "figures", lambda encoder, seed: figures_of(encoder.id))
    assert text.main(["vlfm-small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | builtin | vlfm-small |"
    assert len(lines) == 2 + 2 * len(ATTRIBUTES) + 1
    assert text.main(["vlfm-small", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"builtin", "vlfm-small"}
    assert text.main(["--lake", "somewhere"]) == 1
    assert "give both or neither" in capsys.readouterr().err


def figures_of(name: str) -> dict[str, Any]:
    values = dict.fromkeys(ATTRIBUTES, 0.5)
    return {"name": name, "cosine_mean": values, "cosine_max": values, "probe": values, "additive": 0.25}
