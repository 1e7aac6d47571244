"""A corpus of captioned films drawn by ffmpeg alone."""

from pipeline.corpus.films import (
    FilmPlan,
    film_command,
    make_corpus,
    plan_films,
)

__all__ = [
    "FilmPlan",
    "film_command",
    "make_corpus",
    "plan_films",
]
