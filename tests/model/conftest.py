"""One run and its evaluation, for the tests of the figures, of the page and of the program."""

from __future__ import annotations

import pytest

from tests.model.evaluated import CAPTION, Made


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A lake of six training and two validation clips, a run on it, and its evaluation."""
    return Made(tmp_path_factory.mktemp("evaluate"), caption=CAPTION, validation=2)
