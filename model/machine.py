"""What machine this is and which versions run on it, as reports state it; and where what depends on both is kept."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import triton

from kernels.tuning import device_slug

CACHE_ENV = "FLASHTALK_CACHE"  # environment variable: where the folders lie


def cpu_name() -> str:
    """The processor's name as the system has it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cache_key(device: torch.device) -> str:
    """What results and compiled code depend on besides the code: device and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return f"{device_slug(name)}-torch{torch.__version__}-triton{triton.__version__}"


def device_cache_dir(device: torch.device) -> Path:
    """The device's folder below $FLASHTALK_CACHE, or else in the user's cache; not made."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get(CACHE_ENV) or users / "flashtalk") / cache_key(device)
