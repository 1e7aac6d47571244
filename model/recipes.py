"""Training recipes: functions that return frozen dataclasses.

A training recipe owns the method with its options, the network and the optimiser. What the data is like (window, order,
sizes, codec, text) is read from the dataset's version and never repeated here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from model.backbones.blocks import QK_NORMS
from model.backbones.dit import ARCHITECTURES
from model.backbones.published import SIZES
from model.methods.flowception import FlowceptionOptions
from model.methods.registry import method_named
from model.methods.vlfm import VLFMOptions
from model.settings import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    SEED,
    SHARE,
    SHARE_BELOW_1,
    check_settings,
    one_of,
    recipe_named,
    recipe_names,
)

RULES = {
    **dict.fromkeys(("width", "depth", "heads", "patch", "stem_depth"), AT_LEAST_1),
    **dict.fromkeys(("batch", "steps", "accumulate"), AT_LEAST_1),
    **dict.fromkeys(("checkpoint_every", "checkpoints_kept", "log_every", "validate_every"), AT_LEAST_1),
    **dict.fromkeys(("matrix_learning_rate", "weight_decay", "learning_rate_warmup"), AT_LEAST_0),
    **dict.fromkeys(("bad_steps_allowed", "loader_workers", "spike_factor", "sample_every", "stem"), AT_LEAST_0),
    **dict.fromkeys(("learning_rate", "gradient_clip"), ABOVE_0),
    "learning_rate_decay": SHARE,
    "ema_decay": SHARE_BELOW_1,
    "precision": one_of("float32", "bfloat16", "float64"),
    "seed": SEED,
    "qk_norm": one_of(*QK_NORMS),
    "architecture": one_of(*ARCHITECTURES),
    "optimizer": one_of("adamw", "grams"),
    "sharding": one_of("none", "fsdp"),
    "learning_rate_fall": one_of("linear", "cosine"),
    "checkpoints": one_of("whole", "distributed"),
    "caption_padding": one_of("masked", "seen"),
}
"""What the fields of a training recipe may be."""


@dataclasses.dataclass(frozen=True)
class TrainRecipe:
    """Everything a training run needs besides the data."""

    name: str
    """Name of the recipe function that made it."""
    method: str = "vlfm"
    """How videos are learned: `vlfm`, `flowception`, or one for comparison, of those in docs/training.md."""
    options: Any = dataclasses.field(default_factory=VLFMOptions)
    """The method's own fields; `--set` takes them by their names, like the recipe's."""
    width: int = 384
    """Width of the backbone; a multiple of 64."""
    depth: int = 12
    """Number of transformer blocks."""
    heads: int = 6
    """Attention heads; divides the width."""
    patch: int = 2
    """Side of a square latent patch that makes one token; divides the latent's height and width."""
    qk_norm: str = "none"
    """Norm of each head's queries and keys: `none`, `rms` or `layer`."""
    architecture: str = "vlfm"
    """`vlfm`, or `dit`: norms and time embedding of the published DiT, which `--init-from` needs."""
    caption_padding: str = "masked"
    """What cross-attention makes of captions of different lengths: `masked` hides what shorter ones lack; `seen` fills
    all up to the text encoder's length with rows of zeros that it sees, as Stable Diffusion's sees its padding. Then no
    mask rules out a GPU's flash kernels, and all batches have one shape; with short captions a CPU has more to do."""
    stem: int = 0
    """Channels of convolutions before and after the transformer's blocks, a multiple of 8; 0 leaves them out."""
    stem_depth: int = 2
    """Residual blocks of these convolutions on either side."""
    activation_checkpointing: bool = False
    """Whether a block is computed again in the backward pass, which saves its memory and costs a third more work."""
    compile: bool = False
    """Whether torch compiles the blocks, once each shape: minutes at the start, then faster steps on a GPU."""
    batch: int = 64
    """Clips in one step, over all processes together."""
    accumulate: int = 1
    """Parts that each process takes its share of a step in, one after the other: less memory, the same gradients."""
    sharding: str = "none"
    """What several processes hold: `none`, each the whole state (DDP); `fsdp`, a share of it each (FSDP2)."""
    steps: int = 100_000
    """Optimiser steps of the whole run."""
    learning_rate: float = 3e-4
    """Peak learning rate of the optimiser."""
    matrix_learning_rate: float = 0.0
    """Peak learning rate of Muon for the blocks' matrices; 0 trains them with the optimiser too."""
    optimizer: str = "adamw"
    """`adamw`, or `grams`: the sign of the gradient with the size of Adam's step (arXiv 2412.17107)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices; position embeddings, biases and norms have none."""
    learning_rate_warmup: int = 200
    """Steps over which the learning rate rises from 0."""
    learning_rate_decay: float = 0.5
    """Last share of the run over which the learning rate falls to 0, in [0, 1]."""
    learning_rate_fall: str = "linear"
    """How it falls: `linear` or `cosine`; `cosine` with `learning_rate_decay=1` is the usual cosine schedule."""
    gradient_clip: float = 1.0
    """Largest global gradient norm."""
    bad_steps_allowed: int = 10
    """Steps in a row that may be skipped because loss or gradient are not finite or a spike; one more ends the run."""
    spike_factor: float = 20.0
    """A step is skipped whose gradient norm is above so many times its running mean over some 100 steps; 0: none is."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, per step; sampling uses the average."""
    precision: str = "float32"
    """Type of weights and computation: `float32`; `bfloat16` for autocast; `float64`, slow, for comparing programs. The
    stored coefficients are float16, which all of them but bfloat16 hold exactly; `float64` starts from the weights and
    draws of `float32`."""
    seed: int = 0
    """Seed of initialisation, order, noise and times."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    checkpoints: str = "whole"
    """How they are written: `whole`, by the first process while training waits; `distributed`, by each process what it
    holds, while training goes on: for large and sharded runs. Either is resumed by any number of processes."""
    checkpoints_kept: int = 2
    """Newest checkpoints that stay on disk."""
    log_every: int = 20
    """Steps between two lines of the log."""
    validate_every: int = 500
    """Steps between two losses on the validation split."""
    sample_every: int = 0
    """Steps between two sets of sample strips in TensorBoard; 0 makes none. They need the codec's weights here."""
    loader_workers: int = 0
    """Processes that read shards ahead, for each trainer process; 0 reads in the trainer."""

    def __post_init__(self) -> None:
        """Gives another method's options over to the chosen method: fields of the same name carry over.

        Raises:
            ValueError: a field that cannot be; the message has its name, its value and what it must be.
        """
        check_settings(self, RULES)
        kind = method_named(self.method).Options
        if not isinstance(self.options, kind):
            known = {field.name for field in dataclasses.fields(kind)}
            values = self.options if isinstance(self.options, Mapping) else vars(self.options)
            shared = {name: value for name, value in values.items() if name in known}
            object.__setattr__(self, "options", kind(**shared))
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} is no multiple of accumulate {self.accumulate}; change one of them")
        focus = getattr(self.options, "error_focus", 0)
        if self.accumulate > 1 and focus > 0:
            raise ValueError(
                f"accumulate is {self.accumulate} and error_focus {focus:g}, which weighs the clips of a whole batch "
                "against each other; set accumulate=1 or error_focus=0"
            )


