"""Text encoders: the built-in one separates captions and never changes; a pretrained one is loaded and checked."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from model.text.encoder import TextEncoder, builtin_text_encoder, pretrained_text_encoder, text_encoder_from_spec
from model.text.words import WORDS, byte_letters, merges, vocabulary
from model.weights import CodecUnavailable
from storage.rounding import ROUNDING
from tests.model.tiny_diffusion import tiny_diffusion

CAPTIONS = [
    "A large red square slides from left to right over a dark blue background",
    "a small yellow triangle bounces up and down.",
    "Grey stripes scroll diagonally behind a rotating white star, then everything slowly fades to black.",
    "The mandelbrot fractal zooms in",
    "Two people arm wrestle across a kitchen table.",
]
OTHER_WORDS = ["green", "small", "up", "without", "three", "blinks", "camera", "again"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return builtin_text_encoder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion(tmp_path_factory.mktemp("hub") / "tiny")


def same(one: Tensor, other: Tensor) -> None:
    """Equal but for rounding: a processor may add up a batch of another size in another order."""
    torch.testing.assert_close(one, other, rtol=ROUNDING, atol=ROUNDING)


def pooled(encoder: TextEncoder, captions: list[str]) -> Tensor:
    embeddings, lengths = encoder.encode(captions)
    return embeddings[torch.arange(len(captions)), lengths - 1]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_one_other_word_makes_another_embedding(encoder: TextEncoder, caption: str) -> None:
    words = caption.split()
    changed = [
        " ".join([*words[:place], word, *words[place + 1 :]])
        for place in range(len(words))
        for word in OTHER_WORDS
        if word != words[place].lower()
    ]
    vectors = pooled(encoder, [caption, *changed])
    similarity = cosine_similarity(vectors[:1], vectors[1:])
    assert similarity.max() < 0.9, changed[int(similarity.argmax())]
    assert similarity.mean() < 0.7


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A red square moves from left to right.", "A red square moves from right to left."),
        ("a ball drifts up and then down", "a ball drifts down and then up"),
        ("a red disc over a blue background", "a blue disc over a red background"),
        ("the camera zooms in", "the camera zooms out"),
    ],
)
def test_the_order_of_words_counts(encoder: TextEncoder, one: str, other: str) -> None:
    vectors = pooled(encoder, [one, other])
    assert cosine_similarity(vectors[:1], vectors[1:]).item() < 0.8


def test_captions_of_different_films_are_far_apart(encoder: TextEncoder) -> None:
    vectors = pooled(encoder, CAPTIONS)
    for one, other in combinations(range(len(CAPTIONS)), 2):
        assert cosine_similarity(vectors[one], vectors[other], dim=0).item() < 0.5


def test_shapes_lengths_and_zero_padding(encoder: TextEncoder) -> None:
    embeddings, lengths = encoder.encode(["", "a ball", CAPTIONS[0]])
    assert embeddings.shape == (3, 77, 64) == (3, encoder.length, encoder.dim)
    assert embeddings.dtype == torch.float32
    assert lengths.tolist() == [2, 4, 16]
    for row, length in zip(embeddings, lengths.tolist(), strict=True):
        assert (row[length:] == 0).all()
        assert (row[:length].abs().amax(1) > 0).all()
    # Unit variance: the trainer takes embeddings as they are.
    assert 0.9 < float(embeddings[2, :16].std()) < 1.1


def test_an_embedding_does_not_depend_on_its_neighbours_in_the_batch(encoder: TextEncoder) -> None:
    together, _ = encoder.encode(CAPTIONS)
    for caption, row in zip(CAPTIONS, together, strict=True):
        same(encoder.encode([caption])[0][0], row)
    many, lengths = encoder.encode([CAPTIONS[1]] * 70)
    assert len(many) == len(lengths) == 70
    assert encoder.encode([])[0].shape == (0, 77, 64)


def test_padding_rows_are_the_models_own_when_asked_for(encoder: TextEncoder) -> None:
    padded, lengths = encoder.encode(["a ball"], padded=True)
    zeroed, _ = encoder.encode(["a ball"])
    same(padded[0, : lengths[0]], zeroed[0, : lengths[0]])
    assert (padded[0].abs().amax(1) > 0).all()


@pytest.mark.parametrize("caption", CAPTIONS)
def test_ordinary_captions_take_a_token_a_word(encoder: TextEncoder, caption: str) -> None:
    assert len(encoder.tokens(caption)) <= len(caption.split()) + 4 < 40


def test_every_bundled_word_is_one_token_and_every_text_has_tokens(encoder: TextEncoder) -> None:
    for word in set(WORDS.split()):
        assert encoder.tokens(word) == ["<|startoftext|>", f"{word}</w>", "<|endoftext|>"]
    odd = "Ünïcode \U0001f3ac 日本 \x00\t#@! 42"
    assert "<|endoftext|>" not in encoder.tokens(odd)[1:-1], "nothing is unknown to a byte-level vocabulary"
    assert len(set(byte_letters())) == 256
    assert len(vocabulary()) == max(vocabulary().values()) + 1 == 512 + len({a + b for a, b in merges()}) + 2


def test_a_caption_that_is_cut_is_reported(encoder: TextEncoder) -> None:
    fits, too_long = " ".join(["ball"] * 75), " ".join(["ball"] * 76)
    assert not encoder.truncated(fits)
    assert encoder.truncated(too_long)
    assert encoder.encode([too_long])[1].tolist() == [77]
    same(encoder.encode([fits])[0], encoder.encode([too_long])[0])


def test_a_single_string_is_refused_with_the_mend(encoder: TextEncoder) -> None:
    with pytest.raises(TypeError, match=r"pass a list, encode\(\['a ball'\]\)"):
        encoder.encode("a ball")


def test_the_builtin_weights_never_change(encoder: TextEncoder) -> None:
    # A lake holds embeddings made with these weights: another digest would orphan them.
    assert encoder.id == "builtin@2b4558b0a3063458"
    assert encoder.digest == text_encoder_from_spec({"kind": "builtin"}).digest


def test_the_builtin_weights_hang_on_no_last_bit_of_a_machines_sine(monkeypatch: pytest.MonkeyPatch) -> None:
    for towards in (-math.inf, math.inf):
        with monkeypatch.context() as patch:
            for name in ("sin", "cos"):
                real = getattr(math, name)
                patch.setattr(math, name, lambda x, real=real, towards=towards: math.nextafter(real(x), towards))
            assert builtin_text_encoder().id == "builtin@2b4558b0a3063458"


def test_building_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    builtin_text_encoder()
    assert torch.equal(torch.rand(4), expected)


def test_a_spec_rebuilds_the_encoder_and_another_digest_is_an_error(encoder: TextEncoder) -> None:
    spec = json.loads(json.dumps(encoder.spec()))
    rebuilt = text_encoder_from_spec(spec)
    assert rebuilt.id == encoder.id
    same(rebuilt.encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])
    with pytest.raises(ValueError, match=r"made with 0123456789abcdef.*ingest again"):
        text_encoder_from_spec({**spec, "digest": "0123456789abcdef" * 4})


def test_wrong_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="'builtin' or 'pretrained'"):
        text_encoder_from_spec({"kind": "t5"})
    with pytest.raises(ValueError, match=r"unknown text setting sauce.*reads digest, kind, revision, source"):
        text_encoder_from_spec({"kind": "pretrained", "sauce": "x"})
    with pytest.raises(ValueError, match="names no source"):
        text_encoder_from_spec({"kind": "pretrained"})


def test_a_stable_diffusion_folder_gives_its_text_encoder(folder: Path) -> None:
    encoder = pretrained_text_encoder(folder)
    assert (encoder.dim, encoder.length) == (32, 77)
    assert encoder.id == f"tiny@{encoder.digest[:16]}"
    assert str(folder.parent) not in encoder.id
    again = text_encoder_from_spec(json.loads(json.dumps(encoder.spec())))
    same(again.encode(CAPTIONS)[0], encoder.encode(CAPTIONS)[0])


def test_a_folder_of_model_and_tokenizer_together_does_too(folder: Path, tmp_path: Path) -> None:
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(folder / part, tmp_path / "clip", dirs_exist_ok=True)
    assert pretrained_text_encoder(tmp_path / "clip").digest == pretrained_text_encoder(folder).digest


def test_other_weights_under_the_same_name_are_an_error(folder: Path, tmp_path: Path) -> None:
    spec = pretrained_text_encoder(folder).spec()
    other = tiny_diffusion(tmp_path / "tiny", seed=1)
    with pytest.raises(ValueError, match=r"has digest .* the embeddings were made with"):
        text_encoder_from_spec({**spec, "source": str(other)})


def test_missing_weights_are_one_sentence_with_the_command(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CodecUnavailable, match=r"not on this machine.*`hf download openai/clip --include") as caught:
        pretrained_text_encoder("openai/clip")
    assert "\n" not in str(caught.value)
    with pytest.raises(CodecUnavailable, match="--revision abc123"):
        pretrained_text_encoder("openai/clip", revision="abc123")
    with pytest.raises(CodecUnavailable, match="neither an existing folder nor a hub id"):
        pretrained_text_encoder("/no/such/folder")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "text_encoder" / "model.safetensors").rename(broken / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(CodecUnavailable, match=r"broken/text_encoder has no \*.safetensors.*run code"):
        pretrained_text_encoder(broken)
    (broken / "text_encoder" / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CodecUnavailable, match="broken/text_encoder cannot be loaded"):
        pretrained_text_encoder(broken)


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(ValueError, match="leave the revision out"):
        pretrained_text_encoder(folder, revision="main")


def test_importing_costs_no_transformers() -> None:
    code = """import sys, model.codecs.factory, model.text.encoder
sys.exit(bool({'transformers', 'diffusers'} & {*sys.modules}))"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
