"""The command line `vlfm`. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from flows.lake import erase, gc, inspect, repair
from model.program import add_settings_option, parse_settings
from model.stop import STOPPED, Stopped, hold_signals
from storage.errors import is_expected

Run = Callable[[argparse.Namespace], int]

EPILOG = """
a first look:            vlfm demo
your own films:          vlfm ingest films/ --captions captions.csv --lake lake
                         vlfm train --lake lake --run run --recipe demo
                         vlfm sample --run run --prompt "a red ball bounces" --fps 24 --out ball.mp4
                         vlfm evaluate --run run --lake lake --out report

exit status:             0 done, 1 an error, 2 wrong usage, 3 an ingest lost more films than tolerated,
                         75 a training was asked to stop and left a checkpoint: the same command goes on,
                         130 interrupted, 143 terminated: the same command goes on
"""


INTERRUPTED = "interrupted; everything finished is kept, the same command goes on from there"


class _Terminated(BaseException):
    """SIGTERM, where nothing nearer answers it: a training leaves a checkpoint, a flow its last state."""


def _terminated(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `vlfm`; returns the exit status, as EPILOG lists them."""
    # Telemetry is off unless a person turned it on. Prefect logs to its UI; the lines here are ours.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Threads of a matrix product that wait by spinning are ten times slower where another program has a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in given if not word.startswith("-")), None)
    if name == "train" and arguments is None:
        hold_signals()  # importing torch takes seconds; a signal meanwhile waits for the trainer, which answers with 75
    options = parser(name).parse_args(given)
    if arguments is None:
        signal.signal(signal.SIGTERM, _terminated)
    try:
        return int(options.run_it(options))
    except _Terminated:
        print(f"\n{INTERRUPTED}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print(f"\n{INTERRUPTED}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("flows", "pipeline", "model", "storage"):
            raise
        print(
            f"error: this command needs {error.name}, which is not installed: pip install 'vlfm[flows]'",
            file=sys.stderr,
        )
        return 1
    except Exception as error:
        if not is_expected(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser; only the options of the `chosen` command are built, with the imports they need."""
    top = argparse.ArgumentParser(
        prog="vlfm",
        description="Video Latent Flow Matching: films to a dataset, a dataset to a model, a model to videos.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, build) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            sub.set_defaults(run_it=build(sub))
    return top


def ingest(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm ingest`."""
    add_source_options(sub)
    sub.add_argument(
        "--lake",
        required=True,
        metavar="DIR",
        help="folder of the dataset, or s3://BUCKET/PREFIX; made when it is not there",
    )
    sub.add_argument(
        "--recipe", default="demo", metavar="NAME", help="data recipe: demo (default), linear, stable_diffusion"
    )
    add_settings_option(sub, "rate=8")
    sub.add_argument("--limit", type=int, metavar="N", help="only the first N films")
    sub.add_argument("--plan", action="store_true", help="say what would be done, and do nothing")
    sub.add_argument(
        "--prune", action="store_true", help="take films out of the dataset that the sources had and have no longer"
    )
    sub.add_argument(
        "--report",
        metavar="FILE",
        help="write the report as one HTML file, with frames of what was kept and what was not",
    )
    sub.add_argument("--ray-address", metavar="A", help="an existing Ray cluster (default: start one here for the run)")
    sub.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="ask the cluster for N workers though it has no room for all yet: an autoscaler makes room",
    )
    sub.add_argument("--send-code", action="store_true", help="give the cluster's nodes this project's code from here")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")
    return run_ingest


def run_ingest(options: argparse.Namespace) -> int:
    """Run the flow `ingest`, visible in Prefect; or with --plan only say what it would do."""
    settings: dict[str, Any] = dict(parse_settings(options.settings))
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit is {options.limit}; it must be at least 1")
    if options.plan:
        return show_plan(options, settings)
    from model.settings import override
    from pipeline.recipes import recipe_named
    from pipeline.sources.folders import discover

    # Slips of the pen are told at once; the servers take a while to start.
    recipe = override(recipe_named(options.recipe), settings)
    columns = parse_columns(options.column)
    how = (recipe.captions_required, columns, options.allow_outside, options.table_format, options.latents)
    found = discover(options.source, options.captions, *how)
    from flows.progress import Stages, stdout_kept_clean

    with stdout_kept_clean():
        from flows.dataset import run_ingest as flow

        report = flow(
            options.source,
            options.lake,
            captions=options.captions,
            recipe=options.recipe,
            settings=settings,
            limit=options.limit,
            ray_address=options.ray_address,
            workers=options.workers,
            send_code=options.send_code,
            columns=columns,
            prune=options.prune,
            allow_outside=options.allow_outside,
            table_format=options.table_format,
            report_file=options.report,
            latents=options.latents,
            on_progress=Stages(),
            found=found,
        )
    if "error" in report:
        print(f"error: {report['error']}", file=sys.stderr)
    if options.json or "error" not in report:
        print(json.dumps(report) if options.json else "\n".join(report["lines"]))
    return int(report["exit_status"])


def show_plan(options: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Plan an ingest and print what it would do; a lake that is not there stays so."""
    import tempfile

    from model.settings import override
    from pipeline.ingest import plan_ingest
    from pipeline.ingest.cost import NOT_MEASURED, estimate
    from pipeline.recipes import recipe_named
    from pipeline.sources.folders import discover
    from storage.layout import Lake

    recipe = override(recipe_named(options.recipe), settings)
    columns = parse_columns(options.column)
    how = (recipe.captions_required, columns, options.allow_outside, options.table_format, options.latents)
    found = discover(options.source, options.captions, *how)
    with tempfile.TemporaryDirectory() as empty:
        lake = Lake.open(options.lake) if Lake.exists(options.lake) else Lake.create(empty)
        plan = plan_ingest(lake, found, recipe, options.limit, prune=options.prune)
        cost = estimate(plan)
        if options.json:
            counts = {"films": len(plan.films), "clips": len(plan.clips), "blocks": len(plan.blocks)}
            print(json.dumps({**counts, "cost": cost.to_json() if cost else None}))
        else:
            print("\n".join([*plan.lines(), *([cost.line() if cost else NOT_MEASURED] if plan.clips else [])]))
    return 0


def train(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm train`."""
    from model import train as program

    return program.arguments(sub)


def sample(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm sample`."""
    from model import sample as program

    return program.arguments(sub)


def interpolate(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm interpolate`."""
    from pipeline.interpolate import film as program

    return program.arguments(sub)


def evaluate(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm evaluate`."""
    from model import evaluate as program

    return program.arguments(sub)


def verify(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm verify`."""
    sub.add_argument("--lake", required=True, metavar="DIR", help="the lake: a folder, or s3://BUCKET/PREFIX")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--version", type=int, metavar="N", help="version (default: the newest)")
    which.add_argument("--all", action="store_true", help="every version")
    sub.add_argument("--json", action="store_true", help="print as JSON")
    return run_verify


def run_verify(options: argparse.Namespace) -> int:
    """Check every file, checksum and array of a version; exit status 1 where something is wrong."""
    from storage import version as versions
    from storage.layout import Lake
    from storage.verify import verify, verify_all

    lake = Lake.open(options.lake)
    if options.all:
        found = verify_all(lake)
        if options.json:
            print(json.dumps({"versions": found}))
        for number, wrong in () if options.json else found.items():
            print(f"version {number} of {lake.address} is {'damaged:' if wrong else 'whole'}")
            print("".join(f"  {problem}\n" for problem in wrong), end="")
        return 1 if any(found.values()) else 0
    version = versions.load(lake, options.version)
    problems = verify(lake, version)
    if options.json:
        print(json.dumps({"version": version.number, "problems": problems}))
    else:
        print(
            "\n".join(problems) or f"version {version.number} of {lake.address} is whole: {len(version.shards)} shards"
        )
    return 1 if problems else 0


def doctor(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm doctor`."""
    from flows import doctor as program

    return program.arguments(sub)


def experiment(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm experiment`."""
    sub.add_argument("name", nargs="?", metavar="NAME", help="the experiment; without one they are listed")
    sub.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="its options; `vlfm experiment NAME --help` lists them"
    )
    return run_experiment


EXPERIMENTS = {
    "codec": "what a codec is worth: reconstruction, inversion, noise prediction and captions",
    "combinations": "what a model of the compositional corpus makes of captions that it never saw",
    "drift": "what keeps a sample from drifting off its clip, measured on a lake's own clips",
    "first_frames": "what a network learns of captions, by first frames alone: minutes, no lake",
    "interpolation": "what `vlfm interpolate` makes of frames it has not seen",
    "modes": "whether samples have the law of the data, on toys that are drawn",
    "projection": "which order and which method of projection, on films with frames held out",
    "slopes": "how well projections know a clip's slope, at the window's ends and between",
    "text": "what text encoders know of colours, motions and other attributes of captions, on combinations held out",
    "turning": "which lengths Flowception chooses, and its orders and peers in one table, on films of 3x3 pixels",
}
"""Modules of pipeline/experiments with a `main`, and what they answer."""


def run_experiment(options: argparse.Namespace) -> int:
    """Run an experiment of pipeline/experiments with its own options, or list them all."""
    import importlib

    about = EXPERIMENTS
    if options.name is None:
        print("\n".join(f"{name:<14} {line}" for name, line in about.items()))
        return 0
    if options.name not in about:
        raise ValueError(f"experiment {options.name!r} is unknown; the experiments are: {', '.join(about)}")
    return int(importlib.import_module(f"pipeline.experiments.{options.name}").main(options.options))


def demo(sub: argparse.ArgumentParser) -> Run:
    """Options of `vlfm demo`."""
    sub.add_argument("--source", metavar="DIR", help="your own films (default: a corpus that is drawn)")
    sub.add_argument("--captions", metavar="FILE", help="table of captions with the columns file and caption")
    sub.add_argument("--out", default="demo", metavar="DIR", help="where everything is kept (default: demo)")
    sub.add_argument("--limit", type=int, metavar="N", help="only the first N films")
    sub.add_argument("--steps", type=int, metavar="N", help="optimiser steps, to train for shorter or longer")
    return run_demo


def run_demo(options: argparse.Namespace) -> int:
    """Corpus, ingest, training, samples and report, each step only where it is not done."""
    from flows.demo import demo as whole

    for name in ("limit", "steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    return whole(options.out, options.source, options.captions, options.limit, options.steps)


def add_source_options(sub: argparse.ArgumentParser) -> None:
    """Where films and captions come from."""
    sub.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="folder of films, read recursively, a bucket (s3://BUCKET/PREFIX), a WebDataset tar, or a table "
        "(CSV, JSONL, Parquet) with the columns file and caption",
    )
    sub.add_argument(
        "--captions",
        metavar="FILE",
        help="table with the columns file and caption; else captions.csv in the folder, or clip.txt beside clip.mp4",
    )
    sub.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=OWN",
        help="the tables' own name for file, caption, start or end, e.g. --column file=path; several times",
    )
    sub.add_argument(
        "--table-format",
        metavar="NAME",
        help="the table is a dataset's published annotation file: openvid, ucf101, kinetics, internvid, miradata, "
        "pixabay or youtube8m; its rows are joined with the films",
    )
    sub.add_argument(
        "--allow-outside",
        action="store_true",
        help="read films that links or '..' reach outside their source; without it they fail",
    )
    sub.add_argument(
        "--latents",
        action="store_true",
        help="the sources hold latents that you have already (.safetensors) in the place of films; they are "
        "checked and projected, and nothing is decoded or encoded",
    )


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """`name=own` texts as a dictionary. Raises ValueError for a text without `=`, and for another name."""
    from pipeline.sources.tables import COLUMNS

    for pair in pairs:
        name, found, own = pair.partition("=")
        if name not in COLUMNS or not found or not own:
            names = ", ".join(COLUMNS)
            raise ValueError(f"--column takes NAME=OWN with NAME one of {names}; it was given {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], Run]]] = {
    "ingest": ("films and captions to the next version of a dataset", ingest),
    "train": ("train a model on the shards of one version", train),
    "sample": ("make a video from a prompt, at any frame rate", sample),
    "interpolate": ("a film at any frame rate, without a model", interpolate),
    "evaluate": ("measure and show what a run has learned", evaluate),
    "inspect": ("show what a dataset holds", inspect),
    "verify": ("check every file and checksum of a dataset", verify),
    "doctor": ("what is wrong with this machine or a cluster, and how to put it right", doctor),
    "repair": ("make again what is damaged in a dataset", repair),
    "gc": ("remove what no version of a dataset needs", gc),
    "erase": ("erase a film from every version of a dataset", erase),
    "experiment": ("measure again what docs/experiments.md tells", experiment),
    "demo": ("the whole chain on generated films, or on your own, with a report", demo),
}


if __name__ == "__main__":
    sys.exit(main())
