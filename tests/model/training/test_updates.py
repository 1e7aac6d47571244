"""A step that must not be made changes nothing, decided on the device; the host may hear of it some steps later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from model.stop import Stopped, StopSignal
from model.training.checkpoint import Run, restore, save, tensors_by_file
from model.training.ema import MovingAverage
from model.training.grams import Grams
from model.training.log import read_log
from model.training.loop import Schedule, Training, run_training
from model.training.muon import Muon, orthogonal
from model.training.optimizers import adamw
from model.training.processes import ALONE
from model.training.state import TrainingState
from model.training.updates import Updates

KINDS: Mapping[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda params: AdamW(params, 1e-2, weight_decay=0.1, fused=True),
    "grams": lambda params: Grams(params, 1e-2, weight_decay=0.1),
    "muon": lambda params: Muon(params, 1e-2),
}


def trained(kind: str, bad: set[int], steps: int = 6) -> tuple[TrainingState, dict[str, Tensor]]:
    torch.manual_seed(0)
    network = nn.Linear(6, 3, bias=False)
    state = TrainingState(network, MovingAverage(network, 0.9), [KINDS[kind]([network.weight])])
    updates = Updates(state, 1.0, 3, Path("run"), ALONE)
    for step in range(1, steps + 1):
        loss = network(torch.linspace(-1, 2, 6)).square().sum()
        (loss * torch.nan if step in bad else loss).backward()
        updates.apply(step, loss)
    found = tensors_by_file(state)
    list(updates.outcomes())
    assert updates.skipped == len(bad)
    return state, {f"{file}/{name}": value for file, tensors in found.items() for name, value in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_skipped_steps_is_one_without_them(kind: str) -> None:
    """Weights, average, moments, counts of steps and the norms' mean, bit by bit; the first step may be one."""
    state, found = trained(kind, {1, 3, 4})
    other, expected = trained(kind, set(), steps=3)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert state.state_dict()["norms"] == other.state_dict()["norms"]
    assert state.state_dict()["average"]["updates"] == 3


@pytest.mark.parametrize("late", [0, 1, 3])
def test_however_late_the_host_hears_of_them_nothing_else_changes(
    late: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped steps in the log, checkpoints that wait for a good step, the end after too many, and a stop."""
    monkeypatch.setattr("model.training.loop.late", lambda device: late)

    def run(name: str, bad: set[int], stop: StopSignal, stop_at: int = 99) -> Run:
        torch.manual_seed(0)
        network = nn.Linear(4, 4)
        state = TrainingState(network, MovingAverage(network, 0.9), [adamw(network.parameters(), 1e-2, 0.0, 0.9)])

        def losses(step: int, _: None) -> dict[str, Tensor]:
            if step == stop_at:
                stop.seen = True
            loss = network(torch.linspace(-1, 1, 4)).square().mean()
            return {"loss": loss * torch.nan if step in bad else loss}

        training = Training(losses, lambda step: 1.0, gradient_clip=1.0, samples=1)
        plan = Schedule(20, log_every=6, checkpoint_every=5, checkpoints_kept=9, bad_steps_allowed=2)
        run_training(training, state, Run(tmp_path / name), plan, ALONE, stop)
        return Run(tmp_path / name)

    def skipped(run: Run) -> list[int]:
        return [line["step"] for line in read_log(run.log) if line.get("event") == "skipped"]

    whole = run("whole", {2, 5, 9, 10, 14}, StopSignal())
    assert skipped(whole) == [2, 5, 9, 10, 14]
    assert whole.steps() == [6, 11, 15, 20]
    assert [line["step"] for line in read_log(whole.log) if "loss" in line] == [6, 12, 18, 20]
    with pytest.raises(FloatingPointError, match=r"at step 9 .* 3 steps in a row where 2 are allowed"):
        run("ended", {7, 8, 9}, StopSignal())
    assert Run(tmp_path / "ended").steps() == [5]
    with pytest.raises(Stopped):
        run("stopped", {8}, StopSignal(), stop_at=8)
    assert Run(tmp_path / "stopped").steps() == [5, min(8 + late, 10)], "a checkpoint is due after 10: there it looks"
    assert skipped(Run(tmp_path / "stopped")) == [8]


def test_muon_is_the_published_one() -> None:
    """Singular values come near 1, and a step is torch's, which iterates in bfloat16."""
    torch.manual_seed(0)
    for shape in ((5, 9), (9, 5), (6, 6)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, dtype=torch.float64)))
        assert 0.4 < float(values.min()) <= float(values.max()) < 1.3
        weight = torch.randn(shape)
        ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
        optimizers = (
            Muon([ours], lr=0.1, weight_decay=0.2),
            torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        )
        for _ in range(3):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        moved = float((ours - weight).detach().norm())
        assert float((ours - theirs).detach().norm()) < 0.03 * moved


def test_what_an_older_program_saved_of_its_optimisers_goes_on_with_ours(tmp_path: Path) -> None:
    """Its settings of how to compute do not come along: AdamW stays fused, which can leave out a step."""
    network = nn.Linear(3, 3)
    network(torch.ones(3)).sum().backward()
    matrices, rest = [network.weight], [network.bias]
    before = [torch.optim.AdamW(rest, 1e-2), torch.optim.Muon(matrices, 1e-2)]
    for optimizer in before:
        optimizer.step()
    now = [AdamW(rest, 1e-2, fused=True), Muon(matrices, 1e-2)]
    state = TrainingState(network, MovingAverage(network, 0.9), now)
    saved = TrainingState(network, MovingAverage(network, 0.9), before).state_dict()
    state.load_state_dict(saved)
    assert now[0].param_groups[0]["fused"] is True
    list_of_steps = Updates(state, 1.0, 3, tmp_path, ALONE)
    network(torch.ones(3)).sum().backward()
    list_of_steps.apply(2, torch.tensor(torch.nan))
    assert float(now[0].state[network.bias]["step"]) == 1


def test_a_restored_state_lies_in_memory_as_its_parameter_does(tmp_path: Path) -> None:
    """Fused AdamW on a CPU mixes the values up where it does not: weights of convolutions may be channels last."""

    def fresh() -> TrainingState:
        torch.manual_seed(0)
        network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return TrainingState(network, MovingAverage(network, 0.9), [adamw(network.parameters(), 1e-2, 0.0, 0.9)])

    def step(state: TrainingState) -> None:
        state.network(torch.linspace(-1, 1, 75).view(1, 3, 5, 5)).square().sum().backward()
        state.optimizers[0].step()
        state.optimizers[0].zero_grad()

    one, other = fresh(), fresh()
    step(one)
    save(Run(tmp_path), one, 1)
    restore(Run(tmp_path).folder(0), other)
    for state in (one, other):
        step(state)
    assert torch.equal(one.network.weight, other.network.weight)
