"""Stand-ins for tests of what runs a method or a network: `vlfm` behind a wrapper, and a network that notes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model.backbones.conditioning import Conditioning
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


class Told(torch.nn.Module):
    """Notes what it is asked and told; answers with its mean."""

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.answer = torch.tensor(answer)
        self.states: list[torch.Tensor] = []
        self.given: list[Conditioning] = []
        self.times: list[torch.Tensor] = []

    def forward(self, latents: torch.Tensor, time: torch.Tensor, given: Conditioning) -> dict[str, torch.Tensor]:
        self.states.append(latents)
        self.given.append(given)
        self.times.append(time)
        mean = self.answer.expand_as(latents) + 0.0 * latents
        return {"mean": mean, "derivative": torch.zeros_like(mean)}
