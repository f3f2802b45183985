"""CUDA graphs for machines without CUDA: operations recorded one by one, and repeated on the same memory."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class Tape(TorchDispatchMode):
    """Keeps every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, results))
        return results

    def replay(self) -> None:
        """Runs the operations again; each result goes where it went the first time."""
        for call in self._calls:
            again(*call)


@torch.inference_mode()
def again(func: Any, args: Any, kwargs: Any, results: Any) -> None:
    """Runs an operation again; its results go where they went the first time."""
    for place, value in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
        if not isinstance(place, Tensor):
            assert place == value, f"{func} gave a number that depends on the values"
        elif place.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():  # no view
            place.copy_(value)


def record(work: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """As `streaming.stages.CudaGraphs`, but for that it has run the work already: the first replay does nothing."""
    tape, fresh = Tape(), [True]
    with tape:
        results = work()

    def replay() -> None:
        tape.replay() if not fresh else fresh.clear()

    return replay, results
