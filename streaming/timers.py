"""Timers of the loop's stages: wall time on a CPU, time between CUDA events on a GPU.

The names are the same in reports, traces (`torch.profiler`, NVTX) and the progress line: audio, denoise/step, decode,
color, motion. Reports also have emit, which runs in the writer's thread.
"""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

HISTORY = 4096  # durations kept per name for the median; count, sum and maximum cover all


@dataclass
class _Durations:
    count: int = 0
    total: float = 0.0
    longest: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)
        self.recent.append(seconds)


class StageTimer:
    """Times named stages. On a GPU it never synchronises: it reads CUDA events once the GPU has passed them."""

    def __init__(self, device: torch.device) -> None:
        self.current = ""  # the stage that is running, or ran last
        self._cuda = device.type == "cuda"
        self._stages: dict[str, _Durations] = {}
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Times the body as one call of the stage `name`."""
        self.current = name
        nvtx = torch.cuda.nvtx.range(name) if self._cuda else nullcontext()
        with torch.profiler.record_function(name), nvtx:
            if self._cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                yield
                end.record()
                self._pending.append((name, start, end))
                self._read_events()
            else:
                begin = time.perf_counter()
                yield
                self.add(name, time.perf_counter() - begin)

    def add(self, name: str, seconds: float) -> None:
        """Counts a call of a stage that was timed elsewhere, for example in another thread."""
        self._stages.setdefault(name, _Durations()).add(seconds)

    def clear(self) -> None:
        """Forgets all stages so far."""
        self._finish()
        self._stages.clear()

    def summary(self) -> dict[str, dict[str, float]]:
        """Per stage: number of calls, and seconds in total, at the median and at most."""
        self._finish()
        return {
            name: {
                "count": stage.count,
                "total_s": stage.total,
                "median_s": statistics.median(stage.recent),
                "max_s": stage.longest,
            }
            for name, stage in self._stages.items()
        }

    def samples(self) -> dict[str, tuple[float, ...]]:
        """Per stage, the seconds of its last `HISTORY` calls."""
        self._finish()
        return {name: tuple(stage.recent) for name, stage in self._stages.items()}

    def _finish(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            self._read_events()

    def _read_events(self) -> None:
        """Reads the event pairs that the GPU has passed; the others wait for a later call."""
        while self._pending and self._pending[0][2].query():
            name, start, end = self._pending.popleft()
            self.add(name, start.elapsed_time(end) / 1000)
