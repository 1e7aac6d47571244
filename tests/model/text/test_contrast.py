"""The contrast of captions and clips, and the loss that keeps words apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from model.text.contrast import ClipTower, Contrast, contrast_loss, new_text_model
from model.text.words import vocabulary


def slow_loss(clips: np.ndarray, captions: np.ndarray, which: list[int], scale: float) -> float:
    """The definition, in float64 and one pair at a time: the mean over clips and captions, over all that belong
    together, of -log softmax."""
    likeness = [[scale * float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in captions] for a in clips]
    count, sums = len(which), 0.0
    for rows in (likeness, [list(column) for column in zip(*likeness, strict=True)]):
        for i in range(count):
            total = math.log(sum(math.exp(value) for value in rows[i]))
            own = [rows[i][j] - total for j in range(count) if which[i] == which[j]]
            sums -= sum(own) / len(own)
    return sums / (2 * count)


@pytest.mark.parametrize("which", [[0, 1, 2, 3, 4], [2, 0, 2, 1, 2], [7, 7, 7, 7, 7]])
def test_the_contrast_is_its_definition_also_where_captions_repeat(which: list[int]) -> None:
    random = np.random.default_rng(0)
    clips, distinct = random.normal(size=(5, 6)), random.normal(size=(8, 6))
    captions = distinct[which]
    found = contrast_loss(torch.from_numpy(clips), torch.from_numpy(captions), torch.tensor(which), 3.0)
    assert float(found) == pytest.approx(slow_loss(clips, captions, which, 3.0), rel=1e-12)


def test_clips_of_one_caption_do_not_repel() -> None:
    vectors = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]]
    together = contrast_loss(vectors, vectors, torch.tensor([0, 0, 1, 1]), 50.0)
    assert float(together) == pytest.approx(math.log(2), abs=1e-12)  # the target's own entropy
    assert float(contrast_loss(vectors, vectors, torch.arange(4), 50.0)) == pytest.approx(math.log(2), abs=1e-12)
    strangers = vectors.clone().requires_grad_()
    contrast_loss(strangers + 1e-3 * torch.randn(4, 2), vectors, torch.tensor([0, 0, 1, 1]), 50.0).backward()
    assert float(strangers.grad.abs().max()) < 0.1  # type: ignore[union-attr]


def tiny_contrast() -> Contrast:
    torch.manual_seed(0)
    return Contrast(new_text_model(vocabulary(), 16, 1, 2, 12), ClipTower(3, 2, 8, 4, 16))


def test_every_row_is_asked_for_the_words_until_there() -> None:
    contrast, numbers = tiny_contrast(), vocabulary()
    start, red, disc, end = (numbers[word] for word in ("<|startoftext|>", "red</w>", "disc</w>", "<|endoftext|>"))
    tokens, lengths = torch.tensor([[start, red, disc, end, end, end]]), torch.tensor([4])
    said = contrast.words(contrast.rows(tokens)).log_softmax(-1)[0]
    wanted = (
        -(said[1, red] + (said[2, red] + said[2, disc]) / 2 + (said[3, red] + said[3, disc] + said[3, end]) / 3) / 3
    )
    torch.testing.assert_close(contrast.word_loss(tokens, lengths), wanted)


def test_the_tower_sees_motion_and_rows_have_unit_variance() -> None:
    contrast = tiny_contrast()
    path = torch.randn(1, 3, 2, 8, 8)
    forward, backward = contrast.tower(path), contrast.tower(path.flip(1))
    assert forward.shape == (1, 16)
    assert not torch.allclose(forward, backward, atol=1e-3)
    rows = contrast.rows(torch.randint(500, (2, 7)))
    torch.testing.assert_close(rows.var(-1, unbiased=False), torch.ones(2, 7), rtol=1e-3, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in contrast.text.final_layer_norm.parameters())
