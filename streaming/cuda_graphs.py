"""CUDA graphs around functions that do the same in every chunk, and fixed memory for the inputs of graphs.

A CUDA graph launches hundreds of kernels at once, always on the same memory. `GraphPool.graphed` wraps a function: its
first call with arguments of given shapes runs as it is, since it may compile, allocate and choose algorithms; the next
call is captured; later ones are replayed. A graph reads the memory that its arguments had when it was captured. So a
tensor argument must be the result of another function of the pool, or of a `StaticInput`, or live for ever. Results are
overwritten by the next replay.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from model.offload import pin_memory_for
from streaming.timers import StageTimer

P = ParamSpec("P")
T = TypeVar("T")

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]  # work -> (replay, results)


class CudaGraphs:
    """Captures work as CUDA graphs. They share one memory pool, and so must not be replayed at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # of its own: a library's workspace belongs to a stream

    def __call__(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Captures `work`, which does not run yet. Other threads may use CUDA calls that a capture forbids."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            results = work()
        return graph.replay, results


@dataclass(frozen=True)
class _Graph:
    replay: Callable[[], None]
    results: Any
    arguments: tuple[Any, ...]  # kept, so that no other tensor takes their memory


class GraphPool:
    """Functions whose graphs share memory; without `capture` they run as they are. Every call is timed."""

    def __init__(self, timer: StageTimer, capture: Capture | None) -> None:
        self._timer, self._capture = timer, capture

    def graphed(self, function: Callable[P, T], timer: str) -> Callable[P, T]:
        """`function`, captured and replayed as the module's first lines say, and timed as the stage `timer`.

        Graphs are told apart by the values of arguments that are not tensors, and by the shapes and addresses of those
        that are. Keyword arguments are not taken.
        """
        warm: set[Hashable] = set()
        graphs: dict[Hashable, _Graph] = {}

        def run(*args: Any) -> Any:
            if self._capture is None:
                return cast(Any, function)(*args)
            leaves = tree_leaves(args)
            shapes = tuple((x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves)
            if shapes not in warm:
                results = cast(Any, function)(*args)
                warm.add(shapes)
                return results
            key = shapes, tuple(x.data_ptr() for x in leaves if isinstance(x, Tensor))
            if key not in graphs:
                graphs[key] = _Graph(*self._capture(lambda: cast(Any, function)(*args)), args)
            graphs[key].replay()
            return graphs[key].results

        def timed(*args: Any) -> Any:
            with self._timer.time(timer):
                return run(*args)

        return cast(Callable[P, T], timed)


class StaticInput:
    """Memory on the device, the same for every call, that inputs are copied into for graphs to read."""

    def __init__(self, device: torch.device, constant: bool = False) -> None:
        """`constant`: tensors never change in place, so that the same tensors are not copied twice in a row."""
        self._device, self._constant = device, constant
        self._buffers: dict[Hashable, Any] = {}  # by the shapes of the inputs
        self._last: list[Any] = []

    def __call__(self, inputs: T) -> T:
        """The inputs, any tree of tensors, in the memory that all inputs of their shapes take."""
        tensors = tree_leaves(inputs)
        shapes = tuple(x.shape for x in tensors)
        if shapes not in self._buffers:
            self._buffers[shapes] = tree_map(lambda x: torch.empty_like(x, device=self._device), inputs)
        buffers = self._buffers[shapes]
        if not self._constant or list(map(id, tensors)) != list(map(id, self._last)):
            for buffer, x in zip(tree_leaves(buffers), tensors, strict=True):
                buffer.copy_(pin_memory_for(x, self._device), non_blocking=True)
            self._last = tensors if self._constant else []  # kept: an id is an object's for as long as that lives
        return cast(T, buffers)
