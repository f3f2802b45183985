"""Streams of a GPU for machines without one: what each was given, done again in any order that their waits allow.

An order that no wait forbids is one that a GPU may take. If each gives the same values, nothing is read before it is
there, or overwritten while it is still read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tape import again


class Orders(TorchDispatchMode):
    """Keeps every operation of the body, by lane; lane 0 is the one that all begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.given: list[list[Any]] = [[]]  # by lane: operations, and (lane, operations) to wait for

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) for x in tree_leaves(results)):  # not a mark of the profiler
            self.given[self.current].append((func, args, kwargs or {}, results))
        return results

    def lane(self, _: torch.device) -> "Lane":
        """Another one, as `streaming.stages.Lane` makes them."""
        self.given.append([])
        return Lane(self, len(self.given) - 1)

    def mark(self) -> tuple[int, int]:
        """What the current lane has been given so far."""
        return self.current, len(self.given[self.current])

    def repeat(self, first: tuple[int, ...]) -> None:
        """Does all again, each time with the first of these lanes that need not wait."""
        done = [0] * len(self.given)
        while ready := [i for i in first if done[i] < len(self.given[i]) and not self._waits(i, done)]:
            entry = self.given[ready[0]][done[ready[0]]]
            if len(entry) > 2:
                again(*entry)
            done[ready[0]] += 1
        assert done == list(map(len, self.given)), "lanes wait for each other"

    def _waits(self, lane: int, done: list[int]) -> bool:
        entry = self.given[lane][done[lane]]
        return len(entry) == 2 and done[entry[0]] < entry[1]


class Lane:
    """As `streaming.stages.Lane`."""

    def __init__(self, orders: Orders, number: int) -> None:
        self._orders, self.number, self.stream = orders, number, self

    @contextmanager
    def turn(self, after: Any = None) -> Iterator[None]:
        self._orders.given[self.number].append(after or self._orders.mark())
        with self.current():
            yield

    @contextmanager
    def current(self) -> Iterator[None]:
        """The body's operations go here, as under `torch.cuda.stream`."""
        before, self._orders.current = self._orders.current, self.number
        yield
        self._orders.current = before

    def join(self) -> None:
        self._orders.given[self._orders.current].append((self.number, len(self._orders.given[self.number])))

    def mark(self) -> Any:
        return self._orders.mark()

    def lend(self, tensors: Any) -> None: ...
