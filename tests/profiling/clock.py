"""A clock for tests of what measures time: only what sleeps by it moves it, so that no load changes a measurement."""

from types import ModuleType

import pytest

READING = 1e-4  # seconds that a look at the clock takes, so that nothing takes no time at all


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Seconds."""
        self.now += READING
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        """Moves the clock and returns at once."""
        self.now += seconds

    def stand_in(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        """Gives these modules the clock for their `time`."""
        for module in modules:
            monkeypatch.setattr(module, "time", self)


CLOCK = Clock()
