"""Hardware and software versions of this machine for reports, and the cache directory that depends on them."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import triton

from kernels.tuning import device_slug

CACHE_ENV = "FLASHTALK_CACHE"  # environment variable: parent of the cache directories


def cpu_name() -> str:
    """The processor's name as the system reports it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """The version of an installed distribution, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cache_key(device: torch.device) -> str:
    """The device and the versions of PyTorch and Triton that compiled code is valid for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return f"{device_slug(name)}-torch{torch.__version__}-triton{triton.__version__}"


def device_cache_dir(device: torch.device) -> Path:
    """The device's directory below $FLASHTALK_CACHE or, without it, the user's cache. The directory is not created."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get(CACHE_ENV) or users / "flashtalk") / cache_key(device)
