"""What a run records about its machine, with an NVML driver that is present, missing, or failing."""

import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import tuning
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


class Counted:
    """A call that is waited for, however long it takes to come."""

    def __init__(self, result: object) -> None:
        self._result, self._calls = result, threading.Semaphore(0)

    def __call__(self, _: object) -> object:
        self._calls.release()
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def wait(self, calls: int) -> None:
        for _ in range(calls):
            assert self._calls.acquire(timeout=600)


@pytest.mark.usefixtures("quick")
def test_nvml_is_read_while_the_body_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    power = Counted(650_000)
    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlDeviceGetPowerUsage=power))
    with NvmlMonitor(torch.device("cuda")) as monitor:
        power.wait(5)
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
    reasons = Counted(0x40)
    old = nvml(nvmlDeviceGetCurrentClocksThrottleReasons=reasons)
    del old.nvmlDeviceGetCurrentClocksEventReasons
    monkeypatch.setitem(sys.modules, "pynvml", old)
    with NvmlMonitor(torch.device("cuda")) as monitor:
        reasons.wait(2)
    assert monitor.nvml.throttled == {"temperature (hardware)": 1.0}


@pytest.mark.usefixtures("quick")
def test_a_failing_driver_costs_the_readings_but_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    power = Counted(RuntimeError("GPU is lost"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlDeviceGetPowerUsage=power))
    with NvmlMonitor(torch.device("cuda")) as monitor:
        power.wait(1)
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


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with a module of each package, of which `machine` believes that it is its own."""
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    for package in ("kernels", "model", "streaming", "profiling/results"):
        (tmp_path / package).mkdir(parents=True)
    for file in ("kernels/a.py", "profiling/machine.py", "README.md"):
        (tmp_path / file).write_text("a\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false", "commit", "-q", "-m", "m")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_revision_names_the_commit_and_hashes_what_differs_from_it(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert revision() == head
    (checkout / "README.md").write_text("not code\n")
    (checkout / "profiling" / "results" / "run.json").write_text("{}")
    assert revision() == head, "neither documents nor results change what is measured"
    found = set()
    for file, content in (
        ("kernels/a.py", "b\n"),
        ("kernels/a.py", "c\n"),
        ("model/new.py", ""),
        ("model/new.py", "d\n"),
    ):
        (checkout / file).write_text(content)
        found.add(dirty := revision())
        assert re.fullmatch(rf"{head}-dirty-[0-9a-f]{{12}}", dirty or "")
        assert revision() == dirty
    assert len(found) == 4
    git(checkout, "add", "kernels/a.py")
    assert revision() == dirty, "staged or not, it is the same code"
    (checkout / "kernels" / "a.py").write_text("a\n")
    (checkout / "model" / "new.py").unlink()
    assert revision() == head
    (checkout / "model" / "broken.py").symlink_to("nowhere")
    assert (revision() or "").startswith(f"{head}-dirty-")


def test_an_installed_copy_has_no_revision(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it lies in the checkout of another project."""
    git(checkout, "rm", "-q", "--cached", "profiling/machine.py")
    assert revision() is None
    monkeypatch.setenv("PATH", "")
    assert revision() is None


def test_environment_variables_that_change_kernels_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    recorded = {
        "CUDA_VISIBLE_DEVICES": "1",
        "OMP_NUM_THREADS": "2",
        "TORCH_LOGS": "",
        "TRITON_PTXAS_PATH": "/bin/ptxas",
    }
    for name, value in (recorded | {"TRITON_CACHE_DIR": "/a", "TORCHINDUCTOR_CACHE_DIR": "/b", "HOME": "/c"}).items():
        monkeypatch.setenv(name, value)
    assert machine.environment() == recorded


def test_a_container_is_known_by_what_it_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CONTAINER_FILES", (str(tmp_path / ".dockerenv"),))
    for name in machine.CONTAINER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not machine.in_container()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert machine.in_container()
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    (tmp_path / ".dockerenv").touch()
    assert machine.in_container()


def test_the_driver_tells_its_settings_as_far_as_the_card_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"nvmlDeviceGetPersistenceMode": lambda _: 1, "nvmlDeviceGetEccMode": lambda _: [0, 1]}
    monkeypatch.setitem(sys.modules, "pynvml", nvml(**settings))
    assert machine.driver_state(torch.device("cuda")) == {"driver": "580.1", "persistence": True, "ecc": False}

    def unsupported(_: object) -> list[int]:
        raise RuntimeError("Not Supported")

    monkeypatch.setitem(sys.modules, "pynvml", nvml(**settings | {"nvmlDeviceGetEccMode": unsupported}))
    assert machine.driver_state(torch.device("cuda")) == {"driver": "580.1", "persistence": True}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.driver_state(torch.device("cuda")) == {}


def test_a_gpu_is_described_with_its_settings_and_launch_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"nvmlDeviceGetPersistenceMode": lambda _: 0, "nvmlDeviceGetEccMode": lambda _: [1, 1]}
    monkeypatch.setitem(sys.modules, "pynvml", nvml(**settings))
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", multi_processor_count=132, total_memory=80, major=9, minor=0, L2_cache_size=50
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    found = describe_machine(torch.device("cuda"))
    assert (found.kind, found.device, found.units, found.capability) == ("cuda", properties.name, 132, "9.0")
    assert (found.driver, found.ecc, found.persistence) == ("580.1", True, False)
    assert found.tuned == machine.tuned_hash(properties.name, "9.0")
    assert found.revision == revision()
    assert (found.container, found.environment) == (machine.in_container(), machine.environment())


def test_the_table_of_launch_parameters_is_known_by_its_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = ("NVIDIA H100 80GB HBM3", "9.0")
    whole = machine.tuned_hash(*device)
    assert whole == machine.tuned_hash("NVIDIA H200", "9.0"), "which uses the table of the H100"
    assert machine.tuned_hash("NVIDIA A100", "8.0") is None
    table = tuning.table_for(*device, tuning.FOLDER)
    assert table is not None
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    (tmp_path / "a.json").write_text(tuning.to_json(replace(table, entries=table.entries[1:])))
    assert machine.tuned_hash(*device) not in (None, whole)


@pytest.mark.parametrize(("name", "said"), [("tpu", "use auto, cpu or cuda"), ("cuda", "sees no NVIDIA GPU")])
def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=said):
        resolve_device(name)
