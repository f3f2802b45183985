"""The recorder: passes over memory, fused and not; compiled blocks; exchanges and what hides them."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from profiling.analyse.calls import FUSED_PASS, MATMUL, Call
from profiling.analyse.recorder import Exchange, Recorder


class Block(nn.Module):
    """Anything that is to be compiled."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> object:
        """Calls the function."""
        return self.function(*arguments)


def recorded(function: Callable[..., object], *arguments: Tensor, fused: bool = False) -> Counter[Call]:
    recorder, block = Recorder(), Block(function)
    with torch.inference_mode(), recorder, recorder.repeating([block] if fused else [], compiled=True):
        block(*arguments)
    return sum((found.calls for found in recorder.recorded()), Counter())


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_fused_passes_read_what_comes_from_outside_and_write_what_is_used_outside() -> None:
    def function(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        inner = (x * 2 + y).relu()  # read by the product
        product = inner @ w
        return product, inner.exp() + 1  # reads inner, writes the result

    calls = recorded(function, empty(1000, 100), empty(1000, 100), empty(100, 50), fused=True)
    assert sorted(c.bytes for c in calls.elements() if c.operation == FUSED_PASS) == [2 * 400e3, 3 * 400e3]
    (product,) = (c for c in calls if c.operation == MATMUL)
    assert (product.flops, product.dtype, calls[product]) == (2.0 * 1000 * 100 * 50, "fp32", 1)


def test_eager_passes_are_kernels_of_their_own_and_views_are_none() -> None:
    calls = recorded(lambda x: x[:500].T.reshape(-1).view(5, -1) * 2 + 1, empty(1000, 100))
    # reshape copies, then two passes
    assert [c.bytes for c in calls.elements()] == [2 * 200e3] * 3


def test_a_copy_reads_only_its_source() -> None:
    calls = recorded(lambda x, y: x.copy_(y), empty(1000), empty(1000, dtype=torch.bfloat16))
    assert [c.bytes for c in calls.elements()] == [4e3 + 2e3]


def test_results_are_of_the_type_that_a_number_makes_them() -> None:
    calls = recorded(lambda x: (x * 2, x * 2.0), empty(1000, dtype=torch.int64))
    assert [c.bytes for c in calls.elements()] == [8e3 + 8e3, 8e3 + 4e3]


def test_what_happens_on_the_host_is_not_recorded() -> None:
    assert not recorded(lambda x: x + 1, torch.zeros(3))


def layers(repeated: bool) -> Counter[Call]:
    """Three equal layers of a product between passes; compiled as one block each, or together as one."""

    def layer(x: Tensor, w: Tensor) -> Tensor:
        return ((x * 2).relu() @ w + 1).exp() + x

    def all_layers(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            x = layer(x, w)
        return x

    recorder, x, w = Recorder(), empty(1000, 100), empty(100, 100)
    blocks = [Block(layer if repeated else all_layers) for _ in range(3 if repeated else 1)]
    with torch.inference_mode(), recorder, recorder.repeating(blocks, compiled=True):
        for block in blocks:
            x = block(x, w)
    (found,) = recorder.recorded()
    return found.calls


def test_a_block_like_another_repeats_what_that_one_did() -> None:
    """Blocks are compiled each for itself, so a pass does not reach over their borders."""
    calls, together = layers(repeated=True), layers(repeated=False)
    assert {(c.operation, c.bytes): n for c, n in calls.items()} == {
        (FUSED_PASS, 2 * 400e3): 3,
        (FUSED_PASS, 3 * 400e3): 3,
        (MATMUL, 2 * 400e3 + 40e3): 3,
    }
    assert sum(together.values()) == 3 + 4  # a block's last pass and the next one's first are one


def test_a_module_of_another_group_repeats_nothing() -> None:
    recorder, x = Recorder(), empty(1000)
    double, twice = Block(lambda x: x * 2), Block(lambda x: x * 2 * 2)
    groups = (recorder.repeating([block], compiled=False) for block in (double, twice))
    with torch.inference_mode(), recorder, next(groups), next(groups):
        for block in (double, twice, double, twice):
            block(x)
    (found,) = recorder.recorded()
    assert list(found.calls.values()) == [6]


def test_the_modules_are_as_before_afterwards() -> None:
    recorder, block = Recorder(), Block(lambda x: x + 1)
    with recorder.repeating([block], compiled=True):
        assert "forward" in vars(block)
    assert "forward" not in vars(block)


def test_an_exchange_hides_behind_what_is_called_before_it_is_waited_for() -> None:
    recorder, x, received = Recorder(), empty(1000), empty(500)
    with torch.inference_mode(), recorder:
        recorder.begin("stage")
        x.exp()
        recorder.start_exchange("all", x, received, 2e3)
        x.exp()
        recorder.start_exchange("ring", x, empty(0), 0.0)
        x.exp()
        recorder.wait_for(received)
        x.exp()
    (found,) = recorder.recorded()
    assert found.stage == "stage"
    (exchange,) = found.exchanges
    assert (exchange.group, exchange.bytes, len(exchange.behind)) == ("all", 2e3, 2)
    assert found.exchanges[exchange] == 1
    assert isinstance(exchange, Exchange)
