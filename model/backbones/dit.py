"""The backbone: a diffusion transformer that sees noisy latents, flow time, a caption and given frames.

It predicts what a method asks for, by named heads: VLFM's are the clip's mean latents and their derivative in flow
time. Flow time has the shape (B, L), one value for each frame of a sequence; VLFM uses L = 1, methods that give every
frame its own time use more, and set `temporal`, so that frames are told apart by their place in the clip. Every block
modulates its tokens by adaLN-Zero (Peebles and Xie 2023, arXiv 2212.09748, section 3.2) and reads the caption by
cross-attention; the heads start at zero. `architecture=dit` has the published norms and time embedding, so that an
official checkpoint fits (model/backbones/published.py). With a `stem` the transformer is the middle of a U:
convolutions at the latents' own size come before and after it (model/backbones/stem.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.backbones.attention import Attention, Cached, FrameCache, PairCount, attention_of
from model.backbones.blocks import QK_NORMS, Block, RateHead
from model.backbones.conditioning import Conditioning
from model.backbones.embeddings import SinusoidalEmbedding, StepEmbedding
from model.backbones.stem import GROUPS, Stem
from model.backbones.tensors import check_tensors, read_tensors

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
"""What `save_pretrained` writes."""
ARCHITECTURES = ("vlfm", "dit")
"""`dit` has the published epsilon of the norms and the published time embedding."""
LOG_RATE = "log_rate"
"""What the logarithms of the frames' rates are called among the predictions."""


