"""What chance decides for the clips of a batch: the same for the same clip on any number of processes and any device.

There is no generator whose state moves on. A number is a function of its place: SplitMix64 (Steele, Lea and Flood 2014,
"Fast splittable pseudorandom number generators") evaluated at the seed, the clip's position in the whole batch, the
call and the element. So a process draws for its own clips alone, all of them at once, and a GPU is never waited for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor


def _wrapped(number: int) -> int:
    """A whole number modulo 2^64, as int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


STEP, FIRST, SECOND = (_wrapped(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""The constants of SplitMix64, as int64."""


class Draws:
    """Random numbers of one step for the clips that this process has of the batch, and means over all of it.

    Each call of `rand`, `randn`, `randn_frames` and `even` gives new numbers; in the same order they are the same ones.
    They are exact to float32, whatever their type, so that training in float64 has the draws of training in float32.
    Normal ones may differ between devices by rounding; nothing else does.

    Args:
        seed: of this step, in [0, 2^63).
        size: clips B of the batch over all processes.
        rank, world: this process has the clips at the positions rank, rank + world, ... of the batch.
        device: where the numbers are wanted.
        dtype: floating-point type of the numbers.
        total: the sum of a tensor over the processes.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        total: Callable[[Tensor], Tensor] = torch.Tensor.clone,
    ) -> None:
        self.size, self.dtype, self._total, self._calls = size, dtype, total, 0
        self._positions = torch.arange(rank, size, world, device=device)
        self._batch_key = _mixed(torch.full((1,), seed, device=device))
        self._keys = _mixed(self._batch_key + STEP * (self._positions + 1))

    def rand(self, *shape: int) -> Tensor:
        """(B here, *shape) uniform in [0, 1)."""
        bits = self._bits(self._keys, math.prod(shape))
        return (_shifted(bits, 40).float() * 2.0**-24).to(self.dtype).view(-1, *shape)

    def randn(self, *shape: int) -> Tensor:
        """(B here, *shape) standard normal, up to 6.6 in size (Box and Muller 1958)."""
        return self._normal(1, math.prod(shape)).reshape(-1, *shape)

    def randn_frames(self, frames: int, *shape: int) -> Tensor:
        """(B here, frames, *shape) standard normal; each frame's numbers are the same however many frames there are.

        So padding, which differs from process to process, changes nothing of a clip.
        """
        return self._normal(frames, math.prod(shape)).reshape(-1, frames, *shape)

    def _normal(self, rows: int, count: int) -> Tensor:
        half = (count + 1) // 2
        bits = self._bits(self._keys, rows * half).view(-1, rows, half)
        radius = ((_shifted(bits, 32) + 1).float() * 2.0**-32).log().mul(-2).sqrt()
        angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], 2)
        return pairs[..., :count].to(self.dtype)

    def even(self, times: int) -> Tensor:
        """(B here, times) numbers in [0, 1], stratified: over the whole batch one in each of B * times equal parts."""
        total = self.size * times
        order = self._bits(self._batch_key, total)[0].argsort(stable=True).view(self.size, times)
        return (order[self._positions] + self.rand(times)) / total

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values (B here, ...) over the whole batch, a scalar that no gradient passes."""
        values = values.detach()
        return self._total(values.sum()) / (self.size * values[0].numel())

    def repeated(self, times: int) -> Draws:
        """Draws for a batch in which each clip stands `times` times in a row, other than those of this object."""
        made = copy.copy(self)
        self._calls += 1
        made.size, made._calls = self.size * times, 0
        again = torch.arange(times, device=self._positions.device)
        made._positions = (self._positions[:, None] * times + again).flatten()
        made._batch_key = _mixed(self._batch_key + _wrapped(STEP * self._calls))
        made._keys = _mixed(made._batch_key + STEP * (made._positions + 1))
        return made

    def _bits(self, keys: Tensor, count: int) -> Tensor:
        """(keys, count) int64 of 64 random bits each, those of the next call."""
        self._calls += 1
        keys = _mixed(keys + _wrapped(STEP * self._calls))
        return _mixed(keys[:, None] + STEP * torch.arange(1, count + 1, device=keys.device))


def _mixed(bits: Tensor) -> Tensor:
    """The output of SplitMix64 for states (int64); each is given another."""
    bits = (bits ^ _shifted(bits, 30)) * FIRST
    bits = (bits ^ _shifted(bits, 27)) * SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """int64 shifted to the right, zeros coming in from the left."""
    return (bits >> by) & (2 ** (64 - by) - 1)
