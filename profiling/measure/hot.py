"""Hot measurement: how fast back-ends are on a GPU that has reached its power cap, and what they need there.

A GPU that has just begun to work runs at its highest clock. Under load it warms up to its power cap and lowers the
clock, by more for a kernel that needs more energy. So the fastest kernel of a short benchmark may not be that of a long
run. Here the GPU multiplies large matrices until it draws the power it is allowed. Then each back-end runs alone and
without a pause, at first uncounted, until clock and power are its own.

A kernel that waits for memory may not reach the cap; its watts say so.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, median
from types import ModuleType
from typing import Any, Protocol

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from model.errors import UserError
from profiling.machine import nvml_handle
from profiling.measure.timing import CallTimer
from profiling.results import HotReading
from profiling.tables import duration, number

CAP_SHARE = 0.95  # of the power limit: from here on the GPU counts as hot
WARM_SECONDS = 20.0  # after which warming up is given up
HEAT_SIZE = 8192  # rows, columns and depth of the product that warms up
HEAT_CALLS = 20  # between two readings
SETTLE_SECONDS, COUNTED_SECONDS = 1.0, 2.0  # of each back-end: the energy counter moves every tenth of a second
SAMPLES = 20  # kept of a back-end


class PowerMeter(Protocol):
    """What is read of a GPU while it works."""

    limit: float  # watts that it may draw

    def watts(self) -> float:
        """Power at the moment."""
        ...

    def mhz(self) -> float:
        """Clock of the multiprocessors at the moment."""
        ...

    def joules(self) -> float:
        """Energy since the driver was loaded."""
        ...


class NvmlMeter:
    """`PowerMeter` of torch's GPU. Raises `UserError` if NVML is missing or this GPU does not count energy."""

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml

            self._nvml: ModuleType = pynvml
            pynvml.nvmlInit()
            self._handle: Any = nvml_handle(pynvml, device)
            self.limit = pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000
            self.joules()
        except Exception as error:  # NVML's own kinds, and a missing library
            raise UserError(f"--hot needs NVML's power and energy readings: {type(error).__name__} {error}") from error

    def watts(self) -> float:
        """Power at the moment."""
        return self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000

    def mhz(self) -> float:
        """Clock of the multiprocessors at the moment."""
        return float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM))

    def joules(self) -> float:
        """Energy since the driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000


@dataclass(frozen=True)
class HotSamples:
    """One back-end on a hot GPU."""

    samples: tuple[float, ...]  # seconds a call
    reading: HotReading


class HotBench:
    """Measures back-ends on a hot GPU and keeps what it found, by case and back-end."""

    def __init__(
        self, meter: PowerMeter, heat: Callable[[], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`heat` keeps the GPU busy for a moment and returns when that is over."""
        self._meter, self._heat, self._clock = meter, heat, clock
        self.found: dict[str, dict[str, HotSamples]] = {}
        self.reached_cap = True  # whenever it was warmed up

    def measure(self, case: str, timers: Mapping[str, CallTimer]) -> dict[str, HotSamples]:
        """Samples and readings of each back-end of a case."""
        self._warm_up()
        self.found[case] = {name: self._read(timer) for name, timer in timers.items()}
        return self.found[case]

    def notes(self) -> Iterator[str]:
        """Whether the GPU never became hot."""
        if not self.reached_cap:
            yield f"hot: the GPU did not reach {CAP_SHARE:.0%} of its {self._meter.limit:.0f} W in {WARM_SECONDS:.0f} s"

    def _warm_up(self) -> None:
        begin = self._clock()
        while self._meter.watts() < CAP_SHARE * self._meter.limit:
            if self._clock() - begin > WARM_SECONDS:
                self.reached_cap = False
                return
            self._heat()

    def _read(self, timer: CallTimer) -> HotSamples:
        timer.sustain(SETTLE_SECONDS)
        clocks: list[float] = []
        before, begin = self._meter.joules(), self._clock()
        samples, calls = timer.sustain(COUNTED_SECONDS, lambda: clocks.append(self._meter.mhz()))
        seconds, joules = self._clock() - begin, self._meter.joules() - before
        return HotSamples(averaged(samples, SAMPLES), HotReading(median(clocks), joules / seconds, joules / calls))


def averaged(samples: Sequence[float], count: int) -> tuple[float, ...]:
    """The means of `count` groups of successive samples, or all samples if there are no more."""
    edges = [len(samples) * i // count for i in range(count + 1)]
    return tuple(fmean(samples[a:b]) for a, b in pairwise(edges) if b > a)


def hot_bench(device: torch.device) -> HotBench:
    """A `HotBench` of torch's GPU. Raises `UserError` on a CPU."""
    if device.type != "cuda":
        raise UserError("--hot: a CPU has no power cap that could be read; it needs an NVIDIA GPU")
    a, b = (torch.randn(HEAT_SIZE, HEAT_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))

    def heat() -> None:
        for _ in range(HEAT_CALLS):
            torch.mm(a, b)
        torch.cuda.synchronize(device)

    return HotBench(NvmlMeter(device), heat)


def hot_values(bench: HotBench) -> dict[str, dict[str, Any]]:
    """What was found, as JSON values, by case and back-end."""
    return {case: {name: asdict(one) for name, one in found.items()} for case, found in bench.found.items()}


def hot_table(bench: HotBench) -> Table:
    """What was found, for a terminal."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    out.title = "" if bench.reached_cap else "the GPU did not reach its power cap"
    out.add_column("hot: case, back-end", overflow="fold")
    for heading in ("time", "MHz", "W", "J a call"):
        out.add_column(heading, justify="right", no_wrap=True)
    for case, found in bench.found.items():
        out.add_section()
        out.add_row(escape(case))
        for name, one in found.items():
            seconds, read = duration(median(one.samples)), one.reading
            out.add_row(f"  {escape(name)}", seconds, f"{read.mhz:.0f}", f"{read.watts:.0f}", number(read.joules))
    return out
