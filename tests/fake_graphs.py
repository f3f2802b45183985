"""A model of CUDA graphs for machines without CUDA: operations are recorded, and repeated on the same memory."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class Recording(TorchDispatchMode):
    """Records every operation of the body, with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._allocated: set[int] = set()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, results))
        self._allocated |= storages(results) - storages((args, kwargs))
        return results

    def allocated(self, results: Any) -> list[Tensor]:
        """The tensors among `results` whose memory the body allocated."""
        return [x for x in tree_leaves(results) if isinstance(x, Tensor) and storages(x) <= self._allocated]

    def replay(self) -> None:
        """Runs the operations again; each writes its results where the first run had them."""
        for call in self._calls:
            repeat_operation(*call)


@torch.inference_mode()
def repeat_operation(func: Any, args: Any, kwargs: Any, results: Any) -> None:
    """Runs an operation again and writes its results into `results`, the tensors of the first run."""
    for result, value in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
        if not isinstance(result, Tensor):
            assert result == value, f"{func} gave a number that depends on the values"
        elif result.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():  # no view
            result.copy_(value)


def storages(tree: Any) -> set[int]:
    """The addresses of the storages of a tree's tensors."""
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, Tensor)}


class FakeGraphs:
    """A capture of `streaming.cuda_graphs`, which however runs the work at once, so that the first replay does nothing.

    Graphs share memory: the results of one may lie where an earlier one keeps intermediate values. So replaying a graph
    overwrites the results of all graphs that were captured after it.
    """

    def __init__(self) -> None:
        self._results: list[list[Tensor]] = []  # of each graph, in the order of capture

    def __call__(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        recording, fresh = Recording(), [True]
        with recording:
            results = work()
        number = len(self._results)
        self._results.append(recording.allocated(results))

        @torch.inference_mode()
        def replay() -> None:
            if fresh:
                fresh.clear()
                return
            for later in self._results[number + 1 :]:
                for x in later:
                    x.fill_(torch.nan if x.is_floating_point() else 111)
            recording.replay()

        return replay, results
