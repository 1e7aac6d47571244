"""HiPPO-LegS against slow references, and its refusals."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

from model.legs import (
    METHODS,
    basis,
    basis_derivative,
    basis_torch,
    derivative,
    derivative_torch,
    evaluate,
    project,
    projection_matrix,
)
from tests.reference import legs as reference

EXACT = ("hold", "linear", "cubic")


def midpoints(count: int, duration: float = 2.0) -> np.ndarray:
    return (np.arange(count) + 0.5) * duration / count


@st.composite
def grids(draw: st.DrawFn, most: int = 40) -> tuple[np.ndarray, float]:
    """Strictly increasing times, neighbouring gaps up to 50-fold apart, in a window of any length."""
    gaps = np.array(draw(st.lists(st.floats(0.02, 1.0), min_size=2, max_size=most + 1)))
    duration = draw(st.sampled_from([1e-3, 0.5, 2.0, 3600.0]))
    return np.cumsum(gaps)[:-1] / gaps.sum() * duration, duration


@pytest.mark.parametrize("count", [1, 2, 7, 48, 200])
def test_hold_and_bilinear_equal_their_recurrences(count: int) -> None:
    # A is lower triangular, so the recurrence of order 128 runs all lower ones as its first rows.
    truth = reference.zero_order_hold(count, 128), reference.bilinear_matrix(count, 128)
    for order in (1, 2, 3, 16, 33, 64, 127, 128):
        for method, recurrence in zip(("hold", "bilinear"), truth, strict=True):
            found = projection_matrix(midpoints(count), 2.0, order, method)
            assert np.abs(found - recurrence[:, :order]).max() < 1e-12, (method, order)


def test_the_reference_recurrence_is_a_matrix_exponential() -> None:
    for order in (2, 16, 32):
        exponential = expm(reference.matrices(order)[0] * np.log(0.7))
        np.testing.assert_allclose(reference.dilation_power(0.7, order), exponential, atol=1e-13)


def test_paper_equals_its_recurrence() -> None:
    frames = np.random.default_rng(0).standard_normal((12, 5))
    with pytest.warns(UserWarning, match="diverges"):
        matrix = projection_matrix(midpoints(12), 2.0, 8, "paper")
    np.testing.assert_allclose(project(frames, matrix).T, reference.forward_euler(frames, 8), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 33, 128])
def test_the_basis_in_numpy_and_torch(order: int) -> None:
    r = np.concatenate([[0.0, 1.0, 0.5], np.random.default_rng(0).uniform(size=200)])
    truth = reference.basis(r, order)
    assert np.abs(basis(2 * r, 2.0, order) - truth).max() < 1e-12
    assert np.abs(basis_torch(torch.from_numpy(r), order).numpy() - truth).max() < 1e-12
    slopes = basis_derivative(2 * r, 2.0, order) * 2.0
    largest = max(1.0, np.abs(slopes).max())
    assert np.abs(derivative_torch(torch.from_numpy(r), order).numpy() - slopes).max() < 1e-12 * largest
    single = torch.tensor(r, dtype=torch.float32).reshape(-1, 7)
    assert basis_torch(single, order).shape == (29, 7, order)
    assert basis_torch(single, order).dtype == torch.float32
    assert torch.isnan(basis_torch(torch.tensor([1.01, -0.01]), 2)).all(), "outside [0, 1] must not look like a value"


@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_interpolants_against_plain_quadrature_of_scipy_interpolants(method: str) -> None:
    from scipy.interpolate import CubicSpline, interp1d

    random = np.random.default_rng(1)
    r = np.sort(random.uniform(0.05, 0.95, 9))
    values = random.standard_normal(9)
    inside = CubicSpline(r, values, bc_type="natural") if method == "cubic" else interp1d(r, values, assume_sorted=True)

    def signal(at: np.ndarray) -> np.ndarray:
        return inside(np.clip(at.astype(np.float64), r[0], r[-1]))

    truth = reference.projection(signal, np.concatenate([[0], r, [1]]), 40)
    assert np.abs(projection_matrix(3 * r, 3.0, 40, method).T @ values - truth).max() < 1e-13


@settings(deadline=None, max_examples=40)
@given(grid=grids(), order=st.integers(1, 70), method=st.sampled_from(EXACT))
def test_any_times_and_orders(grid: tuple[np.ndarray, float], order: int, method: str) -> None:
    times, duration = grid
    matrix = projection_matrix(times, duration, order, method)
    assert matrix.shape == (len(times), order)
    assert matrix.dtype == np.float64
    # A still film is the constant path.
    np.testing.assert_allclose(matrix.sum(axis=0), np.eye(order)[0], atol=1e-12)
    # The orders nest, so a prefix of the coefficients is the projection of lower order.
    np.testing.assert_allclose(projection_matrix(times, duration, 2 * order, method)[:, :order], matrix, atol=1e-13)
    # Lemma 5.4: dilating time changes nothing.
    np.testing.assert_allclose(projection_matrix(7 * times, 7 * duration, order, method), matrix, atol=1e-12)
    # Time reversed turns the odd orders round.
    backwards = projection_matrix((duration - times)[::-1], duration, order, method)
    np.testing.assert_allclose(backwards[::-1] * (-1.0) ** np.arange(order), matrix, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(
    order=st.integers(1, 40),
    shape=st.lists(st.integers(1, 4), max_size=3),
    duration=st.floats(0.1, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_derivative_is_the_derivative(order: int, shape: list[int], duration: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    coefficients = (
        random.standard_normal((order, *shape)) / (1.0 + np.arange(order).reshape(-1, *[1] * len(shape))) ** 3
    )
    times, step = random.uniform(0.01, 0.99, 6) * duration, 1e-5 * duration
    differences = (evaluate(coefficients, times + step, duration) - evaluate(coefficients, times - step, duration)) / (
        2 * step
    )
    found = derivative(coefficients, times, duration)
    assert found.shape == (6, *shape)
    scale = max(1.0, float(np.abs(found).max()) * duration)
    assert np.abs(found - differences).max() * duration < 1e-6 * scale


@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    count=st.integers(1, 9),
    dtype=st.sampled_from([np.float16, np.float32, np.float64, np.uint8]),
    seed=st.integers(0, 2**32 - 1),
)
def test_dtypes_and_shapes(shape: list[int], count: int, dtype: type, seed: int) -> None:
    frames = (np.random.default_rng(seed).uniform(0, 9, (count, *shape))).astype(dtype)
    matrix = projection_matrix(midpoints(count), 2.0, 6)
    wanted = np.einsum("ns,n...->s...", matrix, frames.astype(np.float64))
    kept = np.float64 if dtype is np.float64 else np.float32
    for found in (project(frames, matrix), project(torch.from_numpy(frames), matrix).numpy()):
        assert found.dtype == kept
        assert found.shape == (6, *shape)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    read = evaluate(wanted.astype(kept), [0.0, 1.0, 2.0], 2.0)
    assert read.shape == (3, *shape)


@pytest.mark.parametrize("order", [32, 200])
@pytest.mark.parametrize("width", [1, 63, 1000])
def test_the_product_takes_any_strides_and_memory_that_may_not_be_written(width: int, order: int) -> None:
    frames = np.random.default_rng(0).standard_normal((48, width))
    matrix = projection_matrix(midpoints(48), 2.0, order)
    np.testing.assert_allclose(project(frames, matrix), matrix.T @ frames, atol=1e-13)
    np.testing.assert_allclose(project(frames.astype(np.float32), matrix), matrix.T @ frames, atol=1e-5)
    np.testing.assert_allclose(project(frames[:, ::-1], matrix), matrix.T @ frames[:, ::-1], atol=1e-13)
    turned = torch.from_numpy(frames.T.copy()).T
    np.testing.assert_allclose(project(turned, matrix).numpy(), matrix.T @ frames, atol=1e-13)
    frames.setflags(write=False)
    np.testing.assert_allclose(project(frames, matrix), matrix.T @ frames, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    frames = torch.randn(33, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix = projection_matrix(midpoints(33), 2.0, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = project(frames.requires_grad_(), matrix)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), torch.from_numpy(matrix.T.copy()) @ frames.double(), rtol=1e-5, atol=1e-6
    )


def test_gradients_pass_through_projection_and_readout() -> None:
    frames = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    matrix = projection_matrix(midpoints(5), 2.0, 8)
    assert torch.autograd.gradcheck(lambda u: evaluate(project(u, matrix), [0.3, 1.7], 2.0), (frames,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    frames = torch.randn(33, 4, 8, 8).to(dtype)
    matrix = projection_matrix(midpoints(33), 2.0, 20)
    on_gpu = project(frames.cuda(), matrix)
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), project(frames, matrix))
    torch.testing.assert_close(evaluate(on_gpu, [0.1], 2.0).cpu(), evaluate(project(frames, matrix), [0.1], 2.0))
    torch.testing.assert_close(basis_torch(torch.rand(9).cuda(), 20).shape, torch.Size([9, 20]))


def test_a_batch_of_clips_with_different_frame_counts() -> None:
    random = np.random.default_rng(0)
    frames = np.zeros((3, 6, 2, 2), dtype=np.float32)
    matrices = np.zeros((3, 6, 10))
    for row, count in enumerate((6, 1, 4)):
        frames[row, :count] = random.standard_normal((count, 2, 2))
        matrices[row, :count] = projection_matrix(np.sort(random.uniform(0, 2, count)), 2.0, 10)
    for found in (project(frames, matrices), project(torch.from_numpy(frames), torch.from_numpy(matrices)).numpy()):
        for row, count in enumerate((6, 1, 4)):
            alone = project(frames[row, :count], matrices[row, :count])
            np.testing.assert_allclose(found[row], alone, atol=1e-6)


def test_one_frame_is_a_still_and_two_a_line() -> None:
    for method in EXACT:
        np.testing.assert_array_equal(projection_matrix([0.7], 2.0, 3, method), [[1, 0, 0]])
    line = project(np.array([1.0, 3.0]), projection_matrix([0.0, 2.0], 2.0, 9))
    np.testing.assert_allclose(evaluate(line, [0.0, 0.5, 2.0], 2.0), [1.0, 1.5, 3.0], atol=1e-14)


def test_frames_outside_the_window_tame_its_ends() -> None:
    times = np.arange(-3, 28) / 12
    signal = np.sin(3 * times + 1)
    inside = (times >= 0) & (times <= 2)
    error = {}
    for name, kept, outside in (("inside", inside, False), ("outside", times > -9, True)):
        path = project(signal[kept], projection_matrix(times[kept], 2.0, 50, outside=outside))
        error[name] = abs(derivative(path, [0.0], 2.0)[0] - 3 * np.cos(1))
    assert error["outside"] < 0.2 * error["inside"]
    for method in EXACT:
        still = projection_matrix(times, 2.0, 50, method, outside=True).sum(axis=0)
        np.testing.assert_allclose(still, np.eye(50)[0], atol=1e-12)


def test_least_squares_recovers_a_polynomial_and_warns_where_it_cannot() -> None:
    times = np.sort(np.random.default_rng(0).uniform(0, 2, 30))
    truth = np.array([0.3, -1.0, 0.5, 2.0])
    signal = evaluate(truth, times, 2.0)
    np.testing.assert_allclose(project(signal, projection_matrix(times, 2.0, 4, "lstsq")), truth, atol=1e-12)
    ridged = project(signal, projection_matrix(times, 2.0, 20, "lstsq", ridge=1e-6))
    np.testing.assert_allclose(ridged[:4], truth, atol=1e-2)
    with pytest.warns(UserWarning, match="order 20 and 30 frames is ill-conditioned"):
        projection_matrix(times, 2.0, 20, "lstsq")


def test_a_grid_is_computed_once() -> None:
    times = midpoints(21)
    first = projection_matrix(times, 2.0, 17)
    assert projection_matrix(times.tolist(), 2.0, 17) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1


@pytest.mark.parametrize("power", [1, 2, 3])
def test_convergence_in_the_order(power: int) -> None:
    """(t - a)_+^k: slope -(k + 1/2) within 0.15, below the bound -(k - 1/2) of Lemma 5.2, from projections we make."""
    kink = 0.37
    r = np.unique(np.append(np.linspace(0, 1, 1201), kink))
    # For k > 1 the natural spline through dense frames that end flat at r = 1: only the kink limits the convergence.
    weight = np.where(r < kink, 0, (r - kink) ** power) * (1 - r) ** 4 * (1 + 4 * r)
    method = "cubic" if power > 1 else "linear"
    energy = np.square(project(weight, projection_matrix(r, 1.0, 400, method)))
    errors = np.sqrt(np.append(np.cumsum(energy[::-1])[::-1][1:], 0.0) / energy.sum())  # of keeping 1, 2, .. orders
    orders = np.arange(24, 97)
    slope = np.polyfit(np.log(orders), np.log(errors[orders - 1]), 1)[0]
    assert abs(slope + power + 0.5) < 0.15
    assert slope < -(power - 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": [0.1, 0.5, 0.5]}, r"times\[2\] is 0.5 s, not after times\[1\], 0.5 s"),
        ({"times": [0.1, 0.9, 0.5]}, r"times\[2\] is 0.5 s, not after"),
        ({"times": [0.1, np.nan]}, r"times\[1\] is nan"),
        ({"times": [-0.1, 1.0]}, r"times\[0\] is -0.1 s, outside the window from 0 to 2.0 s"),
        ({"times": [0.1, 2.1]}, r"times\[1\] is 2.1 s, outside"),
        ({"times": []}, r"times has the shape \(0,\)"),
        ({"times": [[0.1, 0.2]]}, r"times has the shape \(1, 2\)"),
        ({"order": 0}, "order is 0"),
        ({"order": 2.5}, "order is 2.5"),
        ({"order": True}, "order is True"),
        ({"duration": 0.0}, "duration is 0.0"),
        ({"duration": np.inf}, "duration is inf"),
        ({"method": "spline"}, "method is 'spline'; it must be one of hold"),
        ({"times": [0.1, 0.2, 0.5], "method": "bilinear"}, "times have gaps from 0.05 to 0.15 .* 'bilinear'"),
        ({"times": [0.1, 0.2, 0.5], "method": "paper"}, "times have gaps from 0.05 to 0.15 .* 'paper'"),
        ({"ridge": 0.1}, "ridge is 0.1 with method 'cubic'"),
        ({"ridge": -0.1, "method": "lstsq"}, "ridge is -0.1"),
        ({"outside": True, "method": "lstsq"}, "outside is True with method 'lstsq'"),
    ],
)
def test_bad_grids_are_refused_by_name_and_value(change: dict, message: str) -> None:
    arguments = {"times": [0.1, 0.5, 1.9], "duration": 2.0, "order": 4, **change}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ValueError, match=message):
            projection_matrix(**arguments)


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy])
def test_bad_frames_are_refused_by_name_and_value(convert) -> None:
    matrix = projection_matrix(midpoints(5), 2.0, 4)
    for bad in (np.nan, np.inf):
        frames = np.zeros((5, 3, 2))
        frames[2, 1, 1] = bad
        with pytest.raises(ValueError, match=r"latents\[2\] holds values that are not finite \(1 such frames\)"):
            project(convert(frames), matrix)
    with pytest.raises(ValueError, match=r"latents of shape \(4, 3\) do not fit a matrix of shape \(5, 4\)"):
        project(convert(np.zeros((4, 3))), matrix)
    with pytest.raises(ValueError, match=r"times\[1\] is 2.5 s, outside"):
        evaluate(convert(np.zeros((4, 3))), [0.0, 2.5], 2.0)
    with pytest.raises(ValueError, match=r"coefficients have the shape \(0, 3\)"):
        evaluate(convert(np.zeros((0, 3))), [0.0], 2.0)


def test_every_method_is_named() -> None:
    for method in METHODS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert projection_matrix(midpoints(9), 2.0, 4, method).shape == (9, 4)
