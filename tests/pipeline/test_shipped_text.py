"""The text encoder that comes with the package, beside the two that know less, on combinations it never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import CLIPTextModel

from model.settings import override
from model.text.encoder import TextEncoder, builtin_text_encoder, pretrained_text_encoder
from model.weights import SHIPPED, find_weights
from pipeline.corpus import combinations
from pipeline.corpus.grammar import BACKGROUNDS, COLOURS, DIRECTIONS, OBJECTS, SIZES, SPEEDS
from pipeline.experiments.text import ATTRIBUTES, figures, pooled
from pipeline.recipes import demo
from pipeline.stages.embed import embed

NAME = "vlfm-text"
FOLDER = SHIPPED / NAME
NEVER_SEEN = ("carphone", "armwrestling")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return pretrained_text_encoder(NAME)


@pytest.fixture(scope="module")
def measured(encoder: TextEncoder) -> dict[str, dict[str, Any]]:
    encoders = {"builtin": builtin_text_encoder(), "vlfm-small": pretrained_text_encoder("vlfm-small"), NAME: encoder}
    return {name: figures(one, swaps=40, count=300) for name, one in encoders.items()}


def test_the_folder_is_small_safe_and_recorded() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3e6
    assert {path.name for path in files if path.suffix not in (".json", ".md")} == {"model.safetensors"}
    record = json.loads((FOLDER / "training.json").read_text())
    assert not set(NEVER_SEEN) & {Path(film).stem for film in record["films"]}
    assert "licence" in (FOLDER / "README.md").read_text().lower()


def test_it_is_found_by_name_and_is_a_clip_text_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_weights(NAME).source == NAME
    loaded = CLIPTextModel.from_pretrained(FOLDER / "text_encoder", local_files_only=True)
    assert loaded.config.hidden_size == 128
    recipe = override(demo(), {"text": json.dumps({"kind": "pretrained", "source": NAME})})
    texts = embed(["a red ball bounces"], recipe.text)
    assert texts.dim == 128
    assert texts.by_caption["a red ball bounces"].shape == (6, 128)
    assert texts.spec["source"] == NAME
    assert str(SHIPPED) not in json.dumps(texts.spec) + texts.id


def test_every_word_of_the_grammar_is_one_token(encoder: TextEncoder) -> None:
    phrases = [*OBJECTS, *COLOURS, *BACKGROUNDS, *SIZES, *DIRECTIONS, *SPEEDS, "a on a background"]
    words = {word for phrase in phrases for word in phrase.split()}
    words |= {word for directions in DIRECTIONS.values() for phrase in directions for word in phrase.split()}
    for word in sorted(words):
        assert len(encoder.tokens(word)) == 3, word


def test_swapped_attributes_move_a_caption(measured: dict[str, dict[str, Any]]) -> None:
    own, small = measured[NAME], measured["vlfm-small"]
    for attribute in ATTRIBUTES:
        assert own["cosine_mean"][attribute] < small["cosine_mean"][attribute] - 0.05, attribute
        assert own["cosine_max"][attribute] < 0.97 < small["cosine_max"][attribute], attribute
    # The random one spreads captions further apart, as a hash does: no sum of attributes, see `additive` below.


def test_linear_probes_read_attributes_of_unseen_combinations(measured: dict[str, dict[str, Any]]) -> None:
    for attribute in ATTRIBUTES:
        own, *controls = (measured[name]["probe"][attribute] for name in (NAME, "builtin", "vlfm-small"))
        assert own >= 0.98, attribute
        assert own >= max(controls), attribute
    means = {name: sum(row["probe"].values()) / len(ATTRIBUTES) for name, row in measured.items()}
    assert means[NAME] > max(means["builtin"], means["vlfm-small"]) + 0.1
    additive = {name: row["additive"] for name, row in measured.items()}
    assert additive[NAME] > max(additive["builtin"], additive["vlfm-small"]) + 0.2


def test_rows_are_of_unit_size_and_differ_by_word(encoder: TextEncoder) -> None:
    one = "a small red ring slides slowly to the left on a black background"
    rows, lengths = encoder.encode([one, one.replace("left", "right"), ""])
    for row, length in zip(rows, lengths.tolist(), strict=True):
        torch.testing.assert_close(row[:length].std(-1), torch.ones(length), rtol=0.02, atol=0.02)
    place = encoder.tokens(one).index("left</w>")
    assert float(cosine_similarity(rows[0, place], rows[1, place], dim=0)) < 0.9
    # What comes before cannot know; rows are float16.
    torch.testing.assert_close(rows[0, :place], rows[1, :place], rtol=2e-3, atol=2e-3)
    words = rows[0, 1 : int(lengths[0]) - 1]
    alike = cosine_similarity(words[:, None], words[None], dim=-1).fill_diagonal_(0)
    assert float(alike.max()) < 0.95


def test_ordinary_captions_stay_apart(encoder: TextEncoder) -> None:
    captions = ["a red ball bounces", "a yellow ball bounces", "Two people arm wrestle.", "a cat sits", "a dog sits"]
    rows = pooled(encoder, captions)
    alike = cosine_similarity(rows[:, None], rows[None], dim=-1).fill_diagonal_(0)
    assert float(alike.max()) < 0.95


def test_no_held_out_combination_was_trained_on() -> None:
    record = json.loads((FOLDER / "training.json").read_text())
    grammar = {one.caption: one for one in combinations()}
    known = [grammar[caption] for caption in record["captions"] if caption in grammar]
    assert len(known) >= 400
    assert not [one.caption for one in known if one.held_out]
