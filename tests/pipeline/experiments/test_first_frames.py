"""First frames alone: what is left out stays out, a network that knows the frames is right, and all of it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.backbones.conditioning import Conditioning
from model.backbones.dit import BackboneConfig
from model.codecs.factory import codec_from_spec
from model.methods.vlfm import VLFM, VLFMOptions
from model.text.encoder import builtin_text_encoder
from model.video import from_frames
from pipeline.corpus.combinations import plan_film
from pipeline.corpus.drawing import draw_frames
from pipeline.corpus.grammar import combinations
from pipeline.experiments.first_frames import JUDGED, draw_stills, is_left_out, judge, main
from pipeline.recipes import combinations as data_recipe

METHOD = VLFM.build(VLFMOptions(), {"mean_scale": 1.0, "derivative_scale": 1.0}, {"latent_shape": [12, 8, 8]})


class Knowing(nn.Module):
    """Answers with given latents, whatever it is asked."""

    config = BackboneConfig(12, 8, 8, 8, 32, 1, 2, 2)

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents

    def forward(self, latents: Tensor, time: Tensor, given: Conditioning) -> dict[str, Tensor]:
        return {"mean": self.latents[:, None], "derivative": torch.zeros_like(latents)}


def test_what_is_left_out_is_not_trained_on_and_is_not_what_the_corpus_holds_out() -> None:
    codec = codec_from_spec(data_recipe().codec)
    stills = draw_stills(codec, builtin_text_encoder(), films=60, frames=2, seed=0)
    assert not any(is_left_out(one) or one.held_out for one in stills.shown)
    assert stills.latents.shape == (len(stills.shown), 2, 12, 8, 8)
    assert len(stills.shown) < 60
    assert sum(map(is_left_out, combinations(held_out=False))) > 80
    batch = stills.batch(torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert batch.coefficients is not None
    assert torch.equal(batch.coefficients[1, 0], stills.latents[0, 1])


def test_a_network_that_knows_the_frames_is_right_and_one_of_other_frames_is_not() -> None:
    codec, wanted = codec_from_spec(data_recipe().codec), combinations(held_out=False)[::300]
    frames = [draw_frames(one, plan_film(one).path, [0.3])[0] for one in wanted]
    known: Any = Knowing(torch.cat([codec.encode(from_frames(frame[None])).latents for frame in frames]))
    shares = judge(known, METHOD, codec, builtin_text_encoder(), wanted, 1.0)
    assert shares == dict.fromkeys((*JUDGED, "all"), 1.0)
    other = judge(known, METHOD, codec, builtin_text_encoder(), wanted[1:] + wanted[:1], 1.0)
    assert other["all"] == 0


def test_it_trains_judges_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ("steps=2", "batch=2", "width=32", "heads=2", "depth=1", "stem=8", "stem_depth=1")
    settings = [f"--set={pair}" for pair in tiny]
    assert main([*settings, "--films", "6", "--frames", "1", "--captions", "1", "--guidance", "1", "2"]) == 0
    out, told = capsys.readouterr()
    names = ("left out, guidance 1", "left out, guidance 2", "trained on, guidance 1", "trained on, guidance 2")
    assert [line.split(" | ")[0] for line in out.splitlines()[2:]] == [f"| {name}" for name in names]
    assert told.startswith("step 2  mean ")
    assert main(["--films", "0"]) == 1
    assert "--films, --frames and --captions must be at least 1" in capsys.readouterr().err
