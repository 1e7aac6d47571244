"""Measures of videos of different lengths, against slow formulas and known cases."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.metrics.sequences import (
    FvdNetwork,
    frechet,
    roughness,
    spread_places,
    step_size,
    total_variation,
    video_features,
)


def slow_frechet(first: torch.Tensor, second: torch.Tensor) -> float:
    """By covariances and a matrix square root."""
    first, second = first.double().numpy(), second.double().numpy()
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values, vectors = np.linalg.eigh(one)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(0)).sum()
    return float(np.square(first.mean(0) - second.mean(0)).sum() + np.trace(one) + np.trace(two) - 2 * middle)


@pytest.mark.parametrize(("rows", "others", "columns"), [(50, 40, 5), (6, 9, 20), (2, 30, 3)])
def test_the_frechet_distance_is_that_of_the_covariances(rows: int, others: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(rows)
    first = torch.randn(rows, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    second = torch.randn(others, columns, generator=draw) + 0.5
    assert frechet(first, second) == pytest.approx(slow_frechet(first, second), rel=1e-6, abs=1e-8)
    assert frechet(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet(first, first + 2) == pytest.approx(4 * columns, rel=1e-6)


def test_one_row_has_no_distance() -> None:
    assert np.isnan(frechet(torch.zeros(1, 3), torch.zeros(5, 3)))


@given(st.lists(st.integers(1, 9), min_size=1), st.lists(st.integers(1, 9), min_size=1))
def test_total_variation(first: list[int], second: list[int]) -> None:
    found = total_variation(first, second)
    assert 0 <= found <= 1
    assert found == pytest.approx(total_variation(second, first))
    assert total_variation(first, first * 3) == pytest.approx(0)
    assert total_variation(first, [n + 9 for n in second]) == pytest.approx(1)
    assert np.isnan(total_variation([], second))


def test_motion() -> None:
    even = torch.arange(6.0)[:, None, None, None] * torch.ones(6, 2, 3, 3)
    assert step_size(even) == 1
    assert roughness(even) == 0
    assert step_size(3 * even) == 3
    assert roughness(torch.zeros(5, 1, 2, 2)) == 0
    noise = torch.randn(2000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    assert roughness(noise) == pytest.approx(3**0.5, abs=0.05)
    assert np.isnan(roughness(even[:2]))
    assert np.isnan(step_size(even[:1]))


def test_features_do_not_depend_on_the_frame_rate() -> None:
    ramp = torch.linspace(0, 1, 15)[:, None, None, None].expand(15, 2, 8, 8)
    assert video_features(ramp).shape == (8 * 2 * 16,)
    torch.testing.assert_close(video_features(ramp), video_features(ramp[::2]), atol=0.04, rtol=0)
    assert video_features(ramp[:1, :, :3, :3]).shape == (8 * 2 * 9,)
    assert spread_places(30, 8).tolist() == [0, 4, 8, 12, 17, 21, 25, 29]
    assert spread_places(1, 3).tolist() == [0, 0, 0]


class Means(torch.nn.Module):
    """As the I3D is called."""

    def forward(self, video: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert not rescale
        assert not resize
        assert return_features
        return video.mean(dim=[3, 4]).flatten(1)


def scripted(path: Path) -> Path:
    """Such a network as the file that those who measure FVDs have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Means()).save(str(path))  # type: ignore[no-untyped-call]
    return path


def test_an_fvd_network_sees_videos_of_one_size(tmp_path: Path) -> None:
    scripted(tmp_path / "i3d.pt")
    network = FvdNetwork(tmp_path / "i3d.pt")
    videos = [np.full((n, 4, 6, 3), grey, np.uint8) for n, grey in ((5, 0), (40, 255))]
    rows = network.features(videos)
    assert rows.shape == (2, 3 * 16)
    torch.testing.assert_close(rows, torch.tensor([-1.0, 1.0])[:, None].expand(2, 48))
    with pytest.raises(FileNotFoundError, match=r"--fvd .*nothing\.pt: there is no such file"):
        FvdNetwork(tmp_path / "nothing.pt")
    (tmp_path / "bad.pt").write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"bad\.pt is no TorchScript file .*; give i3d_torchscript\.pt"):
        FvdNetwork(tmp_path / "bad.pt")
