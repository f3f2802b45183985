"""The machine that a run takes place on: what it is, and what NVML reports of it meanwhile."""

import platform
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from model.errors import UserError
from model.machine import cpu_name, package_version
from profiling.results import Machine, NvmlTrace

PACKAGES = ("torch", "triton", "numpy", "torchao", "flash-attn", "flash-attn-4", "sageattention", "flashtalk-triton")
READING_INTERVAL = 0.1  # seconds

# NVML's bits for reduced clocks; idleness and application settings do not count as throttling.
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


def resolve_device(device: str) -> torch.device:
    """The device that `--device` names; raises `UserError` if it is unknown or absent."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: there is no such choice; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no NVIDIA GPU here; use --device cpu")
    return torch.device(device)


def describe_machine(device: torch.device) -> Machine:
    """Describes the machine, with the versions that decide how fast it runs."""
    versions = {"python": platform.python_version()}
    versions |= {name: found for name in PACKAGES if (found := package_version(name)) is not None}
    if device.type != "cuda":
        memory = psutil.virtual_memory().total
        return Machine("cpu", cpu_name(), torch.get_num_threads(), memory, versions=versions, revision=revision())
    properties = torch.cuda.get_device_properties(device)
    versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    versions |= {d.metadata["Name"]: d.version for d in distributions() if "cublas" in (d.metadata["Name"] or "")}
    return Machine(
        "cuda",
        properties.name,
        properties.multi_processor_count,
        properties.total_memory,
        capability=f"{properties.major}.{properties.minor}",
        l2_bytes=properties.L2_cache_size,
        driver=_driver(),
        versions=versions,
        revision=revision(),
    )


def revision() -> str | None:
    """The git commit of this checkout, with "-dirty" if tracked files differ from it; None outside of git."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _driver() -> str | None:
    with suppress(Exception):  # NVML may be missing
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    return None


class NvmlMonitor:
    """Reads NVML in a background thread while its body runs; `nvml` has the readings so far."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._readings: list[tuple[tuple[float, ...], int]] = []
        self._stop = threading.Event()
        self._note = "no NVIDIA GPU in this run" if device.type != "cuda" else ""
        self._limit: float | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "NvmlMonitor":
        if self._device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def nvml(self) -> NvmlTrace:
        """The readings so far."""
        if not (readings := self._readings.copy()):
            return NvmlTrace(note=self._note or "NVML gave no readings")
        columns = [tuple(column) for column in zip(*(values for values, _ in readings), strict=True)]
        shares = {
            name: sum(bool(reasons & bit) for _, reasons in readings) / len(readings)
            for bit, name in THROTTLE_REASONS.items()
        }
        throttled = {name: share for name, share in shares.items() if share > 0}
        return NvmlTrace(*columns, throttled=throttled, power_limit_watts=self._limit, note=self._note)

    def _watch(self) -> None:
        try:
            import pynvml as nvml

            nvml.nvmlInit()
            handle = _nvml_handle(nvml, self._device)
            self._limit = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
            begin = time.monotonic()
            while not self._stop.is_set():
                reading, reasons = _nvml_reading(nvml, handle)
                self._readings.append(((time.monotonic() - begin, *reading), reasons))
                self._stop.wait(READING_INTERVAL)
        except Exception as error:  # readings are optional: a driver's fault must not end a run
            self._note = f"NVML: {type(error).__name__} {error}"


def concatenate(first: NvmlTrace, later: NvmlTrace, offset: float) -> NvmlTrace:
    """Joins two traces; `offset` is added to the seconds of the later one."""
    n, m = len(first.seconds), len(later.seconds)
    if not n or not m:
        return first if n else later
    columns = ("seconds", "sm_mhz", "memory_mhz", "watts", "celsius", "used_bytes")
    shifted = replace(later, seconds=tuple(second + offset for second in later.seconds))
    reasons = dict.fromkeys((*first.throttled, *later.throttled))
    throttled = {r: (first.throttled.get(r, 0) * n + later.throttled.get(r, 0) * m) / (n + m) for r in reasons}
    return replace(later, throttled=throttled, **{c: (*getattr(first, c), *getattr(shifted, c)) for c in columns})


def _nvml_handle(nvml: Any, device: torch.device) -> Any:
    """NVML's handle of torch's GPU. With several GPUs it goes by UUID, as CUDA_VISIBLE_DEVICES renumbers them."""
    if nvml.nvmlDeviceGetCount() == 1:
        return nvml.nvmlDeviceGetHandleByIndex(0)
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def _nvml_reading(nvml: Any, handle: Any) -> tuple[tuple[float, ...], int]:
    """SM and memory clock in MHz, watts, degrees Celsius, bytes used; and the bits of the throttle reasons."""
    reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons  # its name before driver 535
    reading = (
        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        nvml.nvmlDeviceGetMemoryInfo(handle).used,
    )
    return tuple(map(float, reading)), reasons(handle)
