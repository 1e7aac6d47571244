"""What text encoders know: how far one attribute moves a caption, what linear probes read, whether clips find captions.

The captions are those of the compositional corpus (`pipeline.corpus.grammar`). An embedding is a caption's pooled row,
the one that the backbone is conditioned with. All figures are of combinations that training left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.program import run_program
from model.progress import Progress
from model.text.contrast import ClipTower, contrast_loss
from model.text.encoder import TextEncoder, builtin_text_encoder, pretrained_text_encoder
from model.text_train import Paths, read_paths
from pipeline.corpus.grammar import DIRECTIONS, Attributes, combinations

ATTRIBUTES = tuple(field.name for field in dataclasses.fields(Attributes))
SHIPPED = "vlfm-text"
"""The text encoder that comes with this package."""
CAPTIONS = 600
"""Captions of training, and as many held-out ones, that linear probes are fitted on and judged on."""
SWAPS = 100
"""Captions in which an attribute is swapped, for each attribute."""
RIDGE = 1e-3
"""Weight of the ridge, in mean variances of the embeddings."""
CHOICES = 20
"""Captions that a clip chooses from."""
TIMES, GRID, TOWER, DIM = 6, 16, 64, 128
"""The tower of the retrieval, see `model.text.contrast.ClipTower`."""
STEPS, BATCH, NOISE = 400, 64, 0.3
"""Its training."""


def pooled(encoder: TextEncoder, captions: Sequence[str]) -> Tensor:
    """The pooled rows (N, D) of captions."""
    rows, lengths = encoder.encode(captions)
    return rows[torch.arange(len(rows)), lengths - 1]


def swapped(one: Attributes, attribute: str, random: np.random.Generator) -> Attributes:
    """The combination with another value of one attribute; another motion has a direction of its own."""
    others = sorted({getattr(other, attribute) for other in combinations()} - {getattr(one, attribute)})
    if attribute == "motion":
        motion = str(random.choice(others))
        return dataclasses.replace(one, motion=motion, direction=str(random.choice(DIRECTIONS[motion])))
    if attribute == "direction":
        others = sorted(set(DIRECTIONS[one.motion]) - {one.direction})
    return dataclasses.replace(one, **{attribute: str(random.choice(others))})


def swap_cosines(encoder: TextEncoder, seed: int = 0, count: int = SWAPS) -> dict[str, Tensor]:
    """Cosines (count,) of the pooled rows of captions that differ in one attribute, by attribute."""
    found = {}
    everything = combinations()
    for number, attribute in enumerate(ATTRIBUTES):
        random = np.random.default_rng([seed, number])
        chosen = [everything[index] for index in random.choice(len(everything), count, replace=False)]
        others = [swapped(one, attribute, random) for one in chosen]
        rows = pooled(encoder, [one.caption for one in chosen + others])
        found[attribute] = functional.cosine_similarity(rows[:count], rows[count:])
    return found


def probe_accuracy(encoder: TextEncoder, seed: int = 0, count: int = CAPTIONS) -> dict[str, float]:
    """Share of held-out combinations whose attribute a linear map reads from the pooled row, by attribute.

    The map is the ridge regression of each value's indicator, fitted on combinations of training; the largest counts.
    """
    known, unknown = _chosen(seed, count)
    rows = pooled(encoder, [one.caption for one in known + unknown]).double()
    rows = torch.cat([rows - rows[: len(known)].mean(0), torch.ones(len(rows), 1)], 1)
    fit, judged = rows[: len(known)], rows[len(known) :]
    square = fit.T @ fit
    square = square + RIDGE * square.diagonal()[:-1].mean() * torch.eye(len(square))
    accuracy = {}
    for attribute in ATTRIBUTES:
        values = sorted({getattr(one, attribute) for one in known})
        truth = torch.tensor([values.index(getattr(one, attribute)) for one in known])
        weights = torch.linalg.solve(square, fit.T @ functional.one_hot(truth, len(values)).double())
        said = (judged @ weights).argmax(1).tolist()
        right = [values[place] == getattr(one, attribute) for place, one in zip(said, unknown, strict=True)]
        accuracy[attribute] = sum(right) / len(right)
    return accuracy


def additive_share(encoder: TextEncoder, seed: int = 0, count: int = CAPTIONS) -> float:
    """Share of the pooled rows' variance over held-out combinations that a sum of one vector per value explains.

    The vectors are fitted on combinations of training (least squares), so 1 means that what was learned of a value
    holds in every combination; 0 or less, that an unseen combination is a guess.
    """
    known, unknown = _chosen(seed, count)
    rows = pooled(encoder, [one.caption for one in known + unknown]).double()
    values = sorted({(name, getattr(one, name)) for one in known for name in ATTRIBUTES})
    said = torch.tensor([[float(getattr(one, name) == value) for name, value in values] for one in known + unknown])
    weights = torch.linalg.pinv(said[: len(known)].double()) @ rows[: len(known)]
    judged = rows[len(known) :]
    error = (judged - said[len(known) :].double() @ weights).square().sum()
    return 1 - float(error / (judged - judged.mean(0)).square().sum())


def _chosen(seed: int, count: int) -> tuple[list[Attributes], list[Attributes]]:
    """Random combinations of training, and held-out ones."""
    random = np.random.default_rng([seed, 100])
    known, unknown = (
        [found[index] for index in random.choice(len(found), min(count, len(found)), replace=False)]
        for found in (combinations(False), combinations(True))
    )
    return known, unknown


class Matcher(nn.Module):
    """A tower for clips and a linear map for the embeddings of an encoder that stays as it is."""

    def __init__(self, channels: int, rows: Tensor) -> None:
        super().__init__()
        self.tower = ClipTower(TIMES, channels, GRID, TOWER, DIM)
        self.text = nn.Linear(rows.shape[1], DIM)
        deviation, self.mean = torch.std_mean(rows, 0)
        self.deviation = deviation + 1e-3 * deviation.mean()

    def captions(self, rows: Tensor) -> Tensor:
        """Pooled rows (N, D) to vectors (N, DIM)."""
        vectors: Tensor = self.text((rows - self.mean) / self.deviation)
        return vectors


def retrieval(encoder: TextEncoder, known: Sequence[Paths], unknown: Paths, seed: int = 0, steps: int = STEPS) -> float:
    """Share of unknown clips that find their own caption among CHOICES different ones of unknown clips.

    A tower and a linear map of the pooled rows are trained alike for every encoder, which itself stays as it is.
    """
    captions = sorted({caption for lake in known for caption in lake.captions})
    rows = pooled(encoder, captions)
    numbers = {caption: number for number, caption in enumerate(captions)}
    which = torch.tensor([numbers[caption] for lake in known for caption in lake.captions])
    paths = torch.cat([lake.paths for lake in known])
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        matcher = Matcher(paths.shape[2], rows)
    optimizer = torch.optim.AdamW(matcher.parameters(), lr=1e-3, weight_decay=1e-2)
    progress = Progress(f"retrieval {encoder.id.partition('@')[0]}", steps, "steps", every=100)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        chosen = torch.randint(len(paths), (BATCH,), generator=generator)
        noise = NOISE * torch.randn(BATCH, *paths.shape[1:], generator=generator)
        texts = matcher.captions(rows[which[chosen]])
        loss: Any = contrast_loss(matcher.tower(paths[chosen].float() + noise), texts, which[chosen], 15.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.advance()
    return found_share(matcher, encoder, unknown, seed)


@torch.no_grad()
def found_share(matcher: Matcher, encoder: TextEncoder, unknown: Paths, seed: int) -> float:
    """Share of the unknown clips whose own caption is the nearest of CHOICES."""
    distinct = sorted(set(unknown.captions))
    if len(distinct) < CHOICES:
        raise ValueError(f"the held-out lake has {len(distinct)} different captions; retrieval needs {CHOICES}")
    texts = functional.normalize(matcher.captions(pooled(encoder, distinct)), dim=-1)
    clips = functional.normalize(matcher.tower(unknown.paths.float()), dim=-1)
    likeness = clips @ texts.T
    random, right = np.random.default_rng([seed, 200]), 0
    for row, caption in zip(likeness, unknown.captions, strict=True):
        own = distinct.index(caption)
        others = random.choice([k for k in range(len(distinct)) if k != own], CHOICES - 1, replace=False)
        right += bool(row[own] > row[torch.from_numpy(others)].max())
    return right / len(unknown.captions)


def figures(encoder: TextEncoder, seed: int = 0, swaps: int = SWAPS, count: int = CAPTIONS) -> dict[str, Any]:
    """The figures that need no clips: `cosine_mean`, `cosine_max` and `probe` by attribute, and `additive`."""
    cosines = swap_cosines(encoder, seed, swaps)
    return {
        "cosine_mean": {name: float(values.mean()) for name, values in cosines.items()},
        "cosine_max": {name: float(values.max()) for name, values in cosines.items()},
        "probe": probe_accuracy(encoder, seed, count),
        "additive": additive_share(encoder, seed, count),
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of encoders, by name, side by side in Markdown."""
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (1 + len(rows)) + "|"]
    for attribute in ATTRIBUTES:
        cells = [f"{row['cosine_mean'][attribute]:.3f} ({row['cosine_max'][attribute]:.3f})" for row in rows.values()]
        lines.append(f"| cosine, other {attribute}: mean (max) | " + " | ".join(cells) + " |")
    for attribute in ATTRIBUTES:
        cells = [f"{100 * row['probe'][attribute]:.0f} %" for row in rows.values()]
        lines.append(f"| linear probe, {attribute} | " + " | ".join(cells) + " |")
    lines.append(
        "| additive share of the variance | " + " | ".join(f"{row['additive']:.2f}" for row in rows.values()) + " |"
    )
    if all("retrieval" in row for row in rows.values()):
        cells = [f"{100 * row['retrieval']:.0f} %" for row in rows.values()]
        lines.append(f"| clips that find their caption among {CHOICES} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the experiment's options to a parser; returns what runs them."""
    parser.add_argument(
        "encoder", nargs="*", metavar="ENCODER",
        help="folders, hub ids or shipped names of text encoders (default: vlfm-text); the controls `builtin` and "
        "`vlfm-small` come first",
    )  # fmt: skip
    parser.add_argument("--lake", action="append", default=[], metavar="DIR", help="clips to train the retrieval on")
    parser.add_argument(
        "--held-out", metavar="DIR", help="clips of combinations held out, which retrieval is judged on"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the captions and towers (default 0)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Measure the encoders and print their table; without lakes there is no retrieval."""
    if bool(options.lake) != bool(options.held_out):
        raise ValueError("retrieval needs both --lake and --held-out; give both or neither")
    encoders = {"builtin": builtin_text_encoder()}
    for source in ("vlfm-small", *(options.encoder or [SHIPPED])):
        encoders[source] = pretrained_text_encoder(source)
    rows = {name: figures(encoder, options.seed) for name, encoder in encoders.items()}
    if options.lake:
        known = [read_paths(lake, TIMES, GRID) for lake in options.lake]
        unknown = read_paths(options.held_out, TIMES, GRID)
        for name, encoder in encoders.items():
            rows[name]["retrieval"] = retrieval(encoder, known, unknown, options.seed)
    print(json.dumps(rows) if options.json else table(rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `vlfm experiment text`."""
    return run_program("vlfm experiment text", str(__doc__).partition("\n")[0], arguments, argv)
