"""Lengths, and one table of Flowception, its insertion orders and its peers, on films of 3x3 pixels and four lengths.

All methods learn the same clips with the same backbone and as many steps. Sampled are captions of films that nobody
trained on; the solver's steps are chosen so that each row's attention costs as many query-key pairs as Flowception's,
as far as that can be. Methods that choose no length are told the true one. Beside them stand true films.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.backbones.attention import count_pairs
from model.methods.base import Request
from model.metrics.sequences import frame_features, frechet, spread_places, video_features
from model.program import add_settings_option, parse_settings, run_program
from model.recipes import TrainRecipe, train_recipe
from model.sample import Sampler
from model.settings import override
from model.train import train
from model.training.checkpoint import Run
from model.video import from_frames, to_frames
from pipeline.corpus.turning import LENGTHS, Turning, TurningReading, make_turning, plan_turning, read_turning
from pipeline.ingest import ingest
from pipeline.recipes import turning
from storage.layout import Lake, write_atomic
from storage.version import latest

TEST_SEED = 1_000_000
"""Seed of the films whose captions are sampled; the training films' is below."""
METHODS = ("flowception", "full", "autoregressive", "vlfm")
ORDERS = ("random", "hierarchical", "left_to_right")
"""Insertion orders that are given, beside the one that is learned."""
PLACES = 4
"""Places along a film, first frame to last, at which single frames are compared with true ones."""
MORE_FOR_LENGTHS = 4
"""Films asked for to learn how long they are, for each one of the table: a mean length wants hundreds."""
MOST_STEPS = 400
"""Most solver steps that a row gets to spend as much as Flowception."""
Video = tuple[Turning, Tensor]
"""A film that was asked for, and latents (N, C, h, w) that were made."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    steps: int
    """Solver steps; 0 for true films."""
    calls: int
    """Calls of the network for one batch of all films."""
    pairs: float
    """Query-key pairs of one block's self-attention, for one film."""
    within_one: float
    """Share of the films at most one frame off; of methods that are told the length, 1."""
    turns: float
    """Median difference from the caption's number of turns."""
    one_jump: float
    """Share of the films whose centre jumps once."""
    frechet: float
    """Of codec features, to true films."""
    drift: tuple[float, ...]
    """Frechet distance of single frames at PLACES places, to true films' there."""


def run_of(out: Path, method: str, lake: Path, recipe: TrainRecipe, settings: Mapping[str, Any]) -> Path:
    """A finished training run of a method, in a folder of its name."""
    chosen = override(recipe, {**settings, "method": method})
    train(lake, out / method, chosen)
    return out / method


def corpus(out: Path, films: int, seed: int) -> Path:
    """The lake of the corpus, made where it is not there."""
    lake = out / "lake"
    if not lake.is_dir() or latest(Lake.open(lake)) is None:
        make_turning(out / "films", seed=seed, films=films)
        ingest(out / "films", lake, recipe=turning())
    return lake


def lengths(sampler: Sampler, samples: int, settings: Any, trained: Sequence[Turning]) -> dict[str, Any]:
    """How long samples are, whose captions tell the length and do not; beside the corpus's films of the same kind.

    trained: the films of the corpus. Its captions leave the length out at random, so theirs are no even quarters.
    """
    found: dict[str, Any] = {}
    for name, told in (("told", 1.0), ("untold", 0.0)):
        films = plan_turning(TEST_SEED, samples, told)
        made = [len(latents) for _, latents in sample(sampler, films, settings)[0]]
        true = [film.frames for film in films]
        found[name] = {
            "samples": len(made),
            "within_one": share(abs(n - film.frames) <= 1 for n, film in zip(made, films, strict=True)),
            "mean": statistics.fmean(made),
            "true_mean": statistics.fmean(true),
            "trained_mean": statistics.fmean([film.frames for film in trained if film.told == told] or [math.nan]),
            "standard_error": statistics.stdev(made) / math.sqrt(len(made)),
            "deviation": statistics.pstdev(made),
            "true_deviation": statistics.pstdev(true),
            "on_a_peak": share(n in LENGTHS for n in made),
            "near_a_peak": {length: share(abs(n - length) <= 1 for n in made) for length in LENGTHS},
            "histogram": dict(sorted(Counter(made).items())),
        }
    return found


def sample(sampler: Sampler, films: Sequence[Turning], settings: Any) -> tuple[list[Video], int, int]:
    """A video of each film's caption, network calls, and query-key pairs; films of a length together, where it is told.

    A method that chooses no length is told each film's: as `length`, or as the clip's duration.
    """
    groups: list[list[Turning]] = [list(films)]
    kind = sampler.method.Sampling
    fields = {field.name for field in dataclasses.fields(kind)}
    by_length = not sampler.method.sequences or ("length" in fields and getattr(settings, "order", "") != "learned")
    if by_length:
        groups = [[film for film in films if film.frames == length] for length in LENGTHS]
    made: list[Video] = []
    calls = 0
    with count_pairs(sampler.backbone) as pairs:
        for group in filter(None, groups):
            seeds = [settings.seed + films.index(film) for film in group]
            if sampler.method.sequences:
                chosen = dataclasses.replace(settings, length=group[0].frames) if by_length else settings
                result: Any = sampler.sample([film.caption for film in group], None, seeds, chosen)
                clips = [latents.float().cpu() for latents in result.clips]
            else:
                result, clips = _curves(sampler, group, seeds, settings)
            calls += result.network_calls
            made += zip(group, clips, strict=True)
    return made, calls, pairs.total()


