"""Self-attention over the frames of a sequence: which tokens see which, finished frames, a cache, and what it costs.

Frames that are finished need not be computed like those that are still noisy. `keys`: their latents' tokens attend to
one another alone, frame by frame, and are keys and values for the others. That is another mask, so a backbone that was
trained with it computes the same when it samples. `cached`: their keys and values are those of an earlier call
(`FrameCache`). Under block-causal attention that is exact, since no later frame changes them; under full attention,
where they would have gone on changing with the frames around them, it approximates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Attention:
    """The self-attention of one forward pass, the same for all its blocks."""

    seen: Tensor | None
    """(B or 1, 1, Q, K) bool, true where a token (row) sees another (column); None where all see all."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Values (B, heads, Q, d) mixed for each query, of queries, keys and values (B, heads, Q, d) of a block."""
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=self.seen)

    def pairs(self, batch: int, tokens: int, valid: Tensor | None) -> Tensor:
        """Query-key pairs of a block, a scalar; queries where `valid` (B, Q) is false count nothing."""
        if self.seen is None:
            return torch.tensor(batch * tokens * tokens)
        seen = self.seen[:, 0].expand(batch, -1, -1)
        return seen.sum() if valid is None else (seen & valid[:, :, None]).sum()

    def finish(self) -> None:
        """Called after the last block."""


