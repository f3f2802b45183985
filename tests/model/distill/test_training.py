"""The training loop: resuming to the same bits, budgets, bad losses, full disks, what it writes."""

import dataclasses
import json
import math
import signal
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.distill.training import Budget, Task, learning_rate, train
from model.errors import UserError
from tests.model.distill.conditions import quiet


def line_task(bad_step: int | None = None) -> Task[tuple[Tensor, int]]:
    """Learns y = 2 x + 1 from a few random points a step, with dropout, so that random numbers matter."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    steps = count()

    def batch(rng: np.random.Generator) -> tuple[Tensor, int]:
        return torch.from_numpy(rng.normal(size=(4, 1))).float(), next(steps)

    def loss(item: tuple[Tensor, int]) -> tuple[Tensor, dict[str, float]]:
        x, step = item
        value = (network(x) - 2 * x - 1).square().mean()
        return value * (math.nan if step == bad_step else 1), {"largest": x.abs().max().item()}

    optimizer = torch.optim.AdamW(network.parameters(), 0.02)

    def evaluate(network: nn.Module) -> dict[str, float]:
        return {"at zero": network(torch.zeros(1, 1)).item()}

    return Task("line", network, optimizer, batch, loss, evaluate, write=lambda _: None)


def test_the_line_is_learnt_and_the_averaged_weights_remain(tmp_path):
    task = line_task()
    counters = train(task, tmp_path, Budget(steps=600), evaluate_every=100, report=quiet)
    assert counters.step == 600
    assert task.network(torch.tensor([[1.0]])).item() == pytest.approx(3.0, abs=0.5)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name, tensor in task.network.state_dict().items():
        assert torch.equal(tensor, saved["average"][name])
        assert not torch.equal(tensor, saved["network"][name])
    rows = json.loads((tmp_path / "history.json").read_text())
    assert [row["step"] for row in rows if "at zero" in row] == [99, 199, 299, 399, 499, 599]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_resumes_to_the_same_bits(tmp_path, number):
    whole, cut = line_task(), line_task()
    train(whole, tmp_path / "whole", Budget(steps=60), seed=5, evaluate_every=25, report=quiet)
    before = signal.signal(number, signal.default_int_handler)  # a shell may have told us to ignore it

    def interrupt(item):
        if item[1] == 37:
            signal.raise_signal(number)
        return cut.loss(item)

    task = dataclasses.replace(cut, loss=interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(task, tmp_path / "cut", Budget(steps=60), seed=5, evaluate_every=25, report=quiet)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["counters"]["step"] == 38
    again = line_task()
    counters = train(again, tmp_path / "cut", Budget(steps=60), seed=5, resume=True, evaluate_every=25, report=quiet)
    assert counters.step == 60
    first, second = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))
    assert first["counters"]["history"] == second["counters"]["history"]
    for part in ("network", "average"):
        for name in first[part]:
            assert torch.equal(first[part][name], second[part][name])


def test_another_seed_gives_other_batches(tmp_path):
    losses = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        losses.append([row["loss"] for row in train(line_task(), folder, Budget(steps=5), seed, report=quiet).history])
    assert losses[0] != losses[1]


def test_minutes_are_counted_by_the_clock_over_all_runs(tmp_path):
    def clock_of(seconds: float):
        ticks = count()
        return lambda: seconds * next(ticks)

    counters = train(line_task(), tmp_path, Budget(minutes=1), clock=clock_of(1.0), report=quiet)
    steps = counters.step
    assert 10 < steps < 60
    resumed = train(line_task(), tmp_path, Budget(minutes=2), resume=True, clock=clock_of(1.0), report=quiet)
    assert resumed.seconds == pytest.approx(120, abs=5)
    assert steps + 10 < resumed.step < 2 * 60


def test_a_bad_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    ticks = count()
    with pytest.raises(UserError, match=r"the loss is nan for the batch of seed 7, step 30; .* holds step \d+"):
        train(line_task(30), tmp_path, Budget(steps=90), 7, save_seconds=10, clock=lambda: next(ticks), report=quiet)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < saved["counters"]["step"] <= 30
    assert all(torch.isfinite(tensor).all() for tensor in saved["network"].values())
    assert all(math.isfinite(row["loss"]) for row in saved["counters"]["history"])


def test_a_bad_loss_in_the_first_step_says_that_nothing_was_kept(tmp_path):
    with pytest.raises(UserError, match="no checkpoint was written yet"):
        train(line_task(0), tmp_path, Budget(steps=9), report=quiet)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, error):
    train(line_task(), tmp_path, Budget(steps=5), report=quiet)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        UserError, match=r"write to .*(No space left|is the disk full\?).*checkpoint.pt is the last good"
    ):
        train(line_task(), tmp_path, Budget(steps=9), resume=True, report=quiet)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "curves.png", "history.json"]


def test_a_folder_is_never_overwritten_or_resumed_by_mistake(tmp_path):
    with pytest.raises(UserError, match="does not exist: there is nothing to resume"):
        train(line_task(), tmp_path, Budget(steps=5), resume=True, report=quiet)
    train(line_task(), tmp_path, Budget(steps=5), report=quiet)
    with pytest.raises(UserError, match="exists: resume it, or choose another folder"):
        train(line_task(), tmp_path, Budget(steps=5), report=quiet)
    with pytest.raises(UserError, match="was trained with seed 0, not 1"):
        train(line_task(), tmp_path, Budget(steps=5), seed=1, resume=True, report=quiet)


@pytest.mark.parametrize("budget", [{}, {"steps": 3, "minutes": 1.0}, {"steps": 0}, {"minutes": -1.0}])
def test_a_budget_is_either_steps_or_minutes(budget):
    with pytest.raises(UserError, match="give one of the two"):
        Budget(**budget)


def test_learning_rate_warms_up_stays_and_decays():
    assert learning_rate(0.0, 0) == pytest.approx(1 / 50)
    assert learning_rate(0.3, 1000) == learning_rate(0.7, 1000) == 1.0
    assert learning_rate(0.85, 1000) == pytest.approx(0.5)
    assert learning_rate(1.0, 1000) == learning_rate(1.2, 1000) == 0.01
