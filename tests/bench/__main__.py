# ruff: noqa: E402  (the number of threads is read from the environment when numpy and torch are imported)
"""`python -m tests.bench [--json]`: the goals G1, G2, G3 and G8 of the mathematics, beside their peers and limits.

Ratios inside one run: one thread, process time, rounds in which all contestants take turns, medians.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from model.codecs.batches import Networks
from model.codecs.ddim import DDIMSchedule, inverse_step, invert, regenerate, step
from model.flow.path import WarmupPath
from model.flow.solver import solve
from model.legs import basis, evaluate, project, projection_matrix, recurrence_matrices
from tests.bench.sd15 import SMALL_UNET, TINY_VAE, Plan, build

FRAMES, WIDTH, WINDOW = 48, 16384, 2.0
LEVELS, BATCH = 10, 8
PEAK_SIDE = 1536


def medians(contestants: dict[str, Callable[[], object]], rounds: int, seconds: float = 0.03) -> dict[str, float]:
    """Median process seconds of one call, by contestant; each round gives every contestant about `seconds`."""
    repeats, samples = {}, {name: [] for name in contestants}
    for name, call in contestants.items():
        call()
        start = time.process_time()
        call()
        repeats[name] = max(1, round(seconds / max(time.process_time() - start, 1e-5)))
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.process_time() - start) / repeats[name])
    return {name: float(np.median(values)) for name, values in samples.items()}


def g1_projection(rounds: int) -> list[dict[str, object]]:
    """A clip's projection against the recurrences, and against the peak of the same library's matrix product."""
    rows: list[dict[str, object]] = []
    random = np.random.default_rng(0)
    frames = random.standard_normal((FRAMES, WIDTH), dtype=np.float32)
    tensor = torch.from_numpy(frames)
    side = random.standard_normal((PEAK_SIDE, PEAK_SIDE), dtype=np.float32)
    side_tensor, side_out = torch.from_numpy(side), np.empty_like(side)
    side_tensor_out = torch.from_numpy(np.empty_like(side))
    times = (np.arange(FRAMES) + 0.5) * WINDOW / FRAMES
    for order, goal in ((32, 25), (64, 50)):
        matrix = projection_matrix(times, WINDOW, order)
        transition, inlet = recurrence_matrices(order)
        identity = np.eye(order)
        left = [identity + transition / (2 * k) for k in range(1, FRAMES + 1)]
        right = [identity - transition / (2 * k) for k in range(1, FRAMES + 1)]
        steps = [
            (np.linalg.solve(a, b).astype(np.float32), np.linalg.solve(a, inlet / k).astype(np.float32))
            for k, (a, b) in enumerate(zip(left, right, strict=True), start=1)
        ]
        step_tensors = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in steps]
        solves = [
            (a.astype(np.float32), b.astype(np.float32), (inlet / k).astype(np.float32))
            for k, (a, b) in enumerate(zip(left, right, strict=True), start=1)
        ]

        def textbook(solves: list = solves, order: int = order) -> np.ndarray:
            state = np.zeros((order, WIDTH), np.float32)
            for (implicit, explicit, into), frame in zip(solves, frames, strict=True):
                state = np.linalg.solve(implicit, explicit @ state + np.outer(into, frame))
            return state

        def precomputed(steps: list = steps, order: int = order) -> np.ndarray:
            state = np.zeros((order, WIDTH), np.float32)
            for (move, into), frame in zip(steps, frames, strict=True):
                state = move @ state
                state += np.outer(into, frame)
            return state

        def precomputed_torch(steps: list = step_tensors, order: int = order) -> torch.Tensor:
            state = torch.zeros(order, WIDTH)
            for (move, into), frame in zip(steps, tensor, strict=True):
                state = torch.addr(move @ state, into, frame)
            return state

        reference = projection_matrix(times, WINDOW, order, "bilinear").T @ frames
        assert np.abs(precomputed() - reference).max() < 1e-3 * np.abs(reference).max()
        taken = medians(
            {
                "ours": lambda matrix=matrix: project(frames, matrix),
                "ours_torch": lambda matrix=matrix: project(tensor, matrix),
                "precomputed": precomputed,
                "precomputed_torch": precomputed_torch,
                "textbook": textbook,
                "sgemm": lambda: np.matmul(side, side, out=side_out),
                "sgemm_torch": lambda: torch.mm(side_tensor, side_tensor, out=side_tensor_out),
            },
            rounds,
        )
        work = 2 * FRAMES * WIDTH * order
        for library, suffix, share_goal in (("numpy", "", 0.85), ("torch", "_torch", 0.60)):
            peak = 2 * PEAK_SIDE**3 / taken["sgemm" + suffix]
            share = work / taken["ours" + suffix] / peak
            speed = taken["precomputed" + suffix] / taken["ours" + suffix]
            rows.append(
                _row("G1", f"{library}, s={order}: times the recurrence with precomputed A_k", speed, goal, ">=")
            )
            rows.append(_row("G1", f"{library}, s={order}: share of the sgemm peak", share, share_goal, ">="))
        rows.append(
            _row(
                "G1",
                f"numpy, s={order}: times the textbook solve per step",
                taken["textbook"] / taken["ours"],
                None,
                "",
            )
        )
        rows.append(_row("G1", f"numpy, s={order}: ours, ms", 1e3 * taken["ours"], None, ""))
    return rows


def g2_accuracy() -> list[dict[str, object]]:
    """Error of the readout at the frames' own times against bilinear LegS read on its best grid."""
    rows: list[dict[str, object]] = []
    times = (np.arange(FRAMES) + 0.5) * WINDOW / FRAMES
    distance = (times[:, None] - times) / (WINDOW / 6)
    values, vectors = np.linalg.eigh(np.exp(-(distance**2) / 2))
    normal = np.random.default_rng(0).standard_normal((FRAMES, 512))
    signals = vectors @ (np.sqrt(np.maximum(values, 0))[:, None] * normal)
    for order, goal in ((16, 1 / 8), (32, 1 / 20)):
        bilinear = project(signals, projection_matrix(times, WINDOW, order, "bilinear"))
        best = min(
            _rms(evaluate(bilinear, (np.arange(FRAMES) + shift) * WINDOW / FRAMES, WINDOW) - signals)
            for shift in np.linspace(0, 1, 101)
        )
        ours = _rms(evaluate(project(signals, projection_matrix(times, WINDOW, order)), times, WINDOW) - signals)
        at_frames = basis(times, WINDOW, order)
        floor = _rms(at_frames @ np.linalg.lstsq(at_frames, signals, rcond=None)[0] - signals)
        rows.append(_row("G2", f"s={order}: error / bilinear at its best readout grid", ours / best, goal, "<="))
        rows.append(_row("G2", f"s={order}: the limit, least squares / bilinear", floor / best, None, ""))
    return rows


