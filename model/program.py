"""A program of this package on the command line: parse, run, and answer what went wrong in one line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence

from model.logs import start_logging
from model.stop import STOPPED, Stopped
from storage.errors import is_expected

Options = Callable[[argparse.ArgumentParser], Callable[[argparse.Namespace], int]]
"""Adds a program's options to a parser and returns what runs them."""


def add_settings_option(parser: argparse.ArgumentParser, example: str, what: str = "a field of the recipe") -> None:
    """Add `--set key=value` to a parser, which `parse_settings` and model.recipes.override take from there."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="settings",
        help=f"override {what}, e.g. --set {example}; may be given several times",
    )


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """`key=value` texts as a dictionary.

    Raises:
        ValueError: a text without `=`.
    """
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set takes key=value; it was given {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)


def take_from_environment(parser: argparse.ArgumentParser, environment: Mapping[str, str] | None = None) -> None:
    """Options that are not given come from variables: `--copy-to` from VLFM_COPY_TO, `--set` from VLFM_SET.

    A switch is on where its variable is 1, true or yes; several values of one option are separated by spaces, as in a
    shell; those of the command line come after them. An empty variable is none.
    """
    given = os.environ if environment is None else environment
    for action in parser._actions:  # argparse has no other list of them
        names = [word.removeprefix("--") for word in action.option_strings if word.startswith("--")]
        texts = [given.get(f"VLFM_{name.replace('-', '_').upper()}", "") for name in names if name != "help"]
        text = next(filter(None, texts), "")
        if not text:
            continue
        action.required = False
        if action.nargs == 0:
            action.default = text.lower() in ("1", "true", "yes")
        elif isinstance(action.default, list):
            action.default = shlex.split(text)
        else:
            action.default = text  # argparse converts a default that is text


def run_program(name: str, description: str, options: Options, given: Sequence[str] | None = None) -> int:
    """Parses `given` (None: the command line) and runs it.

    Returns:
        The exit status: 1 with one line for an expected error, 75 for a training that stopped with a checkpoint.
    """
    parser = argparse.ArgumentParser(prog=name, description=description)
    run_it = options(parser)
    start_logging()
    parsed = parser.parse_args(given)
    try:
        return run_it(parsed)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_expected(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
