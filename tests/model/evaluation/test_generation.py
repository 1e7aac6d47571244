"""The figures of generation on stand-ins whose answers are known: one recalls by caption, one does what it is asked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import legs
from model.codecs.linear import LinearCodec, LinearSettings
from model.evaluation.catalogue import Catalogue
from model.evaluation.generation import (
    CAPTIONS,
    GENERATION_METRICS,
    SEEDS,
    generate,
    image_figures,
    long_figures,
    one_of_each_caption,
    seam_ratios,
    seed_figures,
)
from model.methods.base import SampleSettings
from model.methods.vlfm import VLFM
from model.sample import Sampler
from model.training.data import Clip
from tests.model.tiny_lake import DURATION, KEPT, SIDE, sample

SETTINGS = SampleSettings()


def clip(number: int, film: str, caption: str, start: float = 0.0, split: str = "train") -> Clip:
    """Square `number` of the tiny lake, under other names."""
    made = sample(number, split, caption)
    members = {name.removesuffix(".npy"): value for name, value in made.items() if name.endswith(".npy")}
    about = {**made["clip.json"], "clip_id": f"{film}-{start:g}", "film": film, "clip_start": start}
    return Clip(about["clip_id"], about, members)


CLIPS = [
    clip(0, "a", "one"),
    clip(1, "b", "one"),  # shares a's caption
    clip(2, "c", "two"),
    clip(3, "d", "three"),
    clip(5, "e", "four", split="validation"),
    clip(6, "long", "five", 0.0),
    clip(7, "long", "five", DURATION),
    clip(3, "long", "five", 2 * DURATION),
]


def catalogue(clips: Sequence[Clip] = CLIPS) -> Catalogue:
    coefficients = np.stack([c.members["coefficients"] for c in clips])
    return Catalogue([c.about for c in clips], np.ones(len(clips), bool), coefficients, lambda k: clips[k])


def rms(a: Any, b: Any) -> float:
    return math.sqrt(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())


def far(a: Clip, b: Clip, start: float = 0.0) -> float:
    """Slow reference of two clips' distance: at many times."""
    times = start + (1 - start) * (np.arange(4000) + 0.5) / 4000
    return rms(*(legs.evaluate(c.members["coefficients"].astype(np.float64), times, 1.0) for c in (a, b)))


class Curves:
    """A sample that reads clips' own coefficients."""

    network_calls = 0

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips = clips

    def read(self, times: Any) -> Tensor:
        curves = [torch.from_numpy(c.members["coefficients"].astype(np.float32)) for c in self.clips]
        return torch.stack([legs.evaluate(curve, np.asarray(times), 1.0) for curve in curves], dim=1)