def g3_inversion(rounds: int) -> list[dict[str, object]]:
    """The DDIM loops against a small bare UNet, and a step against diffusers' schedulers."""
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    torch.manual_seed(0)
    networks = Networks(*build(Plan(SMALL_UNET, TINY_VAE), "cpu"))
    schedule = DDIMSchedule(LEVELS)
    latents, text = torch.randn(BATCH, 4, 16, 16), torch.randn(BATCH, 16, networks.unet.config.cross_attention_dim)
    ddim_steps = torch.tensor(schedule.timesteps)
    noise = networks.noise(text)

    @torch.no_grad()
    def bare(count: int = BATCH) -> None:
        for ddim_step in ddim_steps:
            networks.unet(latents[:count], ddim_step, text[:count])

    loops = medians(
        {
            "bare": bare,
            "invert": lambda: invert(latents, noise, schedule, refinements=0),
            "refine": lambda: invert(latents, noise, schedule, refinements=1),
            "regenerate": lambda: regenerate(latents, noise, schedule),
            "one": lambda: bare(count=1),
        },
        rounds,
    )
    # diffusers' own description of the values in model.codecs.ddim.
    values = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    down, up = (
        kind(**values, set_alpha_to_one=False, steps_offset=1) for kind in (DDIMScheduler, DDIMInverseScheduler)
    )
    down.set_timesteps(LEVELS)
    up.set_timesteps(LEVELS)
    levels = range(1, LEVELS)  # diffusers' schedulers differ at the level below which there is none
    eps = torch.randn_like(latents)
    steps = medians(
        {
            "step": lambda: [step(latents, eps, schedule, level) for level in levels],
            "inverse_step": lambda: [inverse_step(latents, eps, schedule, level) for level in levels],
            "scheduler": lambda: [down.step(eps, schedule.timesteps[level], latents) for level in levels],
            "inverse_scheduler": lambda: [up.step(eps, schedule.timesteps[level], latents) for level in levels],
        },
        rounds,
    )
    return [
        _row("G3", "inversion loop / (steps x bare UNet)", loops["invert"] / loops["bare"], 1.03, "<="),
        _row("G3", "with a refinement / (2 x steps x bare UNet)", loops["refine"] / loops["bare"] / 2, 1.03, "<="),
        _row("G3", "regeneration loop / (steps x bare UNet)", loops["regenerate"] / loops["bare"], 1.03, "<="),
        _row("G3", "DDIMScheduler.step / our step", steps["scheduler"] / steps["step"], 3, ">="),
        _row("G3", "DDIMInverseScheduler.step / ours", steps["inverse_scheduler"] / steps["inverse_step"], 3, ">="),
        _row("G3", f"{BATCH} frames one by one / in one batch", BATCH * loops["one"] / loops["bare"], 1.3, ">="),
    ]


