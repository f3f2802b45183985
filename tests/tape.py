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
        self._allocated: set[int] = set()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, results))
        self._allocated |= places(results) - places((args, kwargs))
        return results

    def owned(self, results: Any) -> list[Tensor]:
        """Those of the results that lie in memory of its own."""
        return [x for x in tree_leaves(results) if isinstance(x, Tensor) and places(x) <= self._allocated]

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


def places(tree: Any) -> set[int]:
    """Where the memory of a tree's tensors begins."""
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, Tensor)}


class Pool:
    """As `streaming.stages.CudaGraphs`, but for that it has run the work already: the first replay does nothing.

    Recordings share memory: what one of them leaves may lie where an earlier one works, so that is spoilt whenever the
    earlier one is replayed.
    """

    def __init__(self) -> None:
        self._left: list[list[Tensor]] = []  # by each recording, in their order

    def __call__(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        tape, fresh = Tape(), [True]
        with tape:
            results = work()
        number = len(self._left)
        self._left.append(tape.owned(results))

        @torch.inference_mode()
        def replay() -> None:
            if fresh:
                fresh.clear()
                return
            for left in self._left[number + 1 :]:
                for x in left:
                    x.fill_(torch.nan if x.is_floating_point() else 111)
            tape.replay()

        return replay, results
