"""Samples, rotation of inputs, and the order of rounds; times themselves are not tested."""

from collections import Counter

import pytest
import torch

from profiling.measure import timing
from profiling.measure.timing import CallTimer, interleave, num_input_sets

CPU = torch.device("cpu")


def test_calls_take_turns_and_fill_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.SAMPLE_SECONDS, "cpu", 0.002)
    calls: Counter[str] = Counter()
    timed = CallTimer([lambda: calls.update("a"), lambda: calls.update("b")], CPU)
    before = calls.total()
    seconds = timed.sample()
    made = calls.total() - before
    assert made > 1
    assert abs(calls["a"] - calls["b"]) <= 1
    assert 0 < seconds < 0.1
    assert not timed.graph


class Recorded:
    """Stands for a `CallTimer`; its samples are numbers one after the other."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log, self._count = name, log, 0

    def sample(self) -> float:
        self._log.append(self._name)
        self._count += 1
        return float(self._count)


def test_rounds_are_interleaved_in_changing_order_after_a_sample_that_does_not_count() -> None:
    log: list[str] = []
    samples = interleave([Recorded(name, log) for name in "abc"], 6, seed=1)  # type: ignore[list-item]
    assert samples == [[2.0, 4.0, 6.0, 8.0, 10.0, 12.0]] * 3
    rounds = ["".join(log[i : i + 6]) for i in range(0, 36, 6)]
    assert all(sorted(order) == list("aabbcc") and order[::2] == order[1::2] for order in rounds)
    assert len(set(rounds)) > 1


def test_slow_calls_get_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "INTERLEAVE_SECONDS", 0.0)
    (samples,) = interleave([Recorded("a", [])], 100, seed=1)  # type: ignore[list-item]
    assert len(samples) == timing.MIN_ROUNDS


def test_input_sets_on_a_gpu_outgrow_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    gpu = torch.device("cuda")
    assert num_input_sets(500e6, gpu) == 2
    assert num_input_sets(25 * 2**20, gpu) == 8
    assert num_input_sets(1000, gpu) == timing.MAX_INPUT_SETS
    assert num_input_sets(1000, CPU) == 2


@pytest.mark.gpu
def test_a_gpu_sample_is_a_graph_of_rotating_calls() -> None:
    gpu = torch.device("cuda")
    sets = [torch.randn(1024, 1024, device=gpu) for _ in range(2)]
    timed = CallTimer([lambda x=x: x @ x for x in sets], gpu)
    assert timed.graph
    assert 1e-6 < timed.sample() < 1e-2


@pytest.mark.gpu
def test_calls_can_be_launched_without_a_graph() -> None:
    x = torch.randn(2**20, device="cuda")
    timed = CallTimer([x.clone], torch.device("cuda"), capture=False)
    assert not timed.graph
    assert timed.sample() > 0