def g8_frame_rate(rounds: int) -> list[dict[str, object]]:
    """A latent trajectory of 2 s, integrated and read at 64 and at 8 frames a second, with a small network."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(4, 192, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(192, 192, 3, padding=1), torch.nn.SiLU()
    ).append(torch.nn.Conv2d(192, 8, 3, padding=1))  # 0.7 GFLOP a call, a third of the demo recipe's backbone
    noise = torch.randn(1, 4, 32, 32)
    grid = torch.cat([torch.linspace(-0.25, 0, 9)[:-1], torch.linspace(0, 1, 33)]).double()
    calls: list[int] = []

    @torch.inference_mode()
    def trajectory(rate: int) -> torch.Tensor:
        def predict(x: torch.Tensor, flow_time: float) -> tuple[torch.Tensor, torch.Tensor]:
            mean, slope = network(x).chunk(2, dim=1)
            return mean, slope

        path = solve(WarmupPath(), predict, noise, grid)
        calls.append(path.network_calls)
        return path.read(torch.arange(int(WINDOW * rate)) / (WINDOW * rate))

    contestants = {"64": lambda: trajectory(64), "8": lambda: trajectory(8)}
    taken = medians(contestants, rounds)
    assert len(set(calls)) == 1, "the number of network calls depends on the frame rate"
    return [
        _row("G8", "latent trajectory at 64 fps / at 8 fps", taken["64"] / taken["8"], 1.02, "<="),
        _row("G8", "network calls at either rate", calls[0], None, ""),
    ]


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _row(goal_id: str, metric: str, value: float, goal: float | None, sense: str) -> dict[str, object]:
    met = None if goal is None else bool(value >= goal if sense == ">=" else value <= goal)
    return {"id": goal_id, "metric": metric, "value": float(value), "sense": sense, "goal": goal, "met": met}


def main(arguments: list[str] | None = None) -> int:
    """Print the table, or JSON; the status is 1 when a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds, at least 7 (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds < 7:
        parser.error(f"--rounds is {options.rounds}; a median takes at least 7")
    torch.set_num_threads(1)
    rows = [
        *g1_projection(options.rounds),
        *g2_accuracy(),
        *g3_inversion(options.rounds),
        *g8_frame_rate(options.rounds),
    ]
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
    else:
        for row in rows:
            goal = (
                "" if row["goal"] is None else f"{row['sense']} {row['goal']:.4g} {'met' if row['met'] else 'MISSED'}"
            )
            print(f"{row['id']:3} {row['metric']:58} {row['value']:10.4g}   {goal}")
    return 0 if all(row["met"] is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
