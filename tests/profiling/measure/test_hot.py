"""Hot measurement, on a simulated GPU that warms up under load and counts its energy; its clock is not ours."""

import sys
import time
from collections.abc import Callable
from dataclasses import astuple
from itertools import pairwise
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from model.errors import UserError
from profiling.__main__ import main
from profiling.measure import hot
from profiling.measure.bench import time_case
from profiling.measure.check import check_case
from profiling.measure.hot import (
    COUNTED_SECONDS,
    SAMPLES,
    HotBench,
    HotSamples,
    NvmlMeter,
    averaged,
    hot_bench,
    hot_table,
)
from profiling.measure.timing import CallTimer
from profiling.measure.tune import tune_case
from profiling.results import HotReading
from tests.profiling import toy
from tests.profiling.measure import test_tune

CPU = torch.device("cpu")


class SimulatedGPU:
    """Draws `power` watts after a second of work, less before. All seconds are its own."""

    limit = 700.0

    def __init__(self, power: float = 690.0) -> None:
        self.power, self.now, self.energy = power, 0.0, 5000.0

    def work(self, seconds: float, watts: float | None = None) -> None:
        self.now += seconds
        self.energy += seconds * (watts or self.watts())

    def watts(self) -> float:
        return self.power * min(1.0, self.now)

    def mhz(self) -> float:
        return 1600.0

    def joules(self) -> float:
        return self.energy

    def clock(self) -> float:
        return self.now


class SimulatedTimer:
    """Stands for a `CallTimer`: calls of `call` seconds that draw `watts`."""

    def __init__(self, gpu: SimulatedGPU, call: float, watts: float) -> None:
        self._gpu, self._call, self._watts = gpu, call, watts

    def sustain(self, seconds: float, on_sample: Callable[[], object] = lambda: None) -> tuple[list[float], int]:
        calls = round(seconds / self._call)
        for _ in range(calls):
            self._gpu.work(self._call, self._watts)
            on_sample()
        return [self._call] * calls, calls


def bench_of(gpu: SimulatedGPU) -> HotBench:
    return HotBench(gpu, lambda: gpu.work(0.1), gpu.clock)


def test_energy_is_that_of_the_counted_calls_and_each_back_end_has_its_own() -> None:
    gpu = SimulatedGPU()
    bench = bench_of(gpu)
    timers = {"fast": SimulatedTimer(gpu, 0.010, 650.0), "slow": SimulatedTimer(gpu, 0.020, 500.0)}
    fast, slow = bench.measure("op/shape/bf16", timers).values()  # type: ignore[arg-type]
    assert gpu.now > 1, "it was warmed up"
    assert bench.reached_cap
    assert astuple(fast.reading) == (1600, pytest.approx(650), pytest.approx(6.5))
    assert astuple(slow.reading) == (1600, pytest.approx(500), pytest.approx(10))
    assert bench.found == {"op/shape/bf16": {"fast": fast, "slow": slow}}
    assert fast.samples == pytest.approx((0.010,) * SAMPLES)
    assert not list(bench.notes())
    console = Console(record=True, width=100)
    console.print(hot_table(bench))
    assert "10.0 ms  1600  650      6.50" in console.export_text()


def test_a_gpu_that_does_not_get_hot_is_measured_and_said_to_be_cold() -> None:
    gpu = SimulatedGPU(power=400)
    bench = bench_of(gpu)
    bench.measure("op", {"a": SimulatedTimer(gpu, 0.1, 400.0)})  # type: ignore[dict-item]
    assert gpu.now == pytest.approx(hot.WARM_SECONDS + hot.SETTLE_SECONDS + COUNTED_SECONDS, abs=0.3)
    assert "did not reach 95% of its 700 W" in [*bench.notes()][-1]


@pytest.mark.parametrize(("samples", "count"), [(100, 20), (7, 20), (41, 20), (1, 20)])
def test_samples_are_averaged_in_order_and_all_count(samples: int, count: int) -> None:
    means = averaged([float(i) for i in range(samples)], count)
    assert len(means) == min(samples, count)
    assert all(a < b for a, b in pairwise(means))
    if samples % count == 0:
        assert sum(means) / count == pytest.approx((samples - 1) / 2)


