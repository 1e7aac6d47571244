"""The method `vlfm` behind a wrapper, for tests of the programs that run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from model.methods.registry import METHODS
from model.methods.vlfm import VLFM


class Wrapper:
    """Passes on what it does not define."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)


@contextmanager
def vlfm_wrapped(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block, `vlfm` is what `wrap` makes of it when a run builds it."""

    class Wrapped(VLFM):
        @classmethod
        def build(cls, *given: Any) -> Any:
            return wrap(VLFM.build(*given))

    METHODS["vlfm"] = Wrapped
    try:
        yield
    finally:
        METHODS["vlfm"] = VLFM
