"""A model of CUDA streams for machines without CUDA: the operations of each stream, and the waits between streams."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fake_graphs import repeat_operation, storages

Event = tuple[int, int]  # a stream, and how many operations and waits it had been given


class FakeStreams(TorchDispatchMode):
    """Sees the operations of the body, stream by stream; stream 0 is the current stream at its beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.current, self.count = 0, 1

    def new_stream(self, _: torch.device) -> "FakeStream":
        """A stream in place of `streaming.streams.SideStream`."""
        self.count += 1
        return FakeStream(self, self.count - 1)

    def event(self, stream: int | None = None) -> Event:
        """An event after everything that a stream, or else the current one, has been given so far."""
        raise NotImplementedError

    def wait(self, stream: int, event: Event) -> None:
        """Makes the stream wait for the event."""
        raise NotImplementedError

    def record(self, tree: Any, stream: int) -> None:
        """`Tensor.record_stream` for all tensors of a tree."""


class EveryOrder(FakeStreams):
    """Records the operations, and repeats them in any order that the waits allow: an order that a GPU may take.

    If every order gives the same values, nothing is read before it is written, or overwritten while it is still read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: defaultdict[int, list[Any]] = defaultdict(list)  # by stream: operations, and events to wait for

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) for x in tree_leaves(results)):  # not an operation of the profiler
            self.given[self.current].append((func, args, kwargs or {}, results))
        return results

    def event(self, stream: int | None = None) -> Event:
        stream = self.current if stream is None else stream
        return stream, len(self.given[stream])

    def wait(self, stream: int, event: Event) -> None:
        self.given[stream].append(event)

    def repeat(self, first: tuple[int, ...]) -> None:
        """Repeats everything, each time by the first stream in `first` that need not wait."""
        done = [0] * self.count
        while ready := [i for i in first if done[i] < len(self.given[i]) and not self._waits(i, done)]:
            entry = self.given[ready[0]][done[ready[0]]]
            if len(entry) > 2:
                repeat_operation(*entry)
            done[ready[0]] += 1
        assert done == [len(self.given[i]) for i in range(self.count)], "streams wait for each other"

    def _waits(self, stream: int, done: list[int]) -> bool:
        entry = self.given[stream][done[stream]]
        return len(entry) == 2 and done[entry[0]] < entry[1]


class MemoryReuse(FakeStreams):
    """Fails where a stream reuses memory that another stream may still read, as torch's caching allocator may.

    Memory belongs to the stream that allocated it, and is free for that stream's next operation as soon as no tensor is
    left. Other streams have finished with it by then only if this stream has waited for them, or if the tensor was
    recorded for them (`Tensor.record_stream`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: defaultdict[int, Counter[int]] = defaultdict(
            Counter
        )  # stream -> for each stream, what is done by now
        self._events: dict[Event, Counter[int]] = {}
        self._tensors: Counter[int] = Counter()  # by memory: tensors that lie there
        self._owner: dict[int, int] = {}
        self._used: defaultdict[int, Counter[int]] = defaultdict(Counter)  # by memory: each stream's last use
        self._kept: defaultdict[int, set[int]] = defaultdict(set)  # by memory: streams it is recorded for
        self._free: defaultdict[int, list[tuple[str, Counter[int]]]] = defaultdict(list)
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stream, known = self.current, self._known[self.current]
        known[stream] += 1
        results = func(*args, **(kwargs or {}))
        for place in storages((args, kwargs)) & self._owner.keys():
            self._used[place][stream] = known[stream]
        if storages(results) - storages((args, kwargs)):
            for name, used in self._free.pop(stream, []):
                late = {other: at for other, at in used.items() if other != stream and known[other] < at}
                assert not late, f"memory of {name} is reused by stream {stream} for {func}, unseen by {late}"
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and id(x) not in self._seen:
                self._hold(x, func, stream)
        return results

    def _hold(self, x: Tensor, func: Any, stream: int) -> None:
        (place,) = storages(x)
        self._seen.add(id(x))
        self._tensors[place] += 1
        self._owner.setdefault(place, stream)
        self._used[place][stream] = self._known[stream][stream]
        weakref.finalize(x, self._gone, id(x), place, f"{func} {list(x.shape)}")

    def _gone(self, number: int, place: int, name: str) -> None:
        self._seen.discard(number)
        self._tensors[place] -= 1
        if not self._tensors[place]:
            used, kept = self._used.pop(place), self._kept.pop(place, set())
            late = Counter({stream: at for stream, at in used.items() if stream not in kept})
            self._free[self._owner.pop(place)].append((name, late))

    def event(self, stream: int | None = None) -> Event:
        stream = self.current if stream is None else stream
        event = stream, self._known[stream][stream]
        self._events[event] = self._known[stream].copy()
        return event

    def wait(self, stream: int, event: Event) -> None:
        self._known[stream] |= self._events[event]

    def record(self, tree: Any, stream: int) -> None:
        for place in storages(tree) & self._owner.keys():
            self._kept[place].add(stream)


class FakeStream:
    """A model of `streaming.streams.SideStream`."""

    def __init__(self, streams: FakeStreams, number: int) -> None:
        self._streams, self.number = streams, number

    @contextmanager
    def fork(self, after: Any = None) -> Iterator[None]:
        self._streams.wait(self.number, after or self._streams.event())
        with self.current():
            yield

    @contextmanager
    def current(self) -> Iterator[None]:
        """Gives the body's operations to this stream, as `torch.cuda.stream` does."""
        before, self._streams.current = self._streams.current, self.number
        yield
        self._streams.current = before

    def join(self, results: Any = ()) -> None:
        self._streams.wait(self._streams.current, self._streams.event(self.number))
        self._streams.record(results, self._streams.current)

    def record_event(self) -> Event:
        return self._streams.event()
