"""Order and method chosen by data; what that is worth on films: tests/pipeline/experiments/test_projection.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.legs import evaluate, project, projection_matrix
from model.legs.select import (
    choose,
    clip_method,
    default_methods,
    leave_one_out,
    residual_operators,
)


def walk(count: int = 14, width: int = 30) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    times = np.sort(random.uniform(0, 2, count))
    return times, np.cumsum(random.standard_normal((count, width)), axis=0)


def left_out_one_by_one(frames: np.ndarray, times: np.ndarray, order: int, method: str) -> float:
    """The slow truth: project without a frame, read at its time."""
    errors = []
    for k in range(1, len(times) - 1):
        others = np.delete(np.arange(len(times)), k)
        path = project(frames[others], projection_matrix(times[others], 2.0, order, method))
        errors.append(np.mean(np.square(evaluate(path, times[k : k + 1], 2.0)[0] - frames[k])))
    return float(np.mean(errors))


@pytest.mark.parametrize("method", ["hold", "linear", "cubic", "lstsq"])
def test_the_cached_operator_gives_the_true_error(method: str) -> None:
    times, frames = walk()
    for order in (1, 4) if method == "lstsq" else (1, 7, 28):
        truth = left_out_one_by_one(frames, times, order, method)
        assert leave_one_out(frames, times, 2.0, order, method) == pytest.approx(truth, rel=1e-10)
        on_torch = leave_one_out(torch.from_numpy(frames), times, 2.0, order, method)
        assert on_torch == pytest.approx(truth, rel=1e-10)
    assert residual_operators(times, 2.0, (4,), method) is residual_operators(times.copy(), 2.0, (4,), method)


@pytest.mark.parametrize("method", ["hold", "linear", "cubic"])
def test_a_frame_after_the_window_is_known_to_the_errors(method: str) -> None:
    """It predicts the others and is not left out itself; where it changes nothing the choice is the same."""
    times, frames = walk()
    times[-1] = 2.1
    errors = []
    for k in range(1, len(times) - 1):
        others = np.delete(np.arange(len(times)), k)
        path = project(frames[others], projection_matrix(times[others], 2.0, 20, method, outside=True))
        errors.append(np.mean(np.square(evaluate(path, times[k : k + 1], 2.0)[0] - frames[k])))
    choice = choose(frames, times, 2.0, orders=(20,), methods=(method,), outside=True)
    assert choice.error == pytest.approx(float(np.mean(errors)), rel=1e-10)
    even = np.append(np.arange(16) / 8, 2.0)
    smooth, jumps = np.sin(4 * even)[:, None], np.where(even[:, None] >= [0.5, 1.0, 1.3], 1.0, 0.0)
    assert [clip_method(latents, even, 2.0, 32, "auto", outside=True) for latents in (smooth, jumps)] == [
        "cubic",
        "linear",
    ]
    with pytest.raises(ValueError, match="outside the window"):
        clip_method(frames, times, 2.0, 20, "auto")


def test_the_hat_matrix_shortcut_is_wrong_here_and_right_for_least_squares() -> None:
    times = (np.arange(14) + 0.5) / 7
    frames = np.sin(2 * times)[:, None] + 0.1 * np.cos(5 * times)[:, None]

    def shortcut(order: int, method: str) -> float:
        matrix = projection_matrix(times, 2.0, order, method)
        hat = np.stack([evaluate(row, times, 2.0) for row in matrix], axis=1)  # readout at the frames, from the frames
        residual = (frames - hat @ frames)[:, 0] / (1 - np.diag(hat))
        return float(np.mean(np.square(residual[1:-1])))

    truth = left_out_one_by_one(frames, times, 28, "cubic")
    assert not 0.2 < shortcut(28, "cubic") / truth < 5
    assert shortcut(5, "lstsq") == pytest.approx(left_out_one_by_one(frames, times, 5, "lstsq"), rel=1e-8)


def test_smooth_motion_chooses_the_spline_and_jumps_the_line() -> None:
    times = (np.arange(20) + 0.5) / 10
    smooth = np.sin(4 * times[:, None] + np.arange(5))
    jumps = np.where(np.arange(20)[:, None] >= np.array([3, 8, 11, 15, 17]), 1.0, 0.0)
    assert choose(smooth, times, 2.0).method == "cubic"
    assert choose(jumps, times, 2.0).method == "linear"
    choice = choose(smooth, times, 2.0, orders=(5, 20, 40))
    assert choice.errors[choice.method, choice.order] == choice.error == min(choice.errors.values())
    assert len(choice.errors) == 6
    together = choose(np.concatenate([smooth, jumps], axis=1), times, 2.0)
    alone = [choose(frames, times, 2.0).errors["cubic", 40] for frames in (smooth, jumps)]
    assert together.errors["cubic", 40] == pytest.approx(np.mean(alone), rel=1e-12)


def test_a_lower_order_is_padded_to_the_recipes() -> None:
    times = (np.arange(9) + 0.5) / 9
    choice = choose(np.sin(times)[:, None], times, 1.0, orders=(4,))
    matrix = choice.matrix(times, 1.0, padded_order=18)
    assert matrix.shape == (9, 18)
    assert not matrix[:, 4:].any()
    np.testing.assert_array_equal(matrix[:, :4], projection_matrix(times, 1.0, 4, choice.method))
    with pytest.raises(ValueError, match="padded_order is 3; the chosen order is 4"):
        choice.matrix(times, 1.0, padded_order=3)


def test_uneven_times_rule_the_spline_out() -> None:
    assert default_methods(np.array([0.0, 0.1, 0.25, 0.4])) == ("cubic", "linear")
    assert default_methods(np.array([0.0, 0.1, 0.5, 0.6])) == ("linear",)
    assert default_methods(np.array([0.0, 0.1, 0.42])) == ("cubic", "linear"), "3.2 times, as milliseconds round"
    times = np.array([0.0, 0.3, 0.31, 0.6, 0.61, 1.0])
    gain = {
        method: np.abs(evaluate(projection_matrix(times, 1.0, 200, method).T, np.linspace(0, 1, 101), 1.0)).sum(1).max()
        for method in ("cubic", "linear")
    }
    assert gain["cubic"] > 5 > gain["linear"], "what the rule is for"


def test_a_clips_method_is_its_recipes_or_its_own_choice() -> None:
    times = (np.arange(20) + 0.5) / 10
    smooth = np.sin(4 * times[:, None] + np.arange(5)).astype(np.float32)
    jumps = np.where(np.arange(20)[:, None] >= np.array([3, 8, 11, 15, 17]), 1.0, 0.0)
    assert clip_method(smooth, times, 2.0, 40, "auto") == "cubic"
    assert clip_method(jumps, times, 2.0, 40, "auto") == "linear"
    for order in (5, 40):
        errors = {name: leave_one_out(smooth, times, 2.0, order, name) for name in ("cubic", "linear")}
        assert clip_method(smooth, times, 2.0, order, "auto") == min(errors, key=lambda name: errors[name])
    assert clip_method(smooth, times, 2.0, 40, "hold") == "hold"
    assert clip_method(jumps, times, 2.0, 40, "cubic") == "cubic", "what a recipe asks for is done"
    uneven = np.array([0, 0.1, 0.2, 0.55])
    assert [clip_method(smooth[:4], uneven, 2.0, 8, name) for name in ("auto", "cubic", "hold")] == [
        "linear", "linear", "hold"
    ]  # fmt: skip
    assert clip_method(smooth[:4], uneven - [0, 0, 0, 0.1], 2.0, 8, "cubic") == "cubic", "gaps 1 to 2.5"
    assert clip_method(smooth[:2], times[:2], 2.0, 4, "auto") == "linear", "two frames leave nothing to compare"
    with pytest.raises(ValueError, match="times must strictly increase"):
        clip_method(smooth[:3], np.array([0, 0.5, 0.5]), 2.0, 6, "auto")


def test_bad_input_is_refused() -> None:
    times = np.array([0.1, 0.5, 0.9])
    with pytest.raises(ValueError, match="times holds 2 times; leaving one out takes at least 3"):
        leave_one_out(np.zeros((2, 1)), times[:2], 1.0, 4)
    with pytest.raises(ValueError, match=r"latents\[1\] holds values that are not finite"):
        choose(np.array([[0.0], [np.nan], [1.0]]), times, 1.0)
    with pytest.raises(ValueError, match="latents hold 2 frames, times hold 3"):
        choose(np.zeros((2, 1)), times, 1.0)
    with pytest.raises(ValueError, match=r"latents have the shape \(3, 0\)"):
        choose(np.zeros((3, 0)), times, 1.0)
    with pytest.raises(ValueError, match="leave nothing to choose from"):
        choose(np.zeros((3, 1)), times, 1.0, orders=())
    with pytest.raises(ValueError, match=r"orders is \(0,\)"):
        choose(np.zeros((3, 1)), times, 1.0, orders=(0,))