@dataclass(frozen=True)
class BackboneConfig:
    """Shape of a backbone: what the dataset's version fixes, and what the training recipe chooses."""

    channels: int
    """Channels C of the latents."""
    height: int
    """Height h of the latents."""
    width_latent: int
    """Width w of the latents."""
    text_dim: int
    """Width D of the caption's embedding."""
    width: int
    """Width of the tokens."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads."""
    patch: int
    """Side of the square of latents that makes one token."""
    outputs: tuple[str, ...] = ("mean", "derivative")
    """Names of the heads; each gives latents."""
    temporal: bool = False
    """Whether frames have a place in time (`frame_time`); a sequence of frames needs it."""
    qk_norm: str = "none"
    """Norm of each head's queries and keys: `none`, `rms` or `layer`."""
    architecture: str = "vlfm"
    """`vlfm`, or `dit`: norms and time embedding as published, which official checkpoints need."""
    rates: bool = False
    """Whether each frame has a token of its own that predicts the rate of insertions to its right (`log_rate`)."""
    frame_count: bool = False
    """Whether those tokens are told how many frames there are, which attention, a mean, is slow to learn to count."""
    stem: int = 0
    """Channels of the convolutions before and after the blocks, a multiple of 8; 0 leaves them out."""
    stem_depth: int = 2
    """Residual blocks of convolutions before the transformer, and as many after it."""
    caption_rows: int = 0
    """Rows that every caption is filled up to with zeros; cross-attention sees them all and needs no mask. 0: a caption
    has the rows that it has, and a mask hides those that others of the batch have more."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = int(name not in ("stem", "caption_rows"))
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if self.stem % GROUPS:
            raise ValueError(f"stem is {self.stem}; it must be a multiple of {GROUPS}, or 0 for none")
        if not self.outputs:
            raise ValueError("outputs is empty; a backbone needs a head")
        for name, value, known in (
            ("qk_norm", self.qk_norm, QK_NORMS),
            ("architecture", self.architecture, ARCHITECTURES),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        if self.height % self.patch or self.width_latent % self.patch:
            raise ValueError(
                f"patch {self.patch} does not divide the latents {self.height}x{self.width_latent}; "
                "choose another with --set patch=..."
            )
        if self.width % (4 * self.heads):
            raise ValueError(
                f"width {self.width} is no multiple of 4 x heads ({self.heads}); choose others with --set width=..."
            )

    @property
    def tokens(self) -> int:
        """Tokens of one frame."""
        return (self.height // self.patch) * (self.width_latent // self.patch)

    @property
    def sequence(self) -> int:
        """Tokens that a frame has in self-attention: its latents', and its rate token where there is one."""
        return self.tokens + self.rates

    @property
    def norm_epsilon(self) -> float:
        """Epsilon of the norms of tokens."""
        return 1e-6 if self.architecture == "dit" else 1e-5

    def to_json(self) -> dict[str, Any]:
        """Plain values, enough to build the backbone again."""
        return {**dataclasses.asdict(self), "outputs": list(self.outputs)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BackboneConfig:
        """The config of `to_json`. Raises TypeError for unknown fields."""
        given = dict(values)
        if "outputs" in given:
            given["outputs"] = tuple(given["outputs"])
        return cls(**given)


class Backbone(nn.Module):
    """Noisy latents (B, L, C, h, w) at flow times (B, L) to latents of that shape, by the name of each head."""

    activation_checkpointing: bool = False
    """Whether training keeps each block's input alone and computes the block again in the backward pass."""
    pair_count: PairCount | None = None
    """Where calls count their query-key pairs (`count_pairs`)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        width, pixels = config.width, (config.stem or config.channels) * config.patch**2
        self.embed_latents = nn.Linear(pixels, width)
        if not config.stem:
            self.embed_context = nn.Linear(pixels, width)
        self.position = nn.Parameter(torch.empty(config.tokens, width))
        published = config.architecture == "dit"
        self.time = StepEmbedding(width) if published else SinusoidalEmbedding(width, longest=4.0, shortest=1 / 32)
        self.duration = SinusoidalEmbedding(width, longest=16.0, shortest=0.5)
        self.clip_start = SinusoidalEmbedding(width, longest=4096.0, shortest=0.5)
        self.pooled_text = nn.Sequential(nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, width))
        self.context_flag = nn.Parameter(torch.empty(width))
        self.text = nn.Sequential(nn.LayerNorm(config.text_dim), nn.Linear(config.text_dim, width))
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.qk_norm, config.norm_epsilon) for _ in range(config.depth)
        )
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, eps=config.norm_epsilon, elementwise_affine=False)
        self.stem = Stem(config.channels, config.stem, config.stem_depth, width) if config.stem else None
        self.leave_blocks = nn.Linear(width, pixels) if config.stem else None
        for name in config.outputs:
            head = nn.Linear(config.stem, config.channels) if config.stem else nn.Linear(width, pixels)
            self.add_module(f"{name}_head", head)
        # Only where it is used: a backbone of single states has no parameter that never learns.
        self.frame_time = SinusoidalEmbedding(width, longest=64.0, shortest=1 / 16) if config.temporal else None
        self.rate_token = nn.Parameter(torch.empty(width)) if config.rates else None
        self.rate_head = RateHead(width) if config.rates else None
        counted = config.rates and config.frame_count
        self.frame_count = SinusoidalEmbedding(width, longest=2048.0, shortest=2.0) if counted else None
        self.initialise()

    def initialise(self) -> None:
        """All initialisation in one place: Xavier matrices, zero gates and heads, zero context input."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Sinusoids of unit size, not small noise: tokens that start out alike take hundreds of steps to tell apart.
        with torch.no_grad():
            self.position.copy_(position_embedding(self.config))
        nn.init.zeros_(self.context_flag)
        for layer in (self.modulation, *self.heads):
            nn.init.zeros_(layer.weight)
        if self.stem is None:
            nn.init.zeros_(self.embed_context.weight)
        else:
            self.stem.initialise()
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(block.cross.out.weight)
        if self.rate_token is not None and self.rate_head is not None:
            nn.init.normal_(self.rate_token)
            nn.init.zeros_(self.rate_head.last.weight)

    @property
    def heads(self) -> list[nn.Linear]:
        """The heads, in the order of `config.outputs`."""
        found = [self.get_submodule(f"{name}_head") for name in self.config.outputs]
        return [head for head in found if isinstance(head, nn.Linear)]

    def forward(
        self,
        latents: Tensor,
        flow_time: Tensor,
        given: Conditioning,
        frame_time: Tensor | None = None,
        valid: Tensor | None = None,
        causal: bool = False,
        finished: Tensor | None = None,
        cache: FrameCache | None = None,
        place: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What each head predicts, (B, L, C, h, w), by name; with `rates` also `log_rate`, (B, L).

        Args:
            latents: (B, L, C, h, w) noisy latents.
            flow_time: (B, L) each frame's flow time.
            given: caption, clip and given frames.
            frame_time: (B, L) seconds in the clip; needed where, and only where, the config is `temporal`.
            valid: (B, L) bool, which frames are no padding; what is predicted for padding is arbitrary, and finite.
            causal: whether a frame sees only itself and the frames before it in the sequence.
            finished: (B, L) bool, frames whose latents are keys and values for the others, but see themselves alone;
                their rate tokens see all.
            cache: keys and values of frames that are not among the L of this call; without gradients.
            place: (B, L) int64, where each frame is in its clip, and keep: (B, L) bool, whether its keys and values
                stay in the cache; both needed with, and only with, a cache.

        Raises:
            ValueError: frame times that the config does not expect, or lacks; a cache without places, or with
                `finished`.
        """
        if (frame_time is not None) != self.config.temporal:
            raise ValueError(
                f"the backbone has temporal={self.config.temporal}, frame_time is "
                f"{'missing' if frame_time is None else 'given'}; build it for the method that runs it"
            )
        batch, frames = flow_time.shape
        shown = given.context_given.to(latents.dtype)  # (B, L or 1)
        pooled = self.pooled_text(last_rows(given.text, given.text_length))  # (B or B/K, W)
        clip = self.duration(given.log_duration) + pooled.repeat_interleave(batch // len(pooled), 0)  # (B, W)
        clip = clip + self.clip_start(given.clip_start) * given.start_given[:, None]  # (B, W)
        frame = clip[:, None] + self.context_flag * shown[:, :, None]  # (B, L or 1, W)
        if self.frame_time is not None:
            assert frame_time is not None
            frame = frame + self.frame_time(frame_time)  # (B, L, W)
        condition = functional.silu(self.time(flow_time) + frame)  # (B, L, W)

        if self.stem is None:
            tokens = self.embed_latents(self.patchify(latents))  # (B, L, n, W)
            context = self.embed_context(self.patchify(given.context))  # (B, L or 1, n, W)
            tokens = tokens + self.position + context * shown[:, :, None, None]  # (B, L, n, W)
        else:
            features = self.stem.enter(latents, given.context, shown, condition)  # (B, L, S, h, w)
            tokens = self.embed_latents(self.patchify(features)) + self.position  # (B, L, n, W)

        caption, words = given.captions(self.config.caption_rows)
        text = self.text(caption)  # (B or B/K, M, W)
        attention: Attention
        size = self.config.sequence
        if cache is None:
            attention = attention_of(frames, size, valid, causal, tokens.device, finished, self.config.rates)
        elif place is None or keep is None or finished is not None:
            raise ValueError("a cache wants place and keep, and no finished: its frames are left out of the call")
        else:
            attention = cache.attention(place, keep, valid, causal, size)
        if self.rate_token is not None:
            rate_tokens = self.rate_token.to(tokens.dtype).expand(batch, 1, 1, -1)  # (B, 1, 1, W)
            if self.frame_count is not None:
                if isinstance(attention, Cached):
                    count = attention.count
                else:
                    count = torch.full_like(flow_time[:, 0], frames) if valid is None else valid.sum(1)
                rate_tokens = rate_tokens + self.frame_count(count)[:, None, None]
            tokens = torch.cat([tokens, rate_tokens.expand(-1, frames, -1, -1)], 2)  # (B, L, n + 1, W)
        if self.pair_count is not None:
            queries = None if valid is None else valid.repeat_interleave(size, 1)
            self.pair_count.parts.append(attention.pairs(batch, frames * size, queries))
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            args = (tokens, condition, text, words, attention, layer)
            # Nothing in a block is random, so there is no random state to keep.
            tokens = (  # (B, L, n, W)
                checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False) if again else block(*args)
            )

        attention.finish()

        shift, scale = self.modulation(condition)[:, :, None].chunk(2, dim=-1)  # (B, L, 1, W) each
        tokens = self.norm(tokens) * (1 + scale) + shift  # (B, L, n, W)
        of_latents = tokens[:, :, : self.config.tokens]  # (B, L, n, W)
        heads = zip(self.config.outputs, self.heads, strict=True)
        if self.stem is None:
            found = {name: self.unpatchify(head(of_latents)) for name, head in heads}
        else:
            assert self.leave_blocks is not None
            features = features + self.unpatchify(self.leave_blocks(of_latents))  # (B, L, S, h, w)
            features = self.stem.leave(features, condition).movedim(2, -1)  # (B, L, h, w, S)
            found = {name: head(features).movedim(-1, 2) for name, head in heads}
        if self.rate_head is not None:
            found[LOG_RATE] = self.rate_head(tokens[:, :, -1])
        return found

    def compile_blocks(self) -> None:
        """Have torch compile each block; they are alike, so that one compilation serves all of a shape.

        In place: names and values of the weights stay, also when blocks are sharded or checkpointed afterwards.
        """
        for block in self.blocks:
            block.compile()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config and weights into a folder, as `config.json` and `model.safetensors`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
        (path / CONFIG_FILE).write_text(json.dumps(self.config.to_json(), indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Backbone:
        """The backbone of `save_pretrained`, in evaluation mode.

        Raises:
            FileNotFoundError, ValueError: a file is missing, damaged or of another backbone; the message names it.
        """
        path = Path(folder) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; give a folder that Backbone.save_pretrained wrote")
        try:
            config = BackboneConfig.from_json(json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} describes no backbone ({error}); write it again with save_pretrained") from None
        backbone = cls(config)
        tensors = read_tensors(Path(folder) / WEIGHTS_FILE)
        check_tensors(backbone.state_dict(), tensors, str(Path(folder) / WEIGHTS_FILE))
        backbone.load_state_dict(tensors)
        return backbone.eval()

    def patchify(self, latents: Tensor) -> Tensor:
        """(B, L, C, h, w) to (B, L, n, C*p*p)."""
        batch, frames, channels, height, width = latents.shape  # C: the latents' channels, or the stem's
        p = self.config.patch
        cut = latents.reshape(batch, frames, channels, height // p, p, width // p, p)
        return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, frames, self.config.tokens, channels * p * p)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, L, n, C*p*p) to (B, L, C, h, w)."""
        c, p = self.config, self.config.patch
        batch, frames = patches.shape[:2]
        cut = patches.reshape(batch, frames, c.height // p, c.width_latent // p, -1, p, p)
        return cut.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, frames, -1, c.height, c.width_latent)


def position_embedding(config: BackboneConfig) -> Tensor:
    """(tokens, width): sines and cosines of each token's row and column, from the widest wave to the finest."""
    rows, columns = config.height // config.patch, config.width_latent // config.patch
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    finest, widest = math.pi, math.pi / (2 * max(rows, columns))
    # The device is named: after transformers has loaded a model, `with torch.device(...)` passes linspace by.
    rates = torch.exp(torch.linspace(math.log(widest), math.log(finest), config.width // 4, device=y.device))
    angles = [place.reshape(-1, 1) * rates for place in (y, x)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def last_rows(text: Tensor, length: Tensor) -> Tensor:
    """The pooled embedding (B, D): the last valid row of each caption (B, M, D)."""
    return text[torch.arange(text.shape[0], device=text.device), length - 1]