def base() -> TrainRecipe:
    """A backbone of about 33 million parameters, for one GPU."""
    return TrainRecipe(name="base", loader_workers=4)


def demo() -> TrainRecipe:
    """A backbone that learns some fifty short clips in minutes on two CPU cores."""
    return TrainRecipe(
        name="demo",
        width=192,
        depth=6,
        heads=4,
        patch=2,
        # Few films, several windows of each: a caption alone does not say which is meant.
        options=VLFMOptions(times_per_clip=2, warmup_share=0.25, clip_start_dropout=0.2),
        batch=16,
        steps=1500,
        learning_rate=2e-3,
        learning_rate_warmup=50,
        ema_decay=0.99,
        checkpoint_every=500,
        log_every=10,
        validate_every=500,
    )


def combinations() -> TrainRecipe:
    """A small backbone for the films of pipeline.corpus.make_combinations, whose captions tell them apart.

    Little jitter: where the caption leaves the speed open, the state tells it, and must show the time that it is at.
    Small batches: within the same minutes many steps of 64 states learn what few steps of 128 do not.
    """
    return TrainRecipe(
        name="combinations",
        width=128,
        depth=3,
        heads=4,
        patch=2,
        stem=64,
        options=VLFMOptions(
            sigma_end=0.3,
            start_anywhere=0.9,
            times_per_clip=4,
            warmup_share=0.6,
            least_signal=1.1,
            state_jitter=0.05,
            clip_start_dropout=1.0,
            derivative_weight=1.0,
        ),
        batch=16,
        steps=5000,
        learning_rate=2e-3,
        learning_rate_warmup=50,
        ema_decay=0.99,
        checkpoint_every=500,
        log_every=10,
        validate_every=250,
    )


def flowception_toy() -> TrainRecipe:
    """Flowception on the corpus of pipeline.corpus.make_turning, minutes on a CPU: a frame of 3x3 pixels is one token.

    The clock is drawn early (`beta`): where all frames are there, half of an even draw, there is no length to learn.
    """
    return TrainRecipe(
        name="flowception_toy",
        method="flowception",
        width=64,
        depth=3,
        heads=4,
        patch=3,
        options=FlowceptionOptions(time_law="beta"),
        batch=16,
        steps=10000,
        learning_rate=3e-3,
        learning_rate_warmup=50,
        ema_decay=0.998,
        checkpoint_every=500,
        log_every=50,
        validate_every=1000,
    )