class StandIn(Sampler):
    """A sampler without a run; `answer` says which clip is made of (prompt, seed, first frame)."""

    def __init__(self) -> None:
        self._codec = LinearCodec(LinearSettings(4, 12, 1.0))
        self.device = torch.device("cpu")
        self.clip = {"duration": DURATION, "rate": KEPT / DURATION, "latent_shape": [12, SIDE // 4, SIDE // 4]}
        self.method = VLFM  # type: ignore[assignment]
        self.told: list[Any] = []

    def sample(
        self,
        prompts: Sequence[str],
        starts: Sequence[float] | None,
        seeds: Sequence[int],
        settings: SampleSettings,
        first_frames: Tensor | None = None,
        negative: Sequence[str] | None = None,
    ) -> Any:
        self.told.append(starts)
        frames: Any = [None] * len(prompts) if first_frames is None else first_frames
        return Curves([self.answer(*asked) for asked in zip(prompts, seeds, frames, strict=True)])

    def answer(self, prompt: str, seed: int, first: Tensor | None) -> Clip:
        raise NotImplementedError


class Memory(StandIn):
    """Reads the look-up table: the caption's first clip, whatever the seed and the picture."""

    def answer(self, prompt: str, seed: int, first: Tensor | None) -> Clip:
        return next((c for c in CLIPS if c.about["caption"] == prompt), CLIPS[6])


class Able(StandIn):
    """With a picture it makes the clip that begins so, else one of the caption's clips by the seed."""

    def answer(self, prompt: str, seed: int, first: Tensor | None) -> Clip:
        if first is not None:
            return min(CLIPS, key=lambda c: rms(c.members["latents"][0], first))
        same = [c for c in CLIPS if c.about["caption"] == prompt]
        return same[seed % len(same)]


CHOSEN = [CLIPS[0], CLIPS[2], CLIPS[3]]


def test_a_memory_has_no_diversity_and_copies() -> None:
    memory = Memory()
    figures = seed_figures(memory, catalogue(), CHOSEN, SETTINGS).figures
    assert memory.told == [None], "no place in a film is told"
    zero = ("seed_distance", "seed_diversity", "nearest_sample")
    assert {name: figures[name] for name in zero} == pytest.approx(dict.fromkeys(zero, 0), abs=1e-6)
    assert (figures["seed_psnr"], figures["copies"]) == (100, 1)


def test_diversity_and_distances_against_slow_references() -> None:
    figures = seed_figures(Able(), catalogue(), CHOSEN, SETTINGS).figures
    training = [c for c in CLIPS if c.about["split"] == "train"]
    pairs = list(itertools.product(training, repeat=2))  # two drawn independently, a clip with itself too
    spread = math.sqrt(sum(far(a, b) ** 2 for a, b in pairs) / len(pairs))
    apart = far(CLIPS[0], CLIPS[1])
    # Of the pairs of 4 seeds 4 in 6 are of the two clips; the captions "two" and "three" have one clip each.
    assert SEEDS == 4
    assert figures["seed_diversity"] == pytest.approx(4 / 6, rel=1e-3)
    assert figures["seed_distance"] == pytest.approx(4 / 6 * apart / 3 / spread, rel=1e-3)

    codec = LinearCodec(LinearSettings(4, 12, 1.0))
    times = [0, 0.5, 1]
    shown = [
        codec.decode(legs.evaluate(torch.from_numpy(c.members["coefficients"].astype(np.float32)), times, 1.0))
        for c in CLIPS[:2]
    ]
    error = rms(*shown) ** 2
    assert figures["data_psnr"] == pytest.approx(10 * math.log10(4 / error), abs=1e-3)
    assert figures["seed_psnr"] == pytest.approx(10 * math.log10(4 / (error * 4 / 18)), abs=1e-3), (
        "4 of 18 pairs differ"
    )

    assert figures["nearest_sample"] == pytest.approx(0, abs=1e-6)
    nearest = [min(far(c, o) for o in training if o.about["film"] != c.about["film"]) for c in CHOSEN]
    assert figures["nearest_true"] == pytest.approx(np.median(nearest) / spread, rel=1e-3)


def test_new_films_are_no_copies_and_one_clip_a_caption_leaves_the_data_unknown() -> None:
    """Samples equal to the held-out clip: as far from the training clips as true films are."""
    figures = seed_figures(Able(), catalogue(), [CLIPS[4]], SETTINGS).figures
    assert figures["copies"] == 0
    assert figures["nearest_sample"] == pytest.approx(figures["nearest_true"], rel=1e-4)
    assert figures["nearest_true"] > 0.1
    assert math.isnan(figures["seed_diversity"])
    assert math.isnan(figures["data_psnr"])


@pytest.mark.parametrize(("kind", "rate"), [(Memory, 0.0), (Able, 1.0)])
def test_following_a_picture(kind: type[StandIn], rate: float) -> None:
    figures = image_figures(kind(), catalogue(), CHOSEN, SETTINGS).figures
    assert figures["image_over_caption"] == rate
    assert figures["image_alone"] == rate
    codec = LinearCodec(LinearSettings(4, 12, 1.0))
    ceiling, first = [], []
    for k, chosen in enumerate(CHOSEN):
        picture = torch.from_numpy(chosen.members["preview"][:1].astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
        back = codec.decode(codec.encode(picture).latents)
        other = chosen if kind is Able else Memory().answer(CHOSEN[(k + 1) % 3].about["caption"], 0, None)
        made = codec.decode(
            legs.evaluate(torch.from_numpy(other.members["coefficients"].astype(np.float32)), [0.0], 1.0)
        )
        ceiling.append(20 * math.log10(2 / rms(back, picture)))
        first.append(20 * math.log10(2 / rms(made, picture)))
    assert figures["image_ceiling"] == pytest.approx(np.mean(ceiling), abs=1e-3)
    assert figures["image_first_frame"] == pytest.approx(np.mean(first), abs=1e-3)
    assert (figures["image_ceiling"] - figures["image_first_frame"] < 1) == (kind is Able)


def test_a_picture_needs_a_method_that_takes_one_and_two_captions() -> None:
    stills = Memory()
    stills.method = type("Stills", (), {"takes_first_frame": False})  # type: ignore[assignment]
    assert image_figures(stills, catalogue(), CHOSEN, SETTINGS).figures == {}
    assert image_figures(Able(), catalogue(), CHOSEN[:1], SETTINGS).figures == {}


def test_a_long_video_against_its_film() -> None:
    """A video that is the film, 4 grey levels off."""
    chain = CLIPS[5:]
    film = np.concatenate([c.members["preview"] for c in chain])
    off = np.where(film > 250, film - 4, film + 4).astype(np.uint8)

    class Film(Able):
        def videos(self, prompts: Any, rate: float, duration: float, *rest: Any, **more: Any) -> Any:
            assert (prompts, rate, duration) == (["five"], KEPT / DURATION, 3 * DURATION)
            return [off]

    found = long_figures(Film(), catalogue(), [chain[0]], SETTINGS)
    assert found["third_window"] == pytest.approx(20 * math.log10(255 / 4))
    codec, truth = LinearCodec(LinearSettings(4, 12, 1.0)), chain[2].members["preview"].transpose(0, 3, 1, 2)
    latents = chain[1].members["latents"].astype(np.float32)
    hold, velocity = [], []
    for k in range(KEPT):
        for kind, latent in ((hold, latents[-1]), (velocity, latents[-1] + (k + 1) * (latents[-1] - latents[-2]))):
            picture = codec.decode(torch.from_numpy(latent)[None])[0].numpy()
            kind.append(20 * math.log10(2 / rms(picture, truth[k] / 127.5 - 1)))
    assert found["third_hold"] == pytest.approx(np.mean(hold), abs=1e-3)
    assert found["third_velocity"] == pytest.approx(np.mean(velocity), abs=1e-3)
    assert found["seam"] == pytest.approx(np.mean(seam_ratios(off, KEPT / DURATION, DURATION)))


def test_a_long_video_without_a_film_so_long_has_its_seam_alone() -> None:
    found = long_figures(Memory(), catalogue(), [CLIPS[3]], SETTINGS)
    assert found["seam"] > 1, "each window is clip d again, whose square jumps back"
    assert all(math.isnan(found[name]) for name in ("third_window", "third_hold", "third_velocity"))


def test_seams_against_arithmetic() -> None:
    """8 frames a window; neighbours 2 apart, the seams 10 and 6."""
    values = np.concatenate([2 * np.arange(8), 24 + 2 * np.arange(8), 44 + 2 * np.arange(8)])
    video = np.broadcast_to(values[:, None, None, None], (24, 4, 4, 3)).astype(np.uint8)
    assert seam_ratios(video, 4.0, 2.0) == [5.0, 3.0]
    assert seam_ratios(np.zeros_like(video), 4.0, 2.0) == [], "nothing moves"
    assert seam_ratios(video[:8], 4.0, 2.0) == [], "no seam"


def test_captions_with_several_clips_come_first_and_few_are_chosen() -> None:
    many = [clip(k % 8, f"film-{k}", f"caption {k // 2 if k > 20 else k}") for k in range(30)]
    chosen = one_of_each_caption(many, catalogue(many))
    captions = [c.about["caption"] for c in chosen]
    assert len(set(captions)) == len(captions) == CAPTIONS
    shared = {f"caption {k // 2}" for k in range(21, 30)}
    assert set(captions[: len(shared)]) >= shared - {"caption 10"}


def test_every_figure_is_described_and_a_split_without_clips_has_none() -> None:
    made = generate(Able(), catalogue(), CLIPS[:4], SETTINGS, shown=2)
    assert made.figures.keys() == {metric.name for metric in GENERATION_METRICS}
    assert [view.caption for view in made.seeds] == ["one", "two"]
    assert list(made.seeds[0].pictures) == ["film", "seed 0", "seed 1", "seed 2", "seed 3"]
    assert made.seeds[0].pictures["seed 1"].shape == (16, SIDE, SIDE, 3)
    assert made.images[0].caption == "two", "the caption that clip a's picture was given with"
    assert generate(Able(), catalogue(), [], SETTINGS).figures == {}
