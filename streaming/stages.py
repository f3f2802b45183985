"""Stages of a chunk that are the same in every chunk: run the first time, recorded the second, replayed ever after.

A CUDA graph repeats the same kernels on the same memory, hundreds of them at one command of the CPU. What a stage reads
must therefore lie where it lay when the stage was recorded: constants, results of earlier stages, and inputs that
`hold` has copied into place. Its results are overwritten when it is replayed.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch.utils._pytree import tree_leaves, tree_map

from model.tensors import pinned

T = TypeVar("T")

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]  # work -> what repeats it, its results


class CudaGraphs:
    """Records work as CUDA graphs, which share memory, and so must not be replayed at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # one of its own: a library's workspace belongs to a stream

    def __call__(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Nothing runs yet. Other threads may go on with what CUDA forbids the recording one."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            results = work()
        return graph.replay, results


class Stages:
    """Runs stages by key; without `record`, each time as they are."""

    def __init__(self, record: Record | None) -> None:
        self._record = record
        self._recorded: dict[Hashable, tuple[Callable[[], None], Any] | None] = {}  # None: has run once
        self._held: dict[Hashable, tuple[Any, list[Any]]] = {}  # buffers, and the constants that are in them

    @property
    def recording(self) -> bool:
        """Whether stages are recorded, and inputs therefore held."""
        return self._record is not None

    def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """What `work` returns. Under one key it must be the same work, on the same memory.

        The first time it may still compile, allocate and try algorithms, which cannot be recorded.
        """
        if self._record is None:
            return work()
        if key not in self._recorded:
            results = work()
            self._recorded[key] = None
            return results
        stage = self._recorded[key]
        if stage is None:
            stage = self._recorded[key] = self._record(work)
        replay, results = stage
        replay()
        return cast(T, results)

    def hold(self, key: Hashable, inputs: T, device: torch.device, constant: bool = False) -> T:
        """The inputs, a tree of tensors of the same shapes each time, where stages may read them in every chunk.

        Those that are `constant` are copied only if they are not the same tensors as the last time.
        """
        given = tree_leaves(inputs)
        if key not in self._held:
            self._held[key] = tree_map(partial(torch.empty_like, device=device), inputs), []
        held, before = self._held[key]
        if not constant or list(map(id, before)) != list(map(id, given)):
            for place, tensor in zip(tree_leaves(held), given, strict=True):
                place.copy_(pinned(tensor, device), non_blocking=True)
        self._held[key] = held, given if constant else []
        return cast(T, held)


class Lane:
    """A stream of a GPU beside the current one, for work that others need not wait for; elsewhere, no other stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def turn(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        """The body runs here, after that event, or after what the current stream has been given so far.

        In the latter case memory that the body takes, and took before, is free for it: the current stream has seen the
        last of it.
        """
        if self.stream is None:
            yield
            return
        if after is None:
            self.stream.wait_stream(torch.cuda.current_stream())
        else:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            yield

    def join(self, made: Any = ()) -> None:
        """What the current stream is given from now on comes after what has been given here.

        It may read the tensors `made` here, in any tree: their memory stays as long, whenever the next turn begins.
        """
        if self.stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self.stream)
            for tensor in tree_leaves(made):
                if isinstance(tensor, torch.Tensor):
                    tensor.record_stream(current)

    def mark(self) -> torch.cuda.Event | None:
        """An event on the current stream, for a later `turn` to come after; None where there is no lane."""
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event
