"""Tasks are masks, and padding is never given."""

from __future__ import annotations

import pytest
import torch

from model.tasks import continuation, image_to_video, interpolation

VALID = torch.tensor([[True, True, True, True], [True, True, False, False]])


def test_masks() -> None:
    assert image_to_video(VALID).tolist() == [[True, False, False, False], [True, False, False, False]]
    assert continuation(VALID, 3).tolist() == [[True, True, True, False], [True, True, False, False]]
    assert interpolation(VALID).tolist() == [[True, False, False, True], [True, True, False, False]]
    third = torch.tensor([False, False, True, False])
    assert interpolation(VALID, third).tolist() == [[True, False, True, True], [True, True, False, False]]


def test_a_continuation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="frames is 0; a continuation needs at least 1 given frame"):
        continuation(VALID, 0)
