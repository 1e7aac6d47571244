"""Corpora of captioned films, drawn here, so that nothing need be downloaded.

`make_corpus` draws 32 varied films; `make_combinations` draws films of attributes that combine, some combinations held
out, whose attributes `read_attributes` reads back from frames; `make_turning` draws films of 3x3 pixels and of four
lengths.
"""

from pipeline.corpus.combinations import Film, make_combinations, plan_combinations, plan_film, read_combinations
from pipeline.corpus.films import FilmPlan, film_command, make_corpus, plan_films
from pipeline.corpus.grammar import Attributes, attributes_of, combinations
from pipeline.corpus.probes import Reading, read_attributes, spread
from pipeline.corpus.turning import Turning, TurningReading, make_turning, plan_turning, read_turning

__all__ = [
    "Attributes",
    "Film",
    "FilmPlan",
    "Reading",
    "Turning",
    "TurningReading",
    "attributes_of",
    "combinations",
    "film_command",
    "make_combinations",
    "make_corpus",
    "make_turning",
    "plan_combinations",
    "plan_film",
    "plan_films",
    "plan_turning",
    "read_attributes",
    "read_combinations",
    "read_turning",
    "spread",
]