def test_a_timer_keeps_calling_for_as_long_as_it_is_told() -> None:
    calls: list[int] = []
    timer = CallTimer([lambda: calls.append(0)], CPU)
    before, readings = len(calls), []
    samples, made = timer.sustain(0.0, lambda: readings.append(0))
    assert made == len(calls) - before
    assert len(readings) == len(samples) >= 1
    assert all(seconds > 0 for seconds in samples)


def test_bench_takes_the_samples_of_a_hot_gpu() -> None:
    case = toy.case("toy", toy.ours(toy.double), toy.PEER, toy.ours(toy.raises, "raises"))
    bench = HotBench(SimulatedGPU(), lambda: None, lambda: 0.0)
    reading = HotReading(1600, 650, 6.5)
    bench.measure = lambda _, timers: {  # type: ignore[method-assign]
        backend: HotSamples((float(len(backend)),) * 3, reading) for backend in timers
    }
    result = time_case(case, check_case(case, CPU, 1), CPU, rounds=9, seed=1, hot=bench)
    assert [m.samples for m in result.measurements] == [(4.0,) * 3, (4.0,) * 3, ()]
    assert [m.hot for m in result.measurements] == [reading, reading, None]


def test_the_tuner_chooses_by_the_hot_times_of_the_last_stage() -> None:
    """What is fastest for a moment need not be fastest for long."""
    seen: list[list[str]] = []

    class Reversed:
        def measure(self, _: str, timers: dict[str, CallTimer]) -> dict[str, HotSamples]:
            seen.append([*timers])
            times = {"wait=1": 9.0, "wait=2": 3.0, "peer": 5.0}
            return {
                label: HotSamples((next(t for end, t in times.items() if label.endswith(end)),), HotReading(0, 0, 0))
                for label in timers
            }

    toy_case = test_tune.case("toy", test_tune.waiting(1, 2), test_tune.peer(4))
    outcome = tune_case(toy_case, CPU, time.monotonic() + 1000, 0, Reversed())  # type: ignore[arg-type]
    assert outcome.entry is not None
    assert outcome.entry.configs == {"ours": {"wait": 2}}
    assert outcome.entry.seconds == {"ours": 3.0, "peer": 5.0}
    assert sorted(label.split(". ")[1] for label in seen[0]) == ["ours wait=1", "ours wait=2", "peer"]


def nvml(**changes: object) -> SimpleNamespace:
    values = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: f"gpu {index}",
        "nvmlDeviceGetEnforcedPowerLimit": lambda _: 700_000,
        "nvmlDeviceGetClockInfo": lambda _, clock: {1: 1605}[clock],
        "nvmlDeviceGetPowerUsage": lambda _: 692_000,
        "nvmlDeviceGetTotalEnergyConsumption": lambda _: 1_234_500,
        "NVML_CLOCK_SM": 1,
    }
    return SimpleNamespace(**values | changes)


def test_nvml_is_read_in_watts_megahertz_and_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    meter = NvmlMeter(torch.device("cuda"))
    assert (meter.limit, meter.watts(), meter.mhz(), meter.joules()) == (700, 692, 1605, 1234.5)


def test_a_gpu_that_counts_no_energy_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_: object) -> int:
        raise RuntimeError("Not Supported")

    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlDeviceGetTotalEnergyConsumption=unsupported))
    with pytest.raises(UserError, match=r"^--hot needs NVML's power and energy readings: RuntimeError Not Supported$"):
        NvmlMeter(torch.device("cuda"))


def test_a_cpu_has_no_power_cap() -> None:
    with pytest.raises(UserError, match=r"^--hot: a CPU has no power cap"):
        hot_bench(CPU)


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_the_commands_say_so(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["profiling", command, "--hot", "--device", "cpu", "--cases", test_tune.__file__])
    assert main() == 2
    assert "--hot: a CPU has no power cap" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_energy_is_time_times_power() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    bench = hot_bench(device)
    found = bench.measure("mm", {"mm": CallTimer([lambda: torch.mm(x, x)], device)})["mm"]
    reading = found.reading
    assert 50 < reading.watts < 2000
    assert 100 < reading.mhz < 4000
    assert reading.joules == pytest.approx(reading.watts * fmean(found.samples), rel=0.2)
