"""Options of `vlfm sample`: one for each field of a method's `Sampling`, and those that only some methods can use."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from model.methods.base import Method, default_sampling


class _Option(NamedTuple):
    """How a field of some method's `Sampling` is given on the command line; `--local-power` for `local_power`."""

    kind: type[Any]
    help: str
    metavar: str | None = None


FIELDS: Mapping[str, _Option] = {
    "seed": _Option(int, "seed of the noise (default 0)"),
    "steps": _Option(
        int, "solver steps on a window (default: its observed frames, at least 16), or from noise to a frame (50)"
    ),
    "guidance": _Option(float, "classifier-free guidance; 1 (default) is none"),
    "warmup_steps": _Option(int, "solver steps to the first frame (default 16)"),
    "solver": _Option(str, "ddim (default), euler, midpoint, heun, rk4 or adaptive"),
    "max_frames": _Option(int, "most frames of a video that chooses its length (default: twice the longest clip's)"),
    "length": _Option(int, "frames of a video whose length is given (default: the longest clip's)"),
    "order": _Option(str, "where frames are inserted: learned (default), random, hierarchical or left_to_right"),
    "insertion": _Option(str, "how many at once: bernoulli (default) or poisson"),
    "rate_guidance": _Option(float, "guidance of the insertion rates; 1 (default) is none, above it videos are longer"),
    "local": _Option(str, "schedule of a frame's own time: power (default) or linear_quadratic"),
    "local_power": _Option(float, "exponent of the power schedule (default 1)"),
    "long": _Option(str, "beyond the trained length: none (default), blocks or chunks"),
    "chunk": _Option(int, "frames of a block or chunk (default: the longest clip's)"),
    "overlap": _Option(int, "frames that neighbouring blocks or chunks share"),
    "finished": _Option(str, "what clean frames still do: attend, keys or cached (default: as trained)"),
    "open_end": _Option(bool, "frames may follow the last given one; else it is the video's last"),
    "cache": _Option(bool, "keep the keys and values of clean frames (--no-cache computes them again)"),
}
"""By the field's name."""
NOT_OPTIONS = ("reanchor",)
"""Fields that only experiments change."""


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser; what is not given stays None."""
    for name, option in FIELDS.items():
        flag = f"--{name.replace('_', '-')}"
        if option.kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=option.help)
        else:
            parser.add_argument(flag, type=option.kind, metavar=option.metavar, help=option.help)
    parser.add_argument(
        "--start",
        type=float,
        metavar="S",
        help="seconds into its film that the clip is to be from (default: left open)",
    )
    parser.add_argument(
        "--duration", type=float, metavar="T", help="seconds, any (default: the window the run was trained on)"
    )
    parser.add_argument(
        "--given",
        nargs="+",
        metavar="FILE",
        help="pictures that are frames of the video in order: its first, and unless --open-end its last",
    )


def chosen_sampling(method: Method, clip_format: Mapping[str, Any], options: argparse.Namespace) -> Any:
    """The method's `Sampling` as the options have it, on clips of a format (`Version.clip`).

    Raises:
        ValueError: an option that the method has no use for, or a value that cannot be; the message names it.
    """
    given = {name: getattr(options, name) for name in FIELDS if getattr(options, name) is not None}
    known = {field.name for field in dataclasses.fields(method.Sampling)}
    unused = [name for name in given if name not in known]
    unused += [name for name in _of_the_other(method.sequences) if getattr(options, name) is not None]
    if unused:
        flag = f"--{unused[0].replace('_', '-')}"
        takes = sorted(known.intersection(FIELDS) | set(_of_the_other(not method.sequences)))
        raise ValueError(
            f"{flag} has no use for a run of the method {method.name}; leave it out. It takes "
            + ", ".join(f"--{name.replace('_', '-')}" for name in takes)
        )
    return default_sampling(method, clip_format, **given)


def _of_the_other(sequences: bool) -> tuple[str, ...]:
    """Options, beside the fields, that methods of this kind have no use for."""
    return ("start", "duration") if sequences else ("given",)
