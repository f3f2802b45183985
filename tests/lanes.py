"""Streams of a GPU for machines without one: what each was given, and what waits leave open."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tape import again, places

Mark = tuple[int, int]  # a lane, and how many operations and waits it had been given


class Lanes(TorchDispatchMode):
    """Operations of the body, by lane; lane 0 is the one that all begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.current, self.count = 0, 1

    def lane(self, _: torch.device) -> "Lane":
        """Another one, as `streaming.stages.Lane` makes them."""
        self.count += 1
        return Lane(self, self.count - 1)

    def mark(self, lane: int | None = None) -> Mark:
        """What a lane, or else the current one, has been given so far."""
        raise NotImplementedError

    def wait(self, lane: int, mark: Mark) -> None:
        """The lane goes on after the mark."""
        raise NotImplementedError

    def keep(self, tree: Any, lane: int) -> None:
        """As `Tensor.record_stream` of all tensors."""


class Orders(Lanes):
    """Keeps all, to do it again in any order that waits allow: one that a GPU may take.

    If each gives the same values, nothing is read before it is there, or overwritten while it is still read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: defaultdict[int, list[Any]] = defaultdict(list)  # by lane: operations, and marks to wait for

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) for x in tree_leaves(results)):  # not a mark of the profiler
            self.given[self.current].append((func, args, kwargs or {}, results))
        return results

    def mark(self, lane: int | None = None) -> Mark:
        lane = self.current if lane is None else lane
        return lane, len(self.given[lane])

    def wait(self, lane: int, mark: Mark) -> None:
        self.given[lane].append(mark)

    def repeat(self, first: tuple[int, ...]) -> None:
        """Does all again, each time with the first of these lanes that need not wait."""
        done = [0] * self.count
        while ready := [i for i in first if done[i] < len(self.given[i]) and not self._waits(i, done)]:
            entry = self.given[ready[0]][done[ready[0]]]
            if len(entry) > 2:
                again(*entry)
            done[ready[0]] += 1
        assert done == [len(self.given[i]) for i in range(self.count)], "lanes wait for each other"

    def _waits(self, lane: int, done: list[int]) -> bool:
        entry = self.given[lane][done[lane]]
        return len(entry) == 2 and done[entry[0]] < entry[1]


class Memory(Lanes):
    """Fails where a lane takes memory again that another may still read, as torch's allocator gives it away.

    Memory belongs to the lane that first took it, and is free for its next operation as soon as no tensor is left: what
    other lanes were given before is done by then only if this one has waited for them, or the tensor was kept for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: defaultdict[int, Counter[int]] = defaultdict(Counter)  # lane -> of each lane, what is done by now
        self._marks: dict[Mark, Counter[int]] = {}
        self._tensors: Counter[int] = Counter()  # by memory: tensors that lie there
        self._owner: dict[int, int] = {}
        self._used: defaultdict[int, Counter[int]] = defaultdict(Counter)  # by memory: each lane's last use
        self._kept: defaultdict[int, set[int]] = defaultdict(set)  # by memory: lanes it is kept for
        self._free: defaultdict[int, list[tuple[str, Counter[int]]]] = defaultdict(list)
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lane, known = self.current, self._known[self.current]
        known[lane] += 1
        results = func(*args, **(kwargs or {}))
        for place in places((args, kwargs)) & self._owner.keys():
            self._used[place][lane] = known[lane]
        if places(results) - places((args, kwargs)):
            for name, used in self._free.pop(lane, []):
                late = {other: at for other, at in used.items() if other != lane and known[other] < at}
                assert not late, f"memory of {name} is taken again by lane {lane} for {func}, unseen by {late}"
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and id(x) not in self._seen:
                self._hold(x, func, lane)
        return results

    def _hold(self, x: Tensor, func: Any, lane: int) -> None:
        (place,) = places(x)
        self._seen.add(id(x))
        self._tensors[place] += 1
        self._owner.setdefault(place, lane)
        self._used[place][lane] = self._known[lane][lane]
        weakref.finalize(x, self._gone, id(x), place, f"{func} {list(x.shape)}")

    def _gone(self, number: int, place: int, name: str) -> None:
        self._seen.discard(number)
        self._tensors[place] -= 1
        if not self._tensors[place]:
            used, kept = self._used.pop(place), self._kept.pop(place, set())
            late = Counter({lane: at for lane, at in used.items() if lane not in kept})
            self._free[self._owner.pop(place)].append((name, late))

    def mark(self, lane: int | None = None) -> Mark:
        lane = self.current if lane is None else lane
        mark = lane, self._known[lane][lane]
        self._marks[mark] = self._known[lane].copy()
        return mark

    def wait(self, lane: int, mark: Mark) -> None:
        self._known[lane] |= self._marks[mark]

    def keep(self, tree: Any, lane: int) -> None:
        for place in places(tree) & self._owner.keys():
            self._kept[place].add(lane)


class Lane:
    """As `streaming.stages.Lane`."""

    def __init__(self, lanes: Lanes, number: int) -> None:
        self._lanes, self.number, self.stream = lanes, number, self

    @contextmanager
    def turn(self, after: Any = None) -> Iterator[None]:
        self._lanes.wait(self.number, after or self._lanes.mark())
        with self.current():
            yield

    @contextmanager
    def current(self) -> Iterator[None]:
        """The body's operations go here, as under `torch.cuda.stream`."""
        before, self._lanes.current = self._lanes.current, self.number
        yield
        self._lanes.current = before

    def join(self, made: Any = ()) -> None:
        self._lanes.wait(self._lanes.current, self._lanes.mark(self.number))
        self._lanes.keep(made, self._lanes.current)

    def mark(self) -> Mark:
        return self._lanes.mark()