@dataclass(frozen=True)
class KeysOnly(Attention):
    """The same where most rows see their own frame's latents alone: only the `queries` are compared with all keys."""

    queries: Tensor
    """(B, Q') numbers of the tokens that see more than their own frame; others may be among them."""
    frames: int
    """Frames L of the sequence."""
    latents: int
    """Tokens of a frame's latents."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """As `Attention.mix`."""
        assert self.seen is not None
        by_frame = [x.unflatten(2, (self.frames, -1)) for x in (q, k, v)]  # (B, heads, L, S, d) each
        keys, values = (x[:, :, :, : self.latents] for x in by_frame[1:])
        own = functional.scaled_dot_product_attention(by_frame[0], keys, values)
        row = self.queries[:, None, :, None]
        asked = q.gather(2, row.expand(-1, q.shape[1], -1, q.shape[3]))  # (B, heads, Q', d)
        seen = self.seen.expand(len(q), -1, -1, -1).gather(2, row.expand(-1, -1, -1, self.seen.shape[3]))
        mixed = functional.scaled_dot_product_attention(asked, k, v, attn_mask=seen)
        return own.flatten(2, 3).scatter(2, row.expand_as(mixed), mixed)


@dataclass(frozen=True)
class Cached(Attention):
    """Frames of the call see one another and those that the cache holds."""

    cache: FrameCache
    columns: Tensor
    """(B, Q): where in the cache the tokens' keys and values belong."""
    held: Tensor
    """(B, frames + 1) bool: what the cache holds after the call."""
    count: Tensor
    """(B,) frames of each clip, of the call or held before it."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """As `Attention.mix`."""
        assert self.seen is not None
        keys, values = self.cache.written(layer, k, v, self.columns)
        used = self.seen.shape[3]
        return functional.scaled_dot_product_attention(q, keys[:, :, :used], values[:, :, :used], attn_mask=self.seen)

    def finish(self) -> None:
        """As `Attention.finish`."""
        self.cache.held = self.held


class FrameCache:
    """Keys and values of a batch's frames in every block, for calls of the backbone under `torch.no_grad`.

    Each frame has a place in its clip's sequence; a call computes some of the frames, and says of each whether its keys
    and values stay.

    Args:
        frames: places of a sequence.
    """

    def __init__(self, frames: int) -> None:
        if frames < 1:
            raise ValueError(f"frames is {frames}; a cache needs a place for at least 1")
        self.frames = frames
        self.used = 0
        """Places up to the last one that a call had."""
        self.held = torch.empty(0, 0, dtype=torch.bool)
        """(B, frames + 1): which frames are held. The first column is the padding's and never held."""
        self._tokens = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def written(self, layer: int, k: Tensor, v: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a block, (B, heads, (frames + 1) * S, d) each, with those of a call put in place."""
        if layer not in self._layers:
            shape = (*k.shape[:2], self._tokens, k.shape[3])
            self._layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
        keys, values = self._layers[layer]
        at = columns[:, None, :, None].expand_as(k)
        return keys.scatter_(2, at, k), values.scatter_(2, at, v)

    def attention(self, place: Tensor, keep: Tensor, valid: Tensor | None, causal: bool, tokens: int) -> Cached:
        """The attention of a call.

        Args:
            place: (B, A) int64, the place of each frame of the call in [0, frames).
            keep: (B, A) bool, whose keys and values stay.
            valid: (B, A) bool, which frames are no padding; None where none is.
            causal: whether a frame sees only places up to its own.
            tokens: tokens S of a frame.

        Raises:
            ValueError: a place that the cache does not have.
        """
        batch = len(place)
        valid = torch.ones_like(keep) if valid is None else valid
        last = int(torch.where(valid, place, -1).max())
        if last >= self.frames or int(torch.where(valid, place, 0).min()) < 0:
            raise ValueError(f"a frame has the place {last} of a cache for {self.frames}; make it larger")
        if not self.held.numel():
            self.held = torch.zeros(batch, self.frames + 1, dtype=torch.bool, device=place.device)
        self.used, self._tokens = max(self.used, last + 1), (self.frames + 1) * tokens
        column = torch.where(valid, place + 1, 0)  # (B, A)
        here = torch.zeros_like(self.held).scatter(1, column, valid)
        seen = (self.held | here)[:, None].expand(-1, place.shape[1], -1)  # (B, A, frames + 1)
        every = torch.arange(self.frames + 1, device=place.device)
        if causal:
            seen = seen & (every <= column[:, :, None])
        seen = (seen | (every == column[:, :, None]))[:, :, : self.used + 1]
        wide = seen.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)[:, None]
        inside = torch.arange(tokens, device=place.device)
        after = self.held.scatter(1, column, keep & valid)
        after[:, 0] = False
        count = (self.held | here)[:, 1:].sum(1)
        return Cached(wide, self, (column[:, :, None] * tokens + inside).flatten(1), after, count)


def attention_mask(frames: int, tokens: int, valid: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """(B or 1, 1, L*n, L*n) bool, true where a token (row) sees another (column); None where all see all.

    frames, tokens: L frames of n tokens each. valid: (B, L) bool, or None where no frame is padding. causal: frames see
    only themselves and those before. A frame always sees itself: a row without any true entry would give NaN.
    """
    if valid is None and not causal:
        return None
    seen = frame_mask(frames, valid, causal, device)
    return seen.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)[:, None]


def frame_mask(frames: int, valid: Tensor | None, causal: bool, device: torch.device) -> Tensor:
    """(B or 1, L, L) bool: `attention_mask` of frames instead of tokens, all true where all see all."""
    seen = torch.ones(1, frames, frames, dtype=torch.bool, device=device)
    if causal:
        seen = seen.tril()
    if valid is not None:
        seen = seen & valid[:, None, :]
    return seen | torch.eye(frames, dtype=torch.bool, device=device)


def attention_of(
    frames: int,
    tokens: int,
    valid: Tensor | None,
    causal: bool,
    device: torch.device,
    finished: Tensor | None = None,
    rates: bool = False,
) -> Attention:
    """The attention of a forward pass without a cache.

    Args:
        frames, tokens, valid, causal: as for `attention_mask`.
        device: where the mask is wanted.
        finished: (B, L) bool, whose latents' tokens see one another alone.
        rates: whether a frame's last token is its rate token, which sees what an unfinished frame sees.
    """
    if finished is None:
        return Attention(attention_mask(frames, tokens, valid, causal, device))
    seen = frame_mask(frames, valid, causal, device)
    own = torch.eye(frames, dtype=torch.bool, device=device).repeat_interleave(tokens, 1)  # (L, L*S)
    if rates:
        own[:, tokens - 1 :: tokens] = False
    alone = torch.zeros(*finished.shape, tokens, dtype=torch.bool, device=device) | finished[:, :, None]  # (B, L, S)
    if rates:
        alone[:, :, -1] = False
    wide = seen.repeat_interleave(tokens, 2)  # (B or 1, L, L*S)
    mask = torch.where(alone[..., None], own[:, None], wide[:, :, None]).flatten(1, 2)[:, None]  # (B, 1, L*S, L*S)
    if torch.is_grad_enabled():
        return Attention(mask)  # the same, without waiting for the device
    asked = ~alone.flatten(1)  # (B, L*S)
    most = int(asked.sum(1).max())
    order = asked.int().argsort(dim=1, descending=True, stable=True)
    return KeysOnly(mask, order[:, :most], frames, tokens - rates)


@dataclass
class PairCount:
    """Query-key pairs of self-attention in one block, all blocks being alike, summed over calls."""

    parts: list[Tensor] = field(default_factory=list)
    """One for each call, on its device: no call waits for the count."""

    def total(self) -> int:
        """All pairs so far."""
        return sum(int(part) for part in self.parts)


class Counted(Protocol):
    """A backbone whose calls can be counted."""

    pair_count: PairCount | None
    """Where its calls count their pairs."""


@contextmanager
def count_pairs(backbone: Counted) -> Iterator[PairCount]:
    """Counts the query-key pairs that the backbone's calls inside have in one block, rate tokens among them.

    What is counted is what the masks say, padding left out: full attention over L frames of S tokens has (L*S)^2.
    """
    before, backbone.pair_count = backbone.pair_count, PairCount()
    try:
        yield backbone.pair_count
    finally:
        backbone.pair_count = before
