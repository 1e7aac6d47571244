"""Training of a text encoder: by clips of lakes, resumed bit by bit, written as a folder that a recipe names."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel

from model import text_train
from model.settings import override
from model.stop import Stopped
from model.text.encoder import pretrained_text_encoder, text_encoder_from_spec
from model.text.words import vocabulary
from model.text_train import TextRecipe, main, read_paths, replaced, train_text, words_of
from model.training.checkpoint import Run
from model.training.loop import Training
from storage.layout import Lake
from storage.store import LakeBusy
from tests.model.tiny_lake import make_lake

TINY = TextRecipe(
    width=16, layers=1, heads=2, times=3, grid=4, tower=8, steps=4, batch=4, word_batch=2, save_every=2, hold_out=()
)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return make_lake(tmp_path_factory.mktemp("text") / "lake", caption="square {number} zigzags over grey")


@pytest.fixture(scope="module")
def trained(lake: Lake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    return train_text([lake.root], folder / "run", folder / "text", TINY)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "text_encoder" / "model.safetensors")


def test_the_folder_is_a_text_encoder(trained: Path, lake: Lake) -> None:
    loaded = CLIPTextModel.from_pretrained(trained / "text_encoder", local_files_only=True)
    assert loaded.config.hidden_size == 16
    assert {value.dtype for value in weights(trained).values()} == {torch.float16}
    encoder = pretrained_text_encoder(trained)
    embedding, length = encoder.encode(["a red ball zigzags"])
    assert embedding.shape == (1, 77, 16)
    assert int(length[0]) == 6, "a word of the captions is one token"
    assert "zigzags</w>" not in vocabulary(), "the built-in vocabulary stays as it is"
    rebuilt = text_encoder_from_spec(json.loads(json.dumps(encoder.spec())))
    assert rebuilt.id == encoder.id
    record = json.loads((trained / "training.json").read_text())
    assert record["recipe"]["steps"] == 4
    assert record["films"] == [f"film-{number}.mp4" for number in range(6)]
    assert record["captions"] == [f"square {number} zigzags over grey" for number in range(6)]
    assert str(lake.root) not in json.dumps(record)
    assert not [path for path in trained.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_a_stopped_training_goes_on_bit_by_bit(
    trained: Path, lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = text_train.training_of

    def stopping(*arguments: Any) -> Training:
        made = make(*arguments)

        def losses(step: int, batch: Any) -> dict[str, torch.Tensor]:
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return made.losses(step, batch)

        return dataclasses.replace(made, losses=losses)

    monkeypatch.setattr(text_train, "training_of", stopping)
    with pytest.raises(Stopped, match="step 3"):
        train_text([lake.root], tmp_path / "run", tmp_path / "text", TINY)
    assert not (tmp_path / "text").exists()
    monkeypatch.undo()
    train_text([lake.root], tmp_path / "run", tmp_path / "text", TINY)
    mine, theirs = weights(tmp_path / "text"), weights(trained)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_another_recipe_or_other_clips_are_refused(trained: Path, lake: Lake) -> None:
    run = trained.parent / "run"
    with pytest.raises(ValueError, match="another recipe or other clips"):
        train_text([lake.root], run, trained, dataclasses.replace(TINY, seed=1))
    with pytest.raises(ValueError, match="another recipe or other clips"):
        train_text([lake.root], run, trained, dataclasses.replace(TINY, hold_out=("film-0",)))


def test_a_second_trainer_is_refused(trained: Path, lake: Lake, tmp_path: Path) -> None:
    run = trained.parent / "run"
    told = rf"run is in use by process {os.getpid()}; wait until that run ends, or stop it"
    with Run(run).lock(), pytest.raises(LakeBusy, match=told):
        train_text([lake.root], run, tmp_path / "text", TINY)
    assert not (tmp_path / "text").exists()


def test_films_that_are_held_out_are_never_read(lake: Lake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert read_paths(lake.root, 3, 4, ["film-0", "film-3"]).films == [f"film-{k}.mp4" for k in (1, 2, 4, 5)]
    assert read_paths(lake.root, 3, 4, split="validation").films == ["film-6.mp4"]
    names = json.dumps([f"film-{number}" for number in range(6)])
    folders = ["--lake", str(lake.root), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main([*folders, "--set", f"hold_out={names}"]) == 1
    assert "besides the held-out films" in capsys.readouterr().err
    assert {"carphone", "armwrestling"} <= set(TextRecipe().hold_out)


def test_latents_are_standardised_whatever_the_codec(lake: Lake) -> None:
    paths = read_paths(lake.root, 3, 4).paths
    assert paths.shape == (6, 3, 12, 4, 4)
    deviation, mean = torch.std_mean(paths.float(), (0, 1, 3, 4))
    assert float(mean.abs().max()) < 0.01
    busy = deviation > 0.1  # two of the codec's channels are empty: nothing but float16's rounding is in them
    assert int(busy.sum()) == 10
    torch.testing.assert_close(deviation[busy], torch.ones(10), rtol=0.02, atol=0.02)
    assert read_paths(lake.root, 5, 8).paths.shape == (6, 5, 12, 8, 8)


def test_replaced_words_leave_the_marks() -> None:
    words = words_of(["a red disc", "a very small green square zigzags"], 20)
    chosen = torch.tensor([0, 1, 1])
    tokens, lengths = replaced(words, chosen, 1.0, torch.Generator().manual_seed(0))
    assert lengths.tolist() == [5, 8, 8]
    start, end = words.vocabulary["<|startoftext|>"], words.vocabulary["<|endoftext|>"]
    for row, length, given in zip(tokens, lengths.tolist(), words.tokens[chosen], strict=True):
        assert (row[0], *row[length - 1 :].unique().tolist()) == (start, end)
        inner = row[1 : length - 1]
        assert (inner != given[1 : length - 1]).any()
        assert not set(inner.tolist()) & {start, end}
    kept, _ = replaced(words, chosen, 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(kept, words.tokens[chosen])


def test_fields_are_set_from_the_command_line() -> None:
    assert override(TextRecipe(), {"steps": "5", "hold_out": '["a"]'}).hold_out == ("a",)
    with pytest.raises(ValueError, match="steps"):
        override(TextRecipe(), {"steps": "many"})
