"""The methods, by name. A new one is a file in this package and a line here."""

from __future__ import annotations

from typing import Any

from model.methods.autoregressive import Autoregressive
from model.methods.base import Method
from model.methods.direct import Direct
from model.methods.flowception import Flowception
from model.methods.full import Full
from model.methods.per_frame import PerFrame
from model.methods.vlfm import VLFM

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (VLFM, PerFrame, Direct, Flowception, Full, Autoregressive)
}


def method_named(name: str) -> type[Any]:
    """The class of a method. Raises ValueError for an unknown name; the message lists those there are."""
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; it must be one of {', '.join(METHODS)}: --set method=vlfm")
    return METHODS[name]
