"""Functions that run once as they are, are then captured, and then replayed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import VAEConfig
from model.vae import VAE
from streaming.cuda_graphs import GraphPool, StaticInput
from streaming.timers import StageTimer
from tests.fake_graphs import FakeGraphs

CPU = torch.device("cpu")


def counted(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []

    def call(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return call, calls


def test_a_function_runs_then_is_captured_then_replayed() -> None:
    double, calls = counted(lambda x: x * 2)
    graphed = GraphPool(StageTimer(CPU), FakeGraphs()).graphed(double, timer="double")
    x, static = torch.arange(3.0), torch.zeros(3)
    results = []
    for step in range(4):
        static.copy_(x + step)
        results.append(graphed(static))
        assert torch.equal(results[-1], (x + step) * 2)
    assert len(calls) == 2
    assert results[1] is results[2] is results[3]  # overwritten by a replay


def test_numbers_shapes_and_addresses_each_have_a_graph() -> None:
    power, calls = counted(lambda x, n: x**n)
    graphed = GraphPool(StageTimer(CPU), FakeGraphs()).graphed(power, timer="power")
    short, long, other = torch.full((2,), 2.0), torch.full((3,), 3.0), torch.full((2,), 5.0)
    for _ in range(3):
        assert torch.equal(graphed(short, 2), torch.full((2,), 4.0))
        assert torch.equal(graphed(short, 3), torch.full((2,), 8.0))
        assert torch.equal(graphed(long, 2), torch.full((3,), 9.0))
    assert len(calls) == 2 * 3
    # Shapes that have run once are captured at once when they lie elsewhere.
    assert torch.equal(graphed(other, 2), torch.full((2,), 25.0))
    assert torch.equal(graphed(other, 2), torch.full((2,), 25.0))
    assert torch.equal(graphed(short, 2), torch.full((2,), 4.0))
    assert len(calls) == 2 * 3 + 1


def test_arguments_of_a_graph_keep_their_memory() -> None:
    """A tensor that comes later must not take the address that a graph reads."""
    graphed = GraphPool(StageTimer(CPU), FakeGraphs()).graphed(lambda x: x + 1, timer="add")
    addresses = set()
    for number in range(10):
        x = torch.full((1000,), float(number))
        addresses.add(x.data_ptr())
        assert graphed(x)[0] == number + 1  # the first one runs, and later ones are captured and kept
        del x
    assert len(addresses) >= 9


def test_without_a_capture_every_call_runs_and_is_timed() -> None:
    timer = StageTimer(CPU)
    double, calls = counted(lambda x: x * 2)
    graphed = GraphPool(timer, None).graphed(double, timer="double")
    for _ in range(3):
        graphed(torch.ones(1))
    assert len(calls) == 3
    assert timer.summary()["double"]["count"] == 3


def test_a_capture_that_fails_is_tried_again() -> None:
    outcomes: list[float | Exception] = [1.0, MemoryError(), 2.0, 3.0]

    def work() -> Tensor:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return torch.tensor(outcome)

    graphed = GraphPool(StageTimer(CPU), FakeGraphs()).graphed(work, timer="work")
    assert graphed() == 1
    with pytest.raises(MemoryError):
        graphed()
    assert graphed() == 2
    assert graphed() == 2
    assert outcomes == [3.0]


def test_a_first_run_that_fails_is_no_first_run() -> None:
    outcomes: list[float | Exception] = [MemoryError(), 1.0, 2.0]

    def work() -> Tensor:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return torch.tensor(outcome)

    graphed = GraphPool(StageTimer(CPU), FakeGraphs()).graphed(work, timer="work")
    with pytest.raises(MemoryError):
        graphed()
    assert [float(graphed()) for _ in range(3)] == [1, 2, 2]


@torch.inference_mode()
@pytest.mark.parametrize("sizes", [[1], [1, 1], [1, 2, 2], [1, 1, 2, 1], [1, 1, 1, 1, 1]])
def test_clips_with_pairs_of_caches_are_repeated(sizes: list[int]) -> None:
    """Whatever the number of steps, odd or even: a clip's first step begins with the same buffers in the same roles."""
    torch.manual_seed(0)
    copied = VAE(VAEConfig(dim=2, z_dim=2, num_res_blocks=1, latent_mean=(0.0, 0.1), latent_std=(1.0, 1.1)))
    pairs, static = copy.deepcopy(copied), StaticInput(CPU)
    pairs.pair_caches()
    step, calls = counted(lambda _, latents, state: pairs.decode_step(latents, state))
    graphed = GraphPool(StageTimer(CPU), FakeGraphs()).graphed(step, timer="decode")
    for _ in range(5):
        clip = torch.randn(sum(sizes), 2, 2, 3)
        latents, wanted, state = static(clip).split(sizes), None, None
        for i, part in enumerate(clip.split(sizes)):
            want, wanted = copied.decode_step(part, wanted)
            got, state = graphed(i, latents[i], state)
            assert torch.equal(got, want)
    assert len(calls) == 2 * len(sizes)


def test_inputs_of_the_same_shapes_share_memory() -> None:
    static = StaticInput(CPU)
    first, second = ({"a": torch.rand(2), "b": (torch.rand(3), torch.rand(1).int())} for _ in range(2))
    buffers = static(first)
    assert buffers["a"] is not first["a"]
    assert torch.equal(buffers["b"][0], first["b"][0])
    assert static(second) is buffers
    assert torch.equal(buffers["a"], second["a"])
    longer = static({"a": torch.rand(3), "b": second["b"]})
    assert longer["b"][0] is not buffers["b"][0]
    assert StaticInput(CPU)(first)["a"] is not buffers["a"]


def test_constants_are_copied_when_others_come() -> None:
    static = StaticInput(CPU, constant=True)
    one, two = torch.zeros(2), torch.ones(2)
    buffers = static((one,))
    buffers[0].fill_(7)
    assert static((one,))[0].sum() == 14  # not copied again
    assert static((two,))[0].sum() == 2
    assert static((one,))[0].sum() == 0
