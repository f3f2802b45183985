"""Tuned launch parameters: which back-end computes an operation fastest on a GPU, and with which parameters.

The measurements are in `tuned/`, one JSON file per device, written by `python -m profiling tune` and never by hand:

    {"schema": "flashtalk-tuned", "version": 2, "device": "NVIDIA H100 80GB HBM3", "capability": "9.0", "entries": [
      {"operation": "chunk_attention", "dtype": "bf16", "dims": {"queries": 12096, ...},
       "backend": "gluon",                                   the fastest back-end measured
       "configs": {"gluon": {"BLOCK_N": 128, ...}},          the best parameters of every back-end that has parameters
       "seconds": {"gluon": 0.004, "sdpa-cudnn": 0.005},     time of one call, measured in the same interleaved rounds
       "measured": "2026-01-31T09:30:00+00:00", "versions": {"torch": "2.11.0", ...}}]}

A shape that was not measured uses the entry of the nearest measured shape of the same operation and dtype, where
distance is measured between the logarithms of the dimensions. A device without a file uses that of another device of
the same compute capability, as an H200 does with the H100's, but never one of another capability. Where nothing
suitable was measured, operations use their own defaults, of which `untuned.toml` replaces some by compute capability.
"""

import json
import math
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

SCHEMA, VERSION = "flashtalk-tuned", 2
FOLDER = Path(__file__).parent / "tuned"
UNTUNED = Path(__file__).with_name("untuned.toml")

LaunchConfig = Mapping[str, int | float | str]  # launch parameters: tile sizes, warps, stages


@dataclass(frozen=True)
class TunedConfig:
    """A back-end, and the launch parameters to run it with."""

    backend: str  # an operation that does not have this back-end uses its own default
    config: LaunchConfig  # empty for a back-end without parameters


@dataclass(frozen=True)
class TunedEntry:
    """The measurements of one operation at one shape, with the fields of the JSON file."""

    operation: str
    dtype: str
    dims: Mapping[str, int]
    backend: str
    configs: Mapping[str, LaunchConfig]
    seconds: Mapping[str, float]
    measured: str
    versions: Mapping[str, str]

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the entry in its table, and orders entries."""
        return self.operation, self.dtype, tuple(sorted(self.dims.items()))


@dataclass(frozen=True)
class TunedTable:
    """The entries of one device."""

    device: str
    capability: str
    entries: tuple[TunedEntry, ...]


@dataclass(frozen=True)
class GPU:
    """The properties of a GPU that decide how a kernel is launched."""

    name: str
    capability: str  # "9.0"
    multiprocessors: int


_assumed: ContextVar[GPU | None] = ContextVar("assumed", default=None)


@contextmanager
def assume_gpu(gpu: GPU) -> Iterator[None]:
    """While the body runs, launchers choose parameters for `gpu`, whatever is installed, as for compiling elsewhere."""
    token = _assumed.set(gpu)
    try:
        yield
    finally:
        _assumed.reset(token)


def gpu_of(device: torch.device) -> GPU:
    """The GPU that a tensor on `device`, a CUDA device, is launched on."""
    return _assumed.get() or _gpu(torch.cuda.current_device() if device.index is None else device.index)


def pipelines_descriptors(device: torch.device) -> bool:
    """Whether Triton overlaps loads by descriptors with products: on Hopper and on Blackwell for data centres."""
    return gpu_of(device).capability.split(".")[0] in ("9", "10")


def reads_by_pointers(*operands: torch.Tensor) -> bool:
    """Whether Triton kernels read these matrices by pointers: TMA cannot, or Triton does not overlap it with products.

    TMA takes addresses and strides that are multiples of 16 bytes.
    """
    aligned = all(x.data_ptr() % 16 == 0 and all(n * x.itemsize % 16 == 0 for n in x.stride()[:-1]) for x in operands)
    return not aligned or (operands[0].is_cuda and not pipelines_descriptors(operands[0].device))


@cache
def _gpu(index: int) -> GPU:
    properties = torch.cuda.get_device_properties(index)
    return GPU(properties.name, f"{properties.major}.{properties.minor}", properties.multi_processor_count)


def launch_config(
    operation: str,
    dims: Mapping[str, int],
    dtype: str,
    device: torch.device,
    *,
    default: LaunchConfig,
    given: LaunchConfig | None = None,
    match_exactly: Collection[str] = (),
    backend: str = "triton",
) -> dict[str, Any]:
    """The launch parameters of an operation with a single kernel: `default`, updated by `given` or the tuned ones.

    Args:
        operation: the operation's public name.
        dims: the shape, under the names that the operation's cases use.
        dtype: the dtype as cases spell it: "bf16", "fp8".
        device: where the kernel runs.
        default: parameters for shapes that were not tuned; all that the kernel needs.
        given: the caller's parameters. None or empty uses the tuned ones.
        match_exactly: dimensions that must equal the entry's.
        backend: the kernel's name in the tuned tables.
    """
    default = {**default, **untuned_config(operation, dtype, device)}
    if given:
        return {**default, **given}
    tuned = tuned_config(operation, dims, dtype, device, (backend,), match_exactly)
    return {**default, **(tuned.config if tuned else {})}


def untuned_config(operation: str, dtype: str, device: torch.device) -> LaunchConfig:
    """The parameters of untuned.toml for an operation on a device, which replace its own defaults; often none."""
    if device.type != "cuda":
        return {}
    return _untuned().get((operation, dtype, gpu_of(device).capability), {})


@cache
def _untuned() -> Mapping[tuple[str, str, str], LaunchConfig]:
    entries = tomllib.loads(UNTUNED.read_text()).get("untuned", ())
    return {(x["operation"], x["dtype"], gpu): x["config"] for x in entries for gpu in x["capabilities"]}


def tuned_config(
    operation: str,
    dims: Mapping[str, int],
    dtype: str,
    device: str | torch.device,
    backends: Collection[str] = (),
    match_exactly: Collection[str] = (),
) -> TunedConfig | None:
    """The fastest back-end for a shape on a device, with its launch parameters; None if nothing suitable was measured.

    Args:
        operation: the operation's public name.
        dims: the shape, under the names that the operation's cases use.
        dtype: the dtype as cases spell it: "bf16", "fp8".
        device: where the operation runs. A CPU, which runs the reference, has no entries.
        backends: the back-ends to choose from; none means all.
        match_exactly: dimensions that must equal the entry's, such as a head_dim that a kernel is compiled for; the
            others may differ.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    return _tuned_config(gpu_of(device), operation, tuple(dims.items()), dtype, tuple(backends), tuple(match_exactly))


