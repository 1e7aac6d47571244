"""The codec's networks in batches: compiled gives what eager gives, and no batch loses or mixes frames."""

from __future__ import annotations

import copy
import dataclasses
import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from model.codecs import batches as codec_batches
from model.codecs.batches import Compiler, Networks, in_batches, padded
from model.codecs.ddim import DDIMSchedule, invert, regenerate
from model.codecs.diffusers import DiffusersCodec, DiffusersSettings
from model.codecs.factory import codec_from_spec
from tests.model.tiny_diffusion import tiny_diffusion

FRAMES = torch.sin(torch.arange(5 * 3 * 16 * 16) / 97.0).view(5, 3, 16, 16)
TEXT = torch.sin(torch.arange(5 * 3 * 32) / 7.0).view(5, 3, 32)


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> DiffusersCodec:
    folder = tiny_diffusion(tmp_path_factory.mktemp("hub") / "tiny")
    return DiffusersCodec.from_pretrained(folder, DiffusersSettings(ddim_steps=10, inversion_depth=2))


def networks(codec: DiffusersCodec, compiler: Compiler | None = None, **types: torch.dtype) -> Networks:
    own = codec._networks
    return Networks(copy.deepcopy(own.vae), copy.deepcopy(own.unet), compiler=compiler, **types)


