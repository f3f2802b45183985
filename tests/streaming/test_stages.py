"""Stages: run once as they are, then recorded, then replayed."""

from typing import Any

import torch

from streaming.stages import Stages
from tests.tape import Pool

CPU = torch.device("cpu")


def test_a_stage_runs_then_is_recorded_then_replayed() -> None:
    stages, runs = Stages(Pool()), []
    x, place = torch.arange(3.0), torch.zeros(3)

    def work() -> torch.Tensor:
        runs.append(1)
        return place * 2

    results = []
    for step in range(4):
        place.copy_(x + step)
        results.append(stages.run("twice", work))
        assert torch.equal(results[-1], (x + step) * 2)
    assert len(runs) == 2
    assert results[1] is results[2] is results[3]  # overwritten by a replay
    assert stages.run("another", lambda: 5) == 5


def test_nothing_is_recorded_without_a_recorder() -> None:
    stages, runs = Stages(None), []
    for _ in range(3):
        stages.run("work", lambda: runs.append(1))
    assert len(runs) == 3
    assert not stages.recording


def test_what_cannot_be_recorded_is_tried_again() -> None:
    stages = Stages(Pool())
    outcomes: list[Any] = [1, MemoryError(), 2, 3]

    def work() -> torch.Tensor:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return torch.tensor(outcome)

    assert stages.run("work", work) == 1
    try:
        stages.run("work", work)
    except MemoryError:
        pass
    else:
        raise AssertionError
    assert stages.run("work", work) == 2
    assert stages.run("work", work) == 2
    assert outcomes == [3]


def test_inputs_are_held_in_one_place() -> None:
    stages = Stages(Pool())
    first, second = ({"a": torch.rand(2), "b": (torch.rand(3), torch.rand(1).int())} for _ in range(2))
    held = stages.hold("inputs", first, CPU)
    assert held["a"] is not first["a"]
    assert torch.equal(held["b"][0], first["b"][0])
    assert stages.hold("inputs", second, CPU) is held
    assert torch.equal(held["a"], second["a"])
    assert stages.hold("others", first, CPU)["a"] is not held["a"]


def test_constants_are_copied_when_others_come() -> None:
    stages = Stages(Pool())
    one, two = torch.zeros(2), torch.ones(2)
    held = stages.hold("constants", (one,), CPU, constant=True)
    held[0].fill_(7)
    assert stages.hold("constants", (one,), CPU, constant=True)[0].sum() == 14  # not again
    assert stages.hold("constants", (two,), CPU, constant=True)[0].sum() == 2
    assert stages.hold("constants", (one,), CPU, constant=True)[0].sum() == 0
