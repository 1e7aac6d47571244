"""What a film of the compositional corpus shows, in attributes and in words, and which combinations are held out.

Seven attributes, each a word or two of the caption: "a large red ring slides slowly to the left on a dark blue
background". A caption and one frame determine the motion wherever the caption names the speed; the start place and the
lane (the coordinate across the motion) are always left open, the speed in a third of the captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

OBJECTS = ("ring", "cross", "wide bar", "tall bar")
COLOURS = {
    "white": (245, 245, 245),
    "yellow": (250, 220, 40),
    "red": (245, 45, 40),
    "green": (40, 230, 40),
    "blue": (70, 110, 255),
}
"""Of objects: name to red, green and blue, 0 to 255."""
BACKGROUNDS = {
    "black": (10, 10, 14),
    "dark blue": (20, 24, 120),
    "dark green": (8, 76, 34),
    "dark red": (100, 10, 22),
}
SIZES = {"small": 0.32, "large": 0.5}
"""Length of an object from end to end, in picture widths."""
DIRECTIONS = {
    "slides": ("to the left", "to the right", "upwards", "downwards"),
    "circles": ("clockwise", "anticlockwise"),
}
"""Motion to its directions. What slides leaves the picture at one border and returns at the opposite one."""
SPEEDS = {"slowly": 0.2, "quickly": 0.4}
"""Adverb to picture widths per second, along the path."""
OPEN_SPEED = ""
"""The value of `speed` of a caption that names none."""
OPEN_SPEEDS = (0.18, 0.45)
"""The range, in picture widths per second, that an open speed is drawn from evenly."""

HELD_OUT = (
    {"colour": "red", "object": "ring"},
    {"colour": "yellow", "object": "cross"},
    {"object": "wide bar", "direction": "to the left"},
    {"object": "tall bar", "direction": "clockwise"},
)
"""Pairs of values that no training film has together: 528 of the 2880 combinations. Each value occurs in training."""


@dataclass(frozen=True, order=True)
class Attributes:
    """What a caption says of a film, each value one of the tables above."""

    size: str
    colour: str
    object: str
    motion: str
    direction: str
    speed: str
    background: str

    @property
    def caption(self) -> str:
        """The caption, 10 to 15 words without a full stop."""
        adverb = f" {self.speed}" if self.speed else ""
        what = f"a {self.size} {self.colour} {self.object}"
        return f"{what} {self.motion}{adverb} {self.direction} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether the combination is kept from training: it has both values of one of the pairs in HELD_OUT."""
        return any(all(getattr(self, name) == value for name, value in pair.items()) for pair in HELD_OUT)


def combinations(held_out: bool | None = None) -> list[Attributes]:
    """All combinations in a fixed order; only those held out, or only the others, where `held_out` says so."""
    found = [
        Attributes(size, colour, shape, motion, direction, speed, background)
        for size, colour, shape, background in product(SIZES, COLOURS, OBJECTS, BACKGROUNDS)
        for motion, directions in DIRECTIONS.items()
        for direction, speed in product(directions, (*SPEEDS, OPEN_SPEED))
    ]
    return [one for one in found if held_out is None or one.held_out == held_out]


def attributes_of(caption: str) -> Attributes:
    """The attributes that a caption of this grammar names. Raises ValueError for any other text."""
    if caption not in _by_caption():
        raise ValueError(f"{caption!r} is no caption of the compositional corpus, as {next(iter(_by_caption()))!r} is")
    return _by_caption()[caption]


@cache
def _by_caption() -> dict[str, Attributes]:
    return {one.caption: one for one in combinations()}