def there_and_back(networks: Networks, count: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents, inverted latents and the frames they come back to."""
    schedule = DDIMSchedule(10)
    clean = networks.encode(FRAMES[:count], rows)
    noise = networks.noise(TEXT[:count], rows)
    noisy = invert(clean, noise, schedule, 2, refinements=1).latents
    return clean, noisy, networks.decode(regenerate(noisy, noise, schedule, 2), rows)


def test_compiled_networks_give_what_eager_ones_give(codec: DiffusersCodec) -> None:
    graphs, shapes = [], set()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def compiler(computation: Any) -> Any:
        compiled = torch.compile(computation, fullgraph=True, dynamic=False, backend=backend)

        def call(*inputs: Tensor) -> Tensor:
            shapes.add(tuple(inputs[0].shape))
            result: Tensor = compiled(*inputs)
            return result

        return call

    eager, compiled = networks(codec), networks(codec, compiler)
    for count in (4, 3):
        for made, expected in zip(there_and_back(compiled, count, 4), there_and_back(eager, count, 0), strict=True):
            torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    # Other strides, as a convolution in channels_last leaves them.
    latents = eager.encode(FRAMES[:4]).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(compiled.decode(latents, 4), eager.decode(latents), rtol=1e-4, atol=1e-5)
    assert compiled.compiled, "it fell back"
    assert len(graphs) == 3, "encode, decode and eps are compiled once each, batches that are not full included"
    assert shapes == {(4, 3, 16, 16), (4, 4, 4, 4)}


def test_batches_that_are_half_full_go_eager(codec: DiffusersCodec) -> None:
    def compiler(computation: Any) -> Any:
        return lambda *inputs: pytest.fail("compiled")

    assert there_and_back(networks(codec, compiler), 2, 4)[0].shape == (2, 4, 4, 4)
    assert there_and_back(networks(codec, compiler), 3, 0)[0].shape == (3, 4, 4, 4)


def test_a_result_that_the_next_call_overwrites_is_kept(codec: DiffusersCodec) -> None:
    """What a CUDA graph does: it writes every result to the same place."""
    places: dict[Any, Tensor] = {}

    def compiler(computation: Any) -> Any:
        def call(*inputs: Tensor) -> Tensor:
            result = computation(*inputs)
            return places.setdefault(computation, torch.empty_like(result)).copy_(result)

        return call

    made = networks(codec, compiler)
    first = made.encode(FRAMES[:2], 2)
    kept = first.clone()
    made.encode(FRAMES[2:4], 2)
    assert torch.equal(first, kept)
    for left, right in zip(there_and_back(made, 4, 4), there_and_back(networks(codec), 4, 0), strict=True):
        torch.testing.assert_close(left, right)


def test_where_compiling_fails_the_codec_warns_once_and_goes_on(
    codec: DiffusersCodec, caplog: pytest.LogCaptureFixture
) -> None:
    def compiler(computation: Any) -> Any:
        def call(*inputs: Tensor) -> Tensor:
            raise RuntimeError("no compiler here\nand a long trace")

        return call

    made = networks(codec, compiler)
    assert made.compiled
    with caplog.at_level(logging.WARNING):
        found = there_and_back(made, 4, 4)
    assert torch.equal(found[2], there_and_back(networks(codec), 4, 0)[2])
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile failed, the codec goes on without it: no compiler here"
    ]
    assert not made.compiled


def test_out_of_memory_in_a_compiled_network_is_not_taken_for_a_failure_of_the_compiler(codec: DiffusersCodec) -> None:
    def compiler(computation: Any) -> Any:
        def call(*inputs: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no more")

        return call

    with pytest.raises(torch.OutOfMemoryError):
        networks(codec, compiler).encode(FRAMES, 5)


def test_compiled_is_a_setting_of_the_machine_and_not_of_the_latents(codec: DiffusersCodec) -> None:
    other = codec_from_spec({**codec.spec(), "compiled": True})
    assert isinstance(other, DiffusersCodec)
    assert other.id == codec.id
    assert other.spec() == codec.spec()
    assert not other._networks.compiled, "a CPU compiles nothing"


def test_bfloat16_networks_take_and_give_float32(codec: DiffusersCodec) -> None:
    rounded = networks(codec, vae_type=torch.bfloat16, unet_type=torch.bfloat16)
    found = there_and_back(rounded, 3, 0)
    exact = there_and_back(codec._networks, 3, 0)
    for made, expected in zip(found, exact, strict=True):
        assert made.dtype == torch.float32
        assert 0 < float((made - expected).square().mean().sqrt()) < 0.05 * float(expected.square().mean().sqrt())


def test_a_batch_is_a_power_of_two_that_fits(codec: DiffusersCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = codec._networks
    assert plain.rows(16, 16) == codec_batches.MOST_ROWS
    frame = 12 * 4 * 8 * 256 * 256  # bytes: twelve float32 maps of eight channels
    for memory, expected in ((frame // 2, 1), (frame, 1), (5 * frame, 4), (8 * frame, 8)):
        monkeypatch.setattr(codec_batches, "CPU_BYTES", memory)
        assert plain.rows(256, 256) == expected


def test_padding_repeats_the_last_row_and_leaves_scalars(codec: DiffusersCodec) -> None:
    assert padded(torch.tensor([[1.0], [2.0]]), 4).tolist() == [[1.0], [2.0], [2.0], [2.0]]
    assert padded(torch.tensor(7), 4).shape == ()


def test_out_of_memory_halves_the_batch_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    sizes = []

    def compute(items: Tensor, text: Tensor | None) -> Tensor:
        sizes.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("no more")
        assert text is not None
        return items + text

    items, text = torch.arange(10.0).view(10, 1), torch.ones(10, 1)
    with caplog.at_level(logging.WARNING):
        results = in_batches(compute, items, text, 8)
    assert torch.equal(torch.cat(results), items + 1)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert "halved to 4" in caplog.text


def test_a_codec_remembers_the_batch_that_fitted(codec: DiffusersCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    whole = codec._networks._encode

    def encode(frames: Tensor) -> Tensor:
        sizes.append(len(frames))
        if len(frames) > 2:
            raise torch.OutOfMemoryError("no more")
        return whole(frames)

    monkeypatch.setattr(codec._networks, "_encode", encode)
    monkeypatch.setattr(codec, "_batches", {})
    monkeypatch.setattr(codec, "settings", dataclasses.replace(codec.settings, batch=4))
    first = codec.encode(FRAMES, TEXT).latents
    assert sizes == [4, 2, 2, 1]
    torch.testing.assert_close(codec.encode(FRAMES, TEXT).latents, first)
    assert sizes[4:] == [2, 2, 1]


def test_one_frame_that_does_not_fit_says_so() -> None:
    def compute(items: Tensor, text: Tensor | None) -> Tensor:
        raise torch.OutOfMemoryError("no more")

    with pytest.raises(RuntimeError, match=r"one item of 3 x 8 x 8 does not fit.*smaller frames"):
        in_batches(compute, torch.zeros(2, 3, 8, 8), None, 2)


def test_the_gpus_compiler_takes_one_shape_whole() -> None:
    compiler = codec_batches.gpu_compiler()
    assert isinstance(compiler, partial)
    assert compiler.keywords == {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}
