"""What the films of the generated corpus show: eight kinds of motion, four variants each, as formulas for `geq`.

Big shapes with soft edges and strong contrast, that move far in two seconds but little in an eighth of one: a small
model can learn such films in minutes, holding the first frame fails on them, and interpolating eight frames to the
second does not. U and V run from -1 to 1 over the central square of the picture, T is the time in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EDGE = 14.0  # steepness of a soft edge: it goes from 10 to 90 % within 4.4 / EDGE of half the picture

BRIGHT = {
    "white": (245, 245, 245),
    "yellow": (250, 225, 40),
    "orange": (255, 150, 20),
    "pink": (255, 140, 200),
    "sky blue": (110, 210, 255),
    "light green": (140, 245, 110),
}
DARK = {
    "black": (10, 10, 14),
    "dark blue": (14, 24, 110),
    "dark green": (8, 66, 30),
    "dark red": (110, 10, 20),
    "purple": (70, 12, 100),
    "brown": (72, 40, 12),
}


@dataclass(frozen=True)
class Scene:
    """What a film shows. `channels` are `geq` formulas for red, green and blue (0 to 255) in X, Y, T (seconds)."""

    motion: str
    caption: str
    channels: tuple[str, str, str]


# --- formulas -------------------------------------------------------------------------------------------------------
# U and V run from -1 to 1 over the central square of the picture; they are replaced by formulas in X and Y at the end.


def _soft(distance: str, edge: float = EDGE) -> str:
    """1 where `distance` is below 0, 0 above, a logistic edge between."""
    return f"(1/(1+exp({edge}*({distance}))))"


def _disc(x: str, y: str, radius: str, edge: float = EDGE) -> str:
    return _soft(f"hypot(U-({x}),V-({y}))-({radius})", edge)


def _square(x: str, y: str, half: str, edge: float = EDGE) -> str:
    """A product of edges, not a maximum of distances: its corners are round and stay so when it is small."""
    return f"({_soft(f'abs(U-({x}))-({half})', edge)}*{_soft(f'abs(V-({y}))-({half})', edge)})"


def _wave(period: float) -> str:
    """A cosine of the period given that begins shortly after its top, so that the first frames move already."""
    return f"cos(2*PI*(T/{period}+0.07))"


def _paint(ground: Sequence[object], *layers: tuple[str, Sequence[object]]) -> tuple[str, str, str]:
    """Lays colours (numbers or formulas) over the ground, each through its mask (0 to 1)."""
    channels = []
    for channel in range(3):
        formula = f"{ground[channel]}"
        for mask, colour in layers:
            formula = f"lerp({formula},{colour[channel]},{mask})"
        channels.append(formula)
    return channels[0], channels[1], channels[2]


def _a(noun: str) -> str:
    return f"{'An' if noun[0] in 'aeiou' else 'A'} {noun}"


def _blend(first: Sequence[int], second: Sequence[int], weight: str) -> tuple[str, str, str]:
    """From the first colour to the second as `weight` goes from 0 to 1."""
    return _paint(first, (weight, second))


# --- scenes: one function a motion, four variants each ---------------------------------------------------------------
# `swing` is the period of a to-and-fro in seconds: 4 for a short film, which so shows one way of it in two seconds.


@dataclass(frozen=True)
class Palette:
    """Names and colours a scene is painted with."""

    bright: str
    other: str
    dark: str

    @property
    def colours(self) -> tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]:
        return BRIGHT[self.bright], BRIGHT[self.other], DARK[self.dark]


def _translation(variant: int, paint: Palette, swing: float, long: bool) -> Scene:
    bright, _, dark = paint.colours
    way, back, x, y = (
        ("from left to right", "from side to side", -0.6, 0.0),
        ("from the top to the bottom", "up and down", 0.0, -0.6),
        ("from right to left", "from side to side", 0.6, 0.0),
        ("from the bottom left corner to the top right corner", "between two corners", -0.55, 0.55),
    )[variant]
    shape, draw = (("disc", _disc), ("square", _square))[variant % 2]
    move = _wave(swing)
    mask = draw(f"{x}*{move}", f"{y}*{move}", "0.5")
    text = f"{_a(paint.bright)} {shape} glides {back if long else way} over a {paint.dark} background."
    return Scene("translation", text, _paint(dark, (mask, bright)))


def _zoom(variant: int, paint: Palette, swing: float, long: bool) -> Scene:
    bright, _, dark = paint.colours
    size = f"(0.7-0.55*{_wave(swing)})"
    if variant == 0:
        text, mask = f"{_a(paint.bright)} disc grows until it fills the {paint.dark} picture.", _disc("0", "0", size)
    elif variant == 1:
        size = f"(0.65+0.5*{_wave(swing)})"
        text, mask = f"{_a(paint.bright)} square shrinks to a dot in the {paint.dark} picture.", _square("0", "0", size)
    elif variant == 2:
        text = f"Wide {paint.bright} rings on {paint.dark} spread from the middle and come nearer."
        mask = _soft(f"-cos(2*PI*(0.75*hypot(U,V)-T/{0.8 * swing}))", 3)
    else:
        text = f"{_a(paint.bright)} diamond grows out of a {paint.dark} picture."
        mask = _soft(f"abs(U)+abs(V)-1.4*{size}")
    if long:
        text = text[:-1] + ", back and forth."
    return Scene("zoom", text, _paint(dark, (mask, bright)))


def _rotation(variant: int, paint: Palette, swing: float, long: bool) -> Scene:
    bright, _, dark = paint.colours
    angle = f"(2*PI*T/{1.25 * swing})"
    across, along = f"(U*cos{angle}+V*sin{angle})", f"(V*cos{angle}-U*sin{angle})"
    if variant == 0:
        text = f"A broad {paint.bright} bar turns clockwise on a {paint.dark} background."
        channels = _paint(dark, (_soft(f"abs({across})-0.35", 9), bright))
    elif variant == 1:
        text = f"A picture that is half {paint.bright} and half {paint.dark} turns clockwise."
        channels = _paint(dark, (_soft(across, 7), bright))
    elif variant == 2:
        text = f"{_a(paint.bright)} propeller with three blades turns clockwise on {paint.dark}."
        blades = f"cos(3*atan2(V,U)-0.8*{angle})"
        channels = _paint(dark, (_soft(f"-hypot(U,V)*{blades}", 9), bright))
    else:
        text = f"A big disc, half {paint.bright} and half black, turns clockwise on {paint.dark}."
        halves = _blend(bright, (8, 8, 8), _soft(along, 9))
        channels = _paint(dark, (_disc("0", "0", "0.95"), halves))
    return Scene("rotation", text, channels)


def _colour(variant: int, paint: Palette, swing: float, long: bool) -> Scene:
    bright, _, dark = paint.colours
    if variant == 0:
        text = f"The whole picture changes from {paint.dark} to {paint.bright}, first at the left."
        channels = _blend(dark, bright, _soft(f"0.8*U+1.2*{_wave(swing)}", 4))
    elif variant == 1:
        text = f"{_a(paint.bright)} disc and the {paint.dark} around it change colours, first at the top."
        turn = _soft(f"0.9*V+1.2*{_wave(swing)}", 4)
        channels = _paint(_blend(dark, bright, turn), (_disc("0", "0", "0.6"), _blend(bright, dark, turn)))
    elif variant == 2:
        text = f"Night turns into day: a {paint.dark} sky becomes {paint.bright} from below, above a black hill."
        turn = _soft(f"-0.7*V+1.1*{_wave(swing)}", 4)
        channels = _paint(_blend(dark, bright, turn), (_disc("0.2", "1.6", "1.2"), (8, 12, 8)))
    else:
        text = f"Soft rainbow colours flow behind a {paint.dark} disc."
        rainbow = [f"128+115*cos(2*PI*(T/{0.9 * swing}+0.2*U+0.12*V+{k}/3))" for k in range(3)]
        channels = _paint(rainbow, (_disc("0", "0", "0.4"), dark))
    return Scene("colour change", text, channels)


def _scroll(variant: int, paint: Palette, swing: float, long: bool) -> Scene:
    bright, _, dark = paint.colours
    time = f"T/{0.9 * swing}"
    if variant == 0:
        text = f"Wide {paint.bright} and {paint.dark} stripes scroll upwards."
        mask = _soft(f"-cos(2*PI*(0.7*V+{time}))", 3)
    elif variant == 1:
        text = f"Upright {paint.bright} and {paint.dark} stripes scroll to the left."
        mask = _soft(f"-cos(2*PI*(0.6*U+{time}))", 3)
    elif variant == 2:
        text = f"Slanting {paint.bright} and {paint.dark} stripes scroll down to the right."
        mask = _soft(f"-cos(2*PI*(0.5*U+0.5*V-{time}))", 3)
    else:
        text = f"A soft chessboard of {paint.bright} and {paint.dark} scrolls to the right."
        mask = _soft(f"-1.6*cos(2*PI*(0.55*U-{time}))*cos(2*PI*0.55*V)", 3)
    return Scene("scroll", text, _paint(dark, (mask, bright)))


def _bounce(variant: int, paint: Palette, swing: float, long: bool) -> Scene:
    bright, other, dark = paint.colours
    hop = f"sqrt(0.03+pow(sin(PI*T/{0.55 * swing}),2))"  # |sin| with its corner at the floor rounded
    floor = (_soft("0.7-V", 14), (130, 130, 130))
    if variant == 0:
        text = f"{_a(paint.bright)} ball bounces up and down on a grey floor before a {paint.dark} wall."
        layers = [(_disc("0", f"0.3-0.95*{hop}", "0.58"), bright)]
    elif variant == 1:
        text = f"{_a(paint.bright)} ball bounces on a grey floor and moves to the right, the wall is {paint.dark}."
        text = text.replace("to the right", "to and fro") if long else text
        layers = [(_disc(f"-0.5*{_wave(swing)}", f"0.35-0.95*{hop}", "0.46"), bright)]
    elif variant == 2:
        text = f"{_a(paint.bright)} ball bounces between a left and a right wall in a {paint.dark} room."
        layers = [(_disc(f"0.55*{_wave(0.9 * swing)}", "0.05", "0.58"), bright)]
    else:
        text = f"{_a(paint.bright)} ball and a {paint.other} ball bounce by turns before a {paint.dark} wall."
        hop2 = f"sqrt(0.03+pow(cos(PI*T/{0.55 * swing}),2))"
        layers = [
            (_disc("-0.5", f"0.35-0.95*{hop}", "0.42"), bright),
            (_disc("0.5", f"0.35-0.95*{hop2}", "0.42"), other),
        ]
    return Scene("bouncing", text, _paint(dark, floor, *layers))


def _appearance(variant: int, paint: Palette, swing: float, long: bool) -> Scene:
    bright, _, dark = paint.colours
    rise = f"(0.5-0.5*{_wave(swing)})"
    if variant == 0:
        text = f"A big {paint.bright} disc appears out of the {paint.dark} background, its left side first."
        channels = _paint(dark, (f"{_soft(f'0.8*U+{_wave(swing)}', 5)}*{_disc('0', '0', '0.8')}", bright))
    elif variant == 1:
        text = f"A {paint.dark} curtain opens from the middle and shows a {paint.bright} stage."
        channels = _paint(dark, (_soft(f"abs(U)-1.15*{rise}", 9), bright))
    elif variant == 2:
        text = f"A big {paint.bright} disc lights up from left to right and goes out again, all around is {paint.dark}."
        light = _soft(f"-cos(2*PI*(0.35*U-T/{0.9 * swing}))", 4)
        channels = _paint(dark, (f"{light}*{_disc('0', '0', '0.9')}", bright))
    else:
        text = f"{_a(paint.bright)} square melts away into a {paint.dark} background, from top to bottom."
        channels = _paint(dark, (f"{_soft(f'-0.8*V-{_wave(swing)}', 5)}*{_square('0', '0', '0.75')}", bright))
    if long:
        text = text[:-1] + ", again and again."
    return Scene("appearance", text, channels)


def _orbit(variant: int, paint: Palette, swing: float, long: bool) -> Scene:
    bright, other, dark = paint.colours
    angle = f"2*PI*T/{0.9 * swing}"
    if variant == 0:
        text = f"{_a(paint.bright)} disc circles clockwise around the middle of a {paint.dark} picture."
        layers = [(_disc(f"0.5*cos({angle})", f"0.5*sin({angle})", "0.45"), bright)]
    elif variant == 1:
        lean = f"(0.75*{_wave(0.9 * swing)})"
        text = f"{_a(paint.bright)} pendulum swings from right to left before a {paint.dark} wall."
        rod = _soft(f"max(abs(U*cos{lean}-(V+1)*sin{lean})-0.06,hypot(U,V+1)-1.2)", 14)
        layers = [(rod, (150, 150, 150)), (_disc(f"1.3*sin{lean}", f"1.3*cos{lean}-1", "0.45"), bright)]
    elif variant == 2:
        text = f"{_a(paint.bright)} disc and a {paint.other} disc circle around each other on {paint.dark}."
        layers = [
            (_disc(f"0.5*cos({angle})", f"0.5*sin({angle})", "0.4"), bright),
            (_disc(f"-0.5*cos({angle})", f"-0.5*sin({angle})", "0.4"), other),
        ]
    else:
        text = f"{_a(paint.bright)} square slides along a figure of eight on a {paint.dark} background."
        layers = [(_square(f"0.55*cos({angle})", f"0.35*sin(2*{angle})", "0.42"), bright)]
    return Scene("orbit", text, _paint(dark, *layers))


SCENES = (_translation, _zoom, _rotation, _colour, _scroll, _bounce, _appearance, _orbit)
