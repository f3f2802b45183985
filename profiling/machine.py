"""The machine that a run takes place on: what it is, and what NVML reports of it meanwhile."""

import hashlib
import os
import platform
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from kernels import tuning
from model.errors import UserError
from model.machine import cpu_name, package_version
from profiling.results import Machine, NvmlTrace

PACKAGES = ("torch", "triton", "numpy", "torchao", "flash-attn", "flash-attn-4", "sageattention", "flashtalk-triton")
READING_INTERVAL = 0.1  # seconds

CHECKOUT = Path(__file__).parents[1]
CODE = ("kernels", "model", "streaming", "profiling", ":!profiling/results")  # as git names it
VARIABLES = ("TRITON_", "TORCH", "PYTORCH_", "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "OMP_", "MKL_")
CACHE_SUFFIX = "_CACHE_DIR"  # of variables that say only where kernels are kept
CONTAINER_FILES = ("/.dockerenv", "/run/.containerenv")
CONTAINER_VARIABLES = {"container", "KUBERNETES_SERVICE_HOST", "APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"}

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
    """Describes the machine, with all that decides how fast it runs: versions, settings, and the code's revision."""
    versions = {"python": platform.python_version()}
    versions |= {name: found for name in PACKAGES if (found := package_version(name)) is not None}
    here = partial(Machine, revision=revision(), container=in_container(), environment=environment())
    if device.type != "cuda":
        memory = psutil.virtual_memory().total
        return here("cpu", cpu_name(), torch.get_num_threads(), memory, versions=versions)
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    versions |= {d.metadata["Name"]: d.version for d in distributions() if "cublas" in (d.metadata["Name"] or "")}
    return here(
        "cuda",
        properties.name,
        properties.multi_processor_count,
        properties.total_memory,
        capability=capability,
        l2_bytes=properties.L2_cache_size,
        versions=versions,
        tuned=tuned_hash(properties.name, capability),
        **driver_state(device),
    )


def revision() -> str | None:
    """The git commit of this checkout, or None where git does not keep it.

    If the code differs from the commit, "-dirty-" and a hash of the difference follow, untracked files included. Code
    is every file of the packages except results.
    """

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], cwd=CHECKOUT, check=True, capture_output=True).stdout

    try:
        # An installed copy may lie in another project's checkout.
        git("ls-files", "--error-unmatch", "profiling/machine.py")
        commit = git("rev-parse", "HEAD").decode().strip()
        difference = git("diff", "--no-ext-diff", "--no-color", "--binary", "HEAD", "--", *CODE)
        untracked = git("ls-files", "-z", "--others", "--exclude-standard", "--", *CODE).decode()
    except (OSError, subprocess.CalledProcessError):
        return None
    for name in filter(None, untracked.split("\0")):
        file = CHECKOUT / name
        difference += f"\0{name}\0".encode() + (file.read_bytes() if file.is_file() else b"")  # a link may lead nowhere
    return f"{commit}-dirty-{_hash(difference)}" if difference else commit


def tuned_hash(name: str, capability: str) -> str | None:
    """The hash of the table of launch parameters that a GPU uses; None if it uses none."""
    table = tuning.table_for(name, capability, tuning.FOLDER)
    return _hash(tuning.to_json(table).encode()) if table else None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def in_container() -> bool:
    """Whether this process runs inside a container: Docker, Podman, Kubernetes, Apptainer, or another that says so."""
    return not CONTAINER_VARIABLES.isdisjoint(os.environ) or any(Path(file).exists() for file in CONTAINER_FILES)


def environment() -> dict[str, str]:
    """The environment variables that change how kernels are built or run."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(VARIABLES) and not name.endswith(CACHE_SUFFIX)
    }


def driver_state(device: torch.device) -> dict[str, Any]:
    """What NVML says of the driver: its version, and whether ECC and persistence mode are on; a GPU may lack either."""
    state: dict[str, Any] = {}
    with suppress(Exception):  # NVML may be missing
        import pynvml as nvml

        nvml.nvmlInit()
        state["driver"] = str(nvml.nvmlSystemGetDriverVersion())
        handle = nvml_handle(nvml, device)
        state["persistence"] = bool(nvml.nvmlDeviceGetPersistenceMode(handle))
        state["ecc"] = bool(nvml.nvmlDeviceGetEccMode(handle)[0])  # the last one, as GeForce cards lack it
    return state


def max_clock_mhz(device: torch.device) -> int | None:
    """The highest clock that NVML names for the multiprocessors; None of a CPU, or where there is no NVML."""
    if device.type == "cuda":
        with suppress(Exception):  # NVML may be missing
            import pynvml as nvml

            nvml.nvmlInit()
            return int(nvml.nvmlDeviceGetMaxClockInfo(nvml_handle(nvml, device), nvml.NVML_CLOCK_SM))
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
            handle = nvml_handle(nvml, self._device)
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


def nvml_handle(nvml: Any, device: torch.device) -> Any:
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
