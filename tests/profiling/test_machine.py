"""What a run records about its machine, with an NVML driver that is present, missing, or failing."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from model.errors import UserError
from profiling import machine
from profiling.machine import NvmlMonitor, concatenate, describe_machine, resolve_device, revision
from profiling.results import NvmlTrace


def nvml(**changes: object) -> SimpleNamespace:
    """A stand-in for pynvml: one GPU of 1755 MHz, 650 W, 61 degrees, 40 GB in use, held back by its power cap."""
    values = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: f"gpu {index}",
        "nvmlDeviceGetEnforcedPowerLimit": lambda _: 700_000,
        "nvmlDeviceGetClockInfo": lambda _, clock: {1: 1755, 2: 2619}[clock],
        "nvmlDeviceGetPowerUsage": lambda _: 650_000,
        "nvmlDeviceGetTemperature": lambda *_: 61,
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=40e9),
        "nvmlDeviceGetCurrentClocksEventReasons": lambda _: 0x05,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "NVML_TEMPERATURE_GPU": 0,
    }  # fmt: skip
    return SimpleNamespace(**values | changes)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READING_INTERVAL", 0.005)


@pytest.mark.usefixtures("quick")
def test_nvml_is_read_while_the_body_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    with NvmlMonitor(torch.device("cuda")) as monitor:
        time.sleep(0.1)
    gauges = monitor.nvml
    assert len(gauges.seconds) > 3
    assert list(gauges.seconds) == sorted(gauges.seconds)
    assert set(gauges.sm_mhz) == {1755.0}
    assert set(gauges.memory_mhz) == {2619.0}
    assert set(gauges.watts) == {650.0}
    assert set(gauges.celsius) == {61.0}
    assert set(gauges.used_bytes) == {40e9}
    assert gauges.power_limit_watts == 700
    assert gauges.throttled == {"power cap": 1.0}, "idleness, the other bit, is no throttling"


@pytest.mark.usefixtures("quick")
def test_throttle_reasons_of_older_drivers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    old = nvml(nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: 0x40)
    del old.nvmlDeviceGetCurrentClocksEventReasons
    monkeypatch.setitem(sys.modules, "pynvml", old)
    with NvmlMonitor(torch.device("cuda")) as monitor:
        time.sleep(0.02)
    assert monitor.nvml.throttled == {"temperature (hardware)": 1.0}


@pytest.mark.usefixtures("quick")
def test_a_failing_driver_costs_the_readings_but_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise RuntimeError("GPU is lost")

    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlDeviceGetPowerUsage=fail))
    with NvmlMonitor(torch.device("cuda")) as monitor:
        time.sleep(0.02)
    assert monitor.nvml.seconds == ()
    assert "GPU is lost" in monitor.nvml.note


def test_traces_of_two_processes_are_concatenated() -> None:
    first = NvmlTrace((0.0, 1.0), *[(1.0, 2.0)] * 5, throttled={"power cap": 1.0}, power_limit_watts=700)
    later = NvmlTrace((0.0, 1.0), *[(3.0, 4.0)] * 5, throttled={"power brake": 0.5}, power_limit_watts=700)
    both = concatenate(first, later, 10.0)
    assert both.seconds == (0.0, 1.0, 10.0, 11.0)
    assert both.watts == (1.0, 2.0, 3.0, 4.0)
    assert both.throttled == {"power cap": 0.5, "power brake": 0.25}
    assert concatenate(NvmlTrace(), later, 10.0) is later
    assert concatenate(first, NvmlTrace(note="lost"), 10.0) is first


def test_without_a_gpu_there_is_nothing_to_read() -> None:
    with NvmlMonitor(torch.device("cpu")) as monitor:
        pass
    assert monitor.nvml.note == "no NVIDIA GPU in this run"


def test_this_machine_is_described() -> None:
    here = describe_machine(torch.device("cpu"))
    assert here.kind == "cpu"
    assert here.units == torch.get_num_threads()
    assert here.memory_bytes > 2**30
    assert here.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "triton", "numpy"} <= set(here.versions)


def test_the_revision_is_that_of_git(monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert (revision() or "").removesuffix("-dirty") == head
    monkeypatch.setenv("PATH", "")
    assert revision() is None


@pytest.mark.parametrize(("name", "said"), [("tpu", "use auto, cpu or cuda"), ("cuda", "sees no NVIDIA GPU")])
def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=said):
        resolve_device(name)
