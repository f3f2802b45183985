"""Times calls on a device: CUDA events around graph replays on a GPU, `perf_counter` on a CPU.

A sample is the mean over enough calls to fill a few milliseconds. Successive calls of a back-end use different input
sets, so that operands come from memory and not from the cache. Back-ends are timed in interleaved rounds, so that a
machine whose speed drifts affects all of them equally.
"""

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

SAMPLE_SECONDS = {"cuda": 0.010, "cpu": 0.005}  # minimum length of a sample
INTERLEAVE_SECONDS = 2.0  # after which `interleave` starts no further round
MIN_ROUNDS = 4
L2_MULTIPLE = 4  # all input sets together are this many times the L2 cache
MAX_INPUT_SETS = 256
MAX_CALLS_A_SAMPLE = 256
SAMPLES_AHEAD = 3  # that a GPU has to do while the CPU prepares more, where there must be no pause
SPIN_CYCLES = 1_000_000  # of the GPU, about 0.5 ms: the CPU gets ahead, so samples contain no launch gaps


def num_input_sets(bytes_a_set: float, device: torch.device) -> int:
    """How many input sets of that size keep repeated calls from finding their operands in the GPU's L2 cache."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MAX_INPUT_SETS, math.ceil(L2_MULTIPLE * cache / max(bytes_a_set, 1))))


class CallTimer:
    """Times equivalent calls on different inputs, after warming them up."""

    def __init__(self, calls: Sequence[Callable[[], object]], device: torch.device, *, capture: bool = True) -> None:
        """Runs every call once and finds how many fill a sample; on a GPU it captures these as a CUDA graph.

        Without `capture` they are launched one by one. Only long calls are then free of launch gaps.
        """
        self._cuda = device.type == "cuda"
        self._turn = itertools.cycle(calls)
        for call in calls:
            call()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._count = 1
        rough = min(self.sample() for _ in range(2))
        self._count = max(1, min(MAX_CALLS_A_SAMPLE, math.ceil(SAMPLE_SECONDS[device.type] / max(rough, 1e-9))))
        if self._cuda and capture:
            self._capture()

    @property
    def graph(self) -> bool:
        """Whether samples are replays of a CUDA graph."""
        return self._graph is not None

    def sample(self) -> float:
        """One sample: mean seconds per call."""
        if self._cuda:
            torch.cuda._sleep(SPIN_CYCLES)
        begin = self._mark()
        self._run()
        return self._between(begin, self._mark())

    def sustain(self, seconds: float, on_sample: Callable[[], object] = lambda: None) -> tuple[list[float], int]:
        """Repeats the calls without a pause for at least `seconds`; returns samples, and how many calls there were.

        `on_sample` is called between samples. On a GPU that has work for longer than this takes.
        """
        samples: list[float] = []
        marks = [self._mark()]
        end = time.monotonic() + seconds
        while not samples or time.monotonic() < end:
            self._run()
            marks.append(self._mark())
            on_sample()
            if len(marks) > SAMPLES_AHEAD:
                samples.append(self._between(*marks[:2]))
                del marks[0]
        samples += [self._between(a, b) for a, b in itertools.pairwise(marks)]
        return samples, len(samples) * self._count

    def _mark(self) -> Any:
        """A point in time: on a GPU an event, which is recorded once the work before it is done."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        """Seconds a call between two marks around a sample's calls; waits for the second one."""
        if not self._cuda:
            return (end - begin) / self._count
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / self._count

    def _run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        for _ in range(self._count):
            next(self._turn)()

    def _capture(self) -> None:
        """Captures the calls of a sample as a CUDA graph.

        A back-end that waits for the GPU cannot be captured. It stays plain launches, and its times include launch
        gaps. Such back-ends are detected beforehand, since torch does not recover from every failed capture. If a
        capture fails all the same, it raises RuntimeError.
        """
        torch.cuda.set_sync_debug_mode("error")
        try:
            next(self._turn)()
        except RuntimeError:
            return
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                self._run()
        except RuntimeError:
            torch.cuda.set_stream(stream)  # torch 2.11 leaves the capturing one current
            raise
        self._graph = graph


def interleave(timed: Sequence[CallTimer], rounds: int, seed: int) -> list[list[float]]:
    """Samples of each timer, one per round; every round has a new random order, and an uncounted sample before each.

    Slow calls get fewer rounds than asked for, but at least `MIN_ROUNDS`, so that all cases get their turn.
    """
    samples: list[list[float]] = [[] for _ in timed]
    shuffle = random.Random(seed).shuffle
    order = list(range(len(timed)))
    begin = time.monotonic()
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.monotonic() - begin > INTERLEAVE_SECONDS:
            break
        shuffle(order)
        for i in order:
            timed[i].sample()  # not counted: the previous back-end left other caches and clocks
            samples[i].append(timed[i].sample())
    return samples
