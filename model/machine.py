"""Hardware and software versions of this machine for reports, and the cache directory that depends on them."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton

from kernels.tuning import device_slug
from model.errors import UserError

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
    """The device's directory below $FLASHTALK_CACHE or, without it, the user's cache. The directory is not created.

    Raises `UserError` if neither is known, as for a user without a home directory.
    """
    folder = os.environ.get(CACHE_ENV) or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/flashtalk"
    try:
        return Path(folder).expanduser() / cache_key(device)
    except RuntimeError as error:
        raise UserError(f"there is no home directory to keep it in: set {CACHE_ENV} to a folder") from error


def writable_cache_dir(device: torch.device) -> Path:
    """`device_cache_dir`, created if necessary. Raises `UserError` if it cannot be written."""
    folder = device_cache_dir(device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): set {CACHE_ENV} to another folder") from error
    return folder