def _curves(
    sampler: Sampler, films: Sequence[Turning], seeds: Sequence[int], settings: Any
) -> tuple[Any, list[Tensor]]:
    """Videos of films of one length, read at their frames' times, by a method whose clips are curves."""
    frames = films[0].frames
    told = sampler.conditioning([film.caption for film in films], None)
    duration = math.log(frames / float(sampler.clip["rate"]))
    told = dataclasses.replace(told, log_duration=torch.full_like(told.log_duration, duration))
    result = sampler.method.sample(
        sampler.backbone, Request(told, tuple(seeds), tuple(sampler.clip["latent_shape"]), settings)
    )
    latents = result.read(torch.arange(frames, dtype=torch.float64) / frames)  # (N, B, C, h, w)
    return result, [latents[:, k].float().cpu() for k in range(len(films))]


def true_videos(films: Sequence[Turning]) -> list[Video]:
    """The films themselves; the codec of this corpus is the identity."""
    return [(film, from_frames(film.draw())) for film in films]


def row(name: str, videos: Sequence[Video], true: Sequence[Video], steps: int, calls: int, pairs: int) -> Row:
    """The table's line for videos that were asked for, beside other true films."""
    readings: list[tuple[Turning, TurningReading]] = [
        (film, read_turning(to_frames(latents))) for film, latents in videos
    ]
    rows, true_rows = (torch.stack([video_features(v) for _, v in some]) for some in (videos, true))
    frames, true_frames = (
        torch.stack([frame_features(v[torch.from_numpy(spread_places(len(v), PLACES))]) for _, v in some])
        for some in (videos, true)
    )
    turns = [abs(read.turns - film.turns) for film, read in readings]
    return Row(
        name=name,
        steps=steps,
        calls=calls,
        pairs=pairs / len(videos),
        within_one=share(abs(read.frames - film.frames) <= 1 for film, read in readings),
        turns=statistics.median(value if math.isfinite(value) else math.inf for value in turns),
        one_jump=share(read.jumps == 1 for _, read in readings),
        frechet=frechet(rows, true_rows),
        drift=tuple(frechet(frames[:, k], true_frames[:, k]) for k in range(PLACES)),
    )


def looked_up(asked: Sequence[Turning], trained: Sequence[Turning]) -> list[Video]:
    """For each film that is asked for the training film whose caption has most in common with its own, no network."""

    def alike(film: Turning, other: Turning) -> int:
        told = film.told == other.told and film.frames == other.frames
        return told + (film.turns == other.turns) + (film.first == other.first) + (film.second == other.second)

    chosen = [max(trained, key=partial(alike, film)) for film in asked]
    return [(film, from_frames(other.draw())) for film, other in zip(asked, chosen, strict=True)]


def compare(samplers: Mapping[str, Sampler], films: int, steps: int, trained: Sequence[Turning]) -> list[Row]:
    """The table: every method and insertion order on the same captions, beside true films and a look-up."""
    asked = plan_turning(TEST_SEED, films, told=1.0)
    true = true_videos(plan_turning(TEST_SEED + 1, 4 * films, told=1.0))
    rows = [row("true films (floor)", true_videos(asked), true, 0, 0, 0)]
    rows.append(row("look-up of a training film by its caption", looked_up(asked, trained), true, 0, 0, 0))
    budget = 0.0
    for method, sampler in samplers.items():
        kind = sampler.method.Sampling
        names = {field.name for field in dataclasses.fields(kind)}
        tries = [(f"{method}, {order}", {"order": order}) for order in ("learned", *ORDERS)]
        for name, changes in tries if "order" in names else [(method, {})]:
            settings = kind(**changes, steps=steps)
            made, calls, pairs = sample(sampler, asked, settings)
            if not budget:
                budget = pairs
            elif not changes and pairs:
                enough = min(MOST_STEPS, max(1, round(steps * budget / pairs)))
                if enough != steps:
                    settings = kind(steps=enough)
                    made, calls, pairs = sample(sampler, asked, settings)
            rows.append(row(name, made, true, settings.steps, calls, pairs))
            print(cells(rows[-1]), file=sys.stderr, flush=True)
    return rows