@cache  # so that launches do not search the table
def _tuned_config(
    gpu: GPU,
    operation: str,
    dims: tuple[tuple[str, int], ...],
    dtype: str,
    backends: tuple[str, ...],
    match_exactly: tuple[str, ...],
) -> TunedConfig | None:
    table = _table_of(gpu)
    return None if table is None else nearest_config(table, operation, dict(dims), dtype, backends, match_exactly)


@cache
def _table_of(gpu: GPU) -> TunedTable | None:
    return table_for(gpu.name, gpu.capability, FOLDER)


def nearest_config(
    table: TunedTable,
    operation: str,
    dims: Mapping[str, int],
    dtype: str,
    backends: Collection[str] = (),
    match_exactly: Collection[str] = (),
) -> TunedConfig | None:
    """`tuned_config` in a given table. Of several entries that are equally near, the first one is used."""
    candidates = [
        entry
        for entry in table.entries
        if (entry.operation, entry.dtype, entry.dims.keys()) == (operation, dtype, dims.keys())
        and all(entry.dims[name] == dims[name] for name in match_exactly)
        and (not backends or any(name in entry.seconds for name in backends))
    ]
    if not candidates:
        return None
    nearest = min(candidates, key=lambda entry: distance(entry.dims, dims))
    measured = [name for name in backends if name in nearest.seconds]
    backend = min(measured, key=lambda name: nearest.seconds[name]) if backends else nearest.backend
    return TunedConfig(backend, nearest.configs.get(backend, {}))


def distance(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """Euclidean distance of log(1 + size), by which twice and half a size are equally far, and flags 0 and 1 differ."""
    return math.hypot(*(math.log1p(a[name]) - math.log1p(b[name]) for name in a))


def table_for(name: str, capability: str, folder: Path) -> TunedTable | None:
    """The table of the device called `name`, or else the first table of the same compute capability.

    Raises ValueError, naming file and entry, if a table is damaged.
    """
    own = folder / f"{device_slug(name)}.json"
    others = (path for path in sorted(folder.glob("*.json")) if path != own)
    for path in (own, *others) if own.is_file() else others:
        if (table := read_table(path)).capability == capability:
            return table
    return None


def device_slug(name: str) -> str:
    """Converts a device's name to a file name's stem: NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --- The file -------------------------------------------------------------------------------------------------------


def to_json(table: TunedTable) -> str:
    """The JSON text of a table. Equal tables give equal texts: entries are sorted."""
    fields = {"schema": SCHEMA, "version": VERSION, "device": table.device, "capability": table.capability}
    entries = [
        {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(entry).items()}
        for entry in sorted(table.entries, key=lambda entry: entry.key)
    ]
    return json.dumps(fields | {"entries": entries}, indent=1) + "\n"


def read_table(path: Path) -> TunedTable:
    """Reads a table's file. Raises ValueError, naming file and entry, if it is damaged or of another version."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict) or (values.get("schema"), values.get("version")) != (SCHEMA, VERSION):
        raise ValueError(f"{path} is not a {SCHEMA} file of version {VERSION}")
    _check_json(values, _FILE, f"{path}: table")
    for i, entry in enumerate(values["entries"]):
        if entry["backend"] not in entry["seconds"]:
            raise ValueError(f"{path}: table.entries[{i}].seconds lacks {entry['backend']}, the fastest one")
    return TunedTable(values["device"], values["capability"], tuple(TunedEntry(**entry) for entry in values["entries"]))


_SCALAR = int | float | str
_ENTRY = {
    "operation": str,
    "dtype": str,
    "dims": {...: int},  # any names
    "backend": str,
    "configs": {...: {...: _SCALAR}},
    "seconds": {...: int | float},
    "measured": str,
    "versions": {...: str},
}
_FILE = {"schema": str, "version": int, "device": str, "capability": str, "entries": [_ENTRY]}


def _check_json(value: Any, wanted: Any, where: str) -> None:
    """Raises ValueError, naming the place, unless a JSON value matches the schema `wanted`."""
    kind = type(wanted) if isinstance(wanted, dict | list) else wanted
    if not isinstance(value, kind):
        raise ValueError(f"{where} is {value!r:.40}, wanted {getattr(kind, '__name__', kind)}")
    if isinstance(wanted, list):
        for i, item in enumerate(value):
            _check_json(item, wanted[0], f"{where}[{i}]")
    elif isinstance(wanted, dict):
        fields = dict.fromkeys(value, wanted[...]) if ... in wanted else wanted
        for name in sorted(fields.keys() ^ value.keys()):
            raise ValueError(f"{where} {'lacks' if name in fields else 'has the unknown field'} {name}")
        for name, schema in fields.items():
            _check_json(value[name], schema, f"{where}.{name}")