def flowception_demo() -> TrainRecipe:
    """Flowception on clips of the data recipe `shots` of a few dozen frames, slow on two CPU cores but possible.

    Few clips: most of what it learns is given frames and lengths.
    """
    return TrainRecipe(
        name="flowception_demo",
        method="flowception",
        width=128,
        depth=5,
        heads=4,
        patch=2,
        options=FlowceptionOptions(time_law="beta", context_first=0.3),
        batch=8,
        steps=2000,
        learning_rate=2e-3,
        learning_rate_warmup=50,
        ema_decay=0.99,
        checkpoint_every=250,
        log_every=10,
        validate_every=500,
    )


def flowception_base() -> TrainRecipe:
    """The size of arXiv 2512.11438: 38 blocks of width 1536, about 2 billion parameters, for several GPUs.

    Its optimiser, and the authors' settings for latents of 128 channels on 32 pixels: one token for each cell.
    """
    return TrainRecipe(
        name="flowception_base",
        method="flowception",
        width=1536,
        depth=38,
        heads=24,
        patch=1,
        qk_norm="rms",
        options=FlowceptionOptions(time_law="logit_normal", snr_shift=3.0, insertion_weight=0.1),
        batch=256,
        steps=200_000,
        learning_rate=1e-4,
        learning_rate_warmup=1000,
        learning_rate_decay=0.0,
        weight_decay=0.03,
        ema_decay=0.9999,
        caption_padding="seen",
        precision="bfloat16",
        sharding="fsdp",
        activation_checkpointing=True,
        checkpoint_every=2000,
        validate_every=2000,
        loader_workers=4,
    )


def tiny_cpu() -> TrainRecipe:
    """The smallest backbone that shows the whole chain at work, in about a minute on one CPU core."""
    return TrainRecipe(
        name="tiny_cpu",
        width=64,
        depth=2,
        heads=2,
        options=VLFMOptions(times_per_clip=2),
        batch=8,
        steps=300,
        learning_rate=2e-3,
        learning_rate_warmup=20,
        ema_decay=0.98,
        checkpoint_every=100,
        log_every=10,
        validate_every=100,
    )


def vlfm_s() -> TrainRecipe:
    """A backbone of DiT-S's size, about 41 million parameters with cross-attention; there `patch` is 2, 4 or 8."""
    return _of_size("vlfm_s", "S")


def vlfm_b() -> TrainRecipe:
    """A backbone of DiT-B's size, about 161 million parameters with cross-attention."""
    return _of_size("vlfm_b", "B")


def vlfm_l() -> TrainRecipe:
    """A backbone of DiT-L's size, about 563 million parameters with cross-attention."""
    return _of_size("vlfm_l", "L")


def vlfm_xl() -> TrainRecipe:
    """A backbone of DiT-XL's size, about 829 million parameters with cross-attention."""
    return _of_size("vlfm_xl", "XL")


def paper_xl() -> TrainRecipe:
    """What arXiv 2502.00500 prints: DiT-XL/2, Grams, its path with sigma_min 0.01 and alpha 10, times even over a clip.

    It prints neither batch, learning rate nor steps: those are DiT's. Its path cannot be sampled between frames, which
    docs/method.md explains: this recipe is for comparison. The mean and its derivative are predicted, and the printed
    loss of the velocity assembled from them is the `velocity` of the log.
    """
    options = VLFMOptions(
        path="paper", anchor="none", times_per_clip=1, state_jitter=0.0, caption_dropout=0.0, clip_start_dropout=1.0,
        context_dropout=1.0,
    )  # fmt: skip
    return dataclasses.replace(_of_size("paper_xl", "XL"), options=options, architecture="dit", optimizer="grams")


def _of_size(name: str, size: str) -> TrainRecipe:
    """Widths of the published DiT and its optimiser's settings (arXiv 2212.09748, section 4)."""
    width, depth, heads = SIZES[size]
    return TrainRecipe(
        name=name,
        width=width,
        depth=depth,
        heads=heads,
        patch=2,
        batch=256,
        steps=400_000,
        learning_rate=1e-4,
        learning_rate_warmup=1000,
        learning_rate_decay=0.0,
        caption_padding="seen",
        ema_decay=0.9999,
        precision="bfloat16",
        checkpoint_every=5000,
        validate_every=5000,
        loader_workers=4,
    )


def train_recipes() -> list[str]:
    """Names of the training recipes."""
    return recipe_names(sys.modules[__name__], TrainRecipe)


def train_recipe(name: str) -> TrainRecipe:
    """The training recipe called `name`, with its defaults."""
    return recipe_named(sys.modules[__name__], name, TrainRecipe)()
