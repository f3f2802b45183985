"""Devices by their data sheet, for models where nothing was measured. The numbers are in devices.toml."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from model.errors import UserError
from profiling.results import build


@dataclass(frozen=True)
class Device:
    """One device; rates and limits without another unit are those of one multiprocessor."""

    name: str
    capability: str
    multiprocessors: int
    clock_mhz: float
    memory_bytes: float  # what CUDA reports: less than the data sheet, by what the driver keeps
    hbm_bytes_s: float
    l2_bytes_s: float
    kernel_s: float  # of the shortest kernel in a CUDA graph
    link_one_way_bytes_s: float  # that collectives reach between its GPUs
    link_latency_s: float  # of an exchange beyond its bytes
    shared_bytes: int
    shared_bytes_block: int  # the most a block may have
    registers: int
    warps: int
    blocks: int
    flop_cycle: dict[str, float]  # of the tensor cores, by dtype
    mufu_cycle: float
    fp32_cycle: float
    mma: tuple[str, ...]  # matrix instructions that reach flop_cycle

    @property
    def target(self) -> str:
        """The compiler's name for it, such as "sm_90"."""
        return "sm_" + self.capability.replace(".", "")

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.clock_mhz * 1e6


@cache
def devices() -> dict[str, Device]:
    """All devices by name, in the file's order."""
    tables = tomllib.loads(Path(__file__).with_name("devices.toml").read_text())
    whole = {name: tables.get(table.pop("like", ""), {}) | table for name, table in tables.items()}
    return {name: build(Device, {"name": name} | values, name) for name, values in whole.items()}


def of_target(target: str) -> Device:
    """The device for a target such as "sm_90"; raises `UserError` if there is none."""
    known = {device.target: device for device in reversed(devices().values())}  # the first device of a target wins
    if target not in known:
        raise UserError(f"there is no target {target}; there are {', '.join(sorted(known))}")
    return known[target]


def named(name: str) -> Device | None:
    """The device that a driver calls `name`, such as "NVIDIA A100-SXM4-40GB"; None if it is not in the file.

    Every word of the name is tried, and every two or three adjacent words joined, which finds RTX4090 in "NVIDIA
    GeForce RTX 4090". Of several devices whose words are all there, the one with the longest name is meant.
    """
    words = re.split(r"[^A-Za-z0-9]+", name)
    joined = {"".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words))}
    found = [device for device in devices().values() if joined.issuperset(device.name.split("-"))]
    return max(found, key=lambda device: len(device.name), default=None)