def experiment(
    out: Path,
    methods: Sequence[str] = METHODS,
    films: int = 512,
    samples: int = 128,
    steps: int = 50,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that the experiment measures, ready for JSON; also written to turning.json, part by part.

    films, seed: of the training corpus. samples: films asked for in each row of the table, a quarter of those whose
    lengths are measured. steps: Flowception's solver steps.
    settings: of the training recipe `flowception_toy`, for all methods.
    """
    out.mkdir(parents=True, exist_ok=True)
    lake = corpus(out, films, seed)
    recipe, found = train_recipe("flowception_toy"), {}
    samplers: dict[str, Sampler] = {}
    for method in methods:
        begin = time.process_time()
        run = run_of(out, method, lake, recipe, settings or {})
        seconds = time.process_time() - begin
        samplers[method] = Sampler(run, device=None)
        parameters = sum(value.numel() for value in samplers[method].backbone.parameters())
        found[method] = {
            "steps": Run(run).steps()[-1],
            "parameters": parameters,
            "cpu_seconds_of_this_call": round(seconds, 1),
        }
    results: dict[str, Any] = {"films": films, "samples": samples, "runs": found}
    trained = plan_turning(seed, films)
    for method, sampler in samplers.items():
        if getattr(sampler.method, "rates", False):
            kind = sampler.method.Sampling
            asked = MORE_FOR_LENGTHS * samples
            results[f"lengths of {method}"] = lengths(sampler, asked, kind(steps=steps), trained)
            write_atomic(out / "turning.json", json.dumps(results, indent=1).encode())
    results["rows"] = [dataclasses.asdict(each) for each in compare(samplers, samples, steps, trained)]
    write_atomic(out / "turning.json", json.dumps(results, indent=1).encode())
    return results


def share(which: Any) -> float:
    """Share of true values."""
    values = [bool(value) for value in which]
    return sum(values) / len(values)


def percent(value: float, of: float) -> str:
    """How much more a value is than another one."""
    return f"{100 * (value / of - 1):+.1f} %"


def cells(one: Row) -> str:
    """A line of the table as text."""
    drift = " / ".join(f"{value:.2f}" for value in one.drift)
    costs = f"{one.steps} | {one.calls} | {one.pairs / 1e6:.2f}" if one.steps else "– | – | –"
    return (
        f"| {one.name} | {costs} | {100 * one.within_one:.0f} % | {one.turns:.2f} | {100 * one.one_jump:.0f} % | "
        f"{one.frechet:.2f} | {drift} |"
    )


def table(results: Mapping[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{name}: {run['steps']} steps, {run['parameters']:,} parameters" for name, run in results["runs"].items()]
    for name, found in results.items():
        if name.startswith("lengths of "):
            told, untold = found["told"], found["untold"]
            mean, films, trained = untold["mean"], untold["true_mean"], untold["trained_mean"]
            near = untold["near_a_peak"]
            lines += [
                f"{name}, length told: {100 * told['within_one']:.0f} % of {told['samples']} within one frame "
                "(always the same length: 25 %)",
                f"{name}, length not told: mean {mean:.2f}, standard error {untold['standard_error']:.2f} (films asked "
                f"for {films:.2f}: {percent(mean, films)}; the corpus's of such captions {trained:.2f}: "
                f"{percent(mean, trained)}), standard deviation "
                f"{untold['deviation']:.2f} ({untold['true_deviation']:.2f}), {100 * untold['on_a_peak']:.0f} % on "
                f"{', '.join(map(str, LENGTHS))}",
                f"  within one frame of {', '.join(f'{n}: {100 * part:.0f} %' for n, part in near.items())}; histogram "
                f"{untold['histogram']}",
            ]
    heads = ["videos of", "steps", "calls", "10^6 pairs a film", "length within 1", "turns off by", "one jump"]
    heads += ["Fréchet", f"frames' distance at {PLACES} places"]
    rows = [cells(Row(**{**each, "drift": tuple(each["drift"])})) for each in results["rows"]]
    return "\n".join([*lines, "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *rows])


def arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Add the experiment's options to a parser; returns what runs it."""
    parser.add_argument("--out", required=True, metavar="DIR", help="where films, lake, runs and turning.json are kept")
    parser.add_argument(
        "--method", action="append", choices=METHODS, help="only this one; may be given several times (default: all)"
    )
    parser.add_argument("--films", type=int, default=512, help="training films (default 512)")
    words = "films asked for in each row (default 128); lengths take 4 times as many"
    parser.add_argument("--samples", type=int, default=128, help=words)
    parser.add_argument("--steps", type=int, default=50, help="Flowception's solver steps (default 50)")
    add_settings_option(parser, "steps=2000", "a field of the training recipe flowception_toy")
    return run_arguments


def run_arguments(options: argparse.Namespace) -> int:
    """Run the experiment as the options say."""
    if options.samples < len(LENGTHS):
        raise ValueError(f"--samples is {options.samples}; give at least {len(LENGTHS)}, one of each length")
    settings = parse_settings(options.settings)
    chosen = options.method or METHODS
    print(table(experiment(Path(options.out), chosen, options.films, options.samples, options.steps, settings)))
    return 0


def main(given: Sequence[str] | None = None) -> int:
    """Entry of `vlfm experiment turning`."""
    return run_program("vlfm experiment turning", str(__doc__).partition("\n")[0], arguments, given)


if __name__ == "__main__":
    sys.exit(main())
