"""The bundled vocabulary of the built-in text encoder: words of ordinary captions of motion, and their merges.

Data, not a language: any other word is spelled in pieces or letters, any other character in bytes.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise

WORDS = """
a an the this that these those some any each every both all no not none other another same different such one two three
four five six seven eight nine ten half first second third last many few several more most less least
and or but while as then when before after until again once twice also than so very too just only
in on at of to from by with without for into onto out off over under above below behind beside between among around
about across along through past near toward towards away against inside outside within beyond up down left right
top bottom upper lower center centre middle side sides corner corners edge edges front back side end start beginning
is are was were be been being has have had do does did will can may it its they them their he she his her him who which
what where there here now we you i my your our
red orange yellow green blue purple violet pink brown black white grey gray cyan magenta teal golden silver dark light
bright pale dim vivid colour color coloured colored colours colors colourful colorful striped checkered plain solid
transparent shiny soft sharp smooth noisy blurred grainy gradient rainbow pastel
big large small little tiny huge long short tall wide narrow thin thick high low deep round square flat full empty open
closed old new young fast slow quick slowly quickly steady steadily gently suddenly smoothly slightly gradually
constantly constant still static alone lone single double hot cold wet dry wooden metal glass sunny cloudy snowy busy
quiet parked moving rolling spinning
move moves moved slide slides sliding drift drifts drifting travel travels travelling traveling go goes going come comes
coming rise rises rising fall falls falling drop drops dropping climb climbs float floats floating fly flies flying
bounce bounces bouncing jump jumps jumping rotate rotates rotating rotation spin spins turn turns turning twist swing
swings swinging swirl swirls roll rolls scroll scrolls scrolling zoom zooms zooming grow grows growing shrink shrinks
shrinking expand expands contract contracts pulse pulses pulsing blink blinks blinking flash flashes fade fades fading
appear appears appearing disappear disappears vanish vanishes change changes changing shift shifts morph morphs evolve
evolves evolving wave waves waving flow flows flowing pan pans panning tilt tilts shake shakes orbit orbits orbiting
circle circles cross crosses crossing enter enters leave leaves pass passes passing follow follows approach approaches
walk walks walking run runs running talk talks talking sit sits sitting stand stands standing look looks looking hold
holds holding work works working play plays playing flip flips flipping stretch stretches drive drives driving ride
rides riding dance dances dancing cook cooks cooking wrestle wrestles swim swims swimming throw throws catch catches
eat eats drink drinks read reads write writes speak speaks smile smiles laugh laughs show shows showing shown seen fill
fills filled cover covers covered stay stays stop stops begin begins starts ends keep keeps repeat repeats
square squares rectangle rectangles disc disk discs disks ball balls dot dots spot spots triangle triangles star stars
bar bars stripe stripes line lines ring rings cross box boxes block blocks cube cubes shape shapes pattern patterns
grid tile tiles checkerboard chessboard board spiral fractal mandelbrot julia sierpinski carpet automaton cell cells
cellular life game noise texture background foreground screen frame frames picture image video film scene shot shots
camera view text word words letter letters number numbers digit digits counter clock timer test card chart bars signal
direction diagonal diagonally horizontal horizontally vertical vertically clockwise anticlockwise counterclockwise
upward upwards downward downwards sideways forward forwards backward backwards back forth motion speed time
second seconds way path position place part parts piece pieces row rows column columns
person people man men woman women boy girl child children baby figure face hand hands head eye eyes hair arm arms leg
legs foot feet body suit shirt dress hat dog cat bird birds horse fish rabbit animal animals car cars bus truck train
bike bikes bicycle boat ship plane road street city town house building buildings wall window door room kitchen hall
table chair floor bridge park garden tree trees flower flowers grass leaf forest hill mountain mountains field river
lake sea ocean beach sand water rain snow storm ice fire smoke cloud clouds sky sun moon night day morning evening
shadow shadows light lights mirror lift machine pan pancake food fruit apple cup bottle glass paper book phone music
traffic burrow technicians segments snowstorm frying everything something nothing someone whole size wide ground stage
curtain diamond heart arrow cone pendulum propeller blade blades wheel wheels clouds bubbles bubble spread spreads
become becomes glide glides hop hops lean leans melt melts open opens opening close closes upright slanting slanted
broad nearer near far distance already shortly appearance paint painted crosses dissolve dissolves split splits join
joins meet meets merge merges push pushes pull pulls lift lifts spin wobble wobbles wiggle wiggles
"""
"""Space-separated words in lower case; duplicates count for nothing."""


def byte_letters() -> list[str]:
    """The 256 printable letters that byte-level BPE writes bytes as, in the order of the bytes 0..255.

    Printable Latin-1 bytes stand for themselves, the others for the letters from U+0100 on (the GPT-2 and CLIP table).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    letters, spare = [], 256
    for byte in range(256):
        letters.append(chr(byte) if byte in printable else chr(spare))
        spare += byte not in printable
    return letters


@cache
def merges(more: str = "") -> tuple[tuple[str, str], ...]:
    """Byte-pair merges, most frequent pair first (ties in alphabetical order), until every bundled word is one token.

    Sennrich, Haddow, Birch 2016, on the set of `WORDS`, each once, with CLIP's `</w>` at the end of a word.
    more: space-separated words in lower case of a-z that are one token too, for a text encoder of its own vocabulary.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in sorted({*WORDS.split(), *more.split()})]
    counts = Counter(pair for word in spelled for pair in pairwise(word))
    learned: list[tuple[str, str]] = []
    while counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        learned.append(best)
        for index, word in enumerate(spelled):
            if best[0] in word and best in pairwise(word):
                spelled[index] = _join(word, best)
                counts.subtract(pairwise(word))
                counts.update(pairwise(spelled[index]))
        counts = +counts  # drops the pairs that are gone
    return tuple(learned)


def _join(word: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in word:
        # Left to right and without overlap: "aaa" with the pair (a, a) is "aa a".
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def vocabulary(more: str = "") -> dict[str, int]:
    """Token to number: 256 letters, the same at a word's end, the merges, then the two marks of start and end.

    more: as for `merges`.
    """
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += dict.fromkeys(left + right for left, right in merges(more))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}
