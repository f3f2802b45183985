"""Which back-end computes an operation fastest on a GPU, and with which launch parameters: looked up, never guessed.

What was measured lies in `tuned/`, one JSON file a device, written by `python -m profiling tune` and never by hand:

    {"schema": "flashtalk-launch", "version": 1, "device": "NVIDIA H100 80GB HBM3", "capability": "9.0", "entries": [
      {"operation": "self_attention", "dtype": "bf16", "dims": {"queries": 12096, ...},
       "backend": "triton",                                  the fastest of all that were measured
       "launch": {"triton": {"BLOCK_M": 128, ...}},          of every back-end that has parameters, its best ones
       "seconds": {"triton": 0.021, "sdpa-cudnn": 0.024},    of one call, all measured in the same interleaved rounds
       "measured": "2026-01-31T09:30:00+00:00", "versions": {"torch": "2.11.0", ...}}]}

A shape that was not measured takes what is best for the nearest one of the same operation and dtype, nearest in the
logarithm of its dimensions. A device without a file takes that of another device of the same compute capability, as
H200 does from H100; never that of another capability. Where nothing was measured, the operation has its own default.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

SCHEMA, VERSION = "flashtalk-launch", 1
FOLDER = Path(__file__).parent / "tuned"

Launch = Mapping[str, int | float | str]


@dataclass(frozen=True)
class Choice:
    """What to run."""

    backend: str  # a name that the operation may not know: then it has its own default
    launch: Launch  # empty for a back-end without parameters


@dataclass(frozen=True)
class Entry:
    """What was measured of one operation at one shape; the fields are those of the file."""

    operation: str
    dtype: str
    dims: Mapping[str, int]
    backend: str
    launch: Mapping[str, Launch]
    seconds: Mapping[str, float]
    measured: str
    versions: Mapping[str, str]

    @property
    def key(self) -> tuple[Any, ...]:
        """What there is one entry of in a table; also the order of entries."""
        return self.operation, self.dtype, tuple(sorted(self.dims.items()))


@dataclass(frozen=True)
class Table:
    """One file."""

    device: str
    capability: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class GPU:
    """What of a GPU decides how a kernel is launched."""

    name: str
    capability: str  # "9.0"
    multiprocessors: int


_assumed: ContextVar[GPU | None] = ContextVar("assumed", default=None)


@contextmanager
def assuming(gpu: GPU) -> Iterator[None]:
    """While the body runs, launchers launch for that GPU, whatever is there: to compile for it elsewhere."""
    token = _assumed.set(gpu)
    try:
        yield
    finally:
        _assumed.reset(token)


def gpu(device: torch.device) -> GPU:
    """The GPU that a tensor on `device`, a CUDA device, is launched on."""
    return _assumed.get() or _gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _gpu(index: int) -> GPU:
    properties = torch.cuda.get_device_properties(index)
    return GPU(properties.name, f"{properties.major}.{properties.minor}", properties.multi_processor_count)


def lookup(
    operation: str,
    dims: Mapping[str, int],
    dtype: str,
    device: str | torch.device,
    among: Collection[str] = (),
    equal: Collection[str] = (),
) -> Choice | None:
    """The fastest back-end for that shape on that device and its parameters; None if nothing suitable was measured.

    `among` leaves only these back-ends to choose from. Dimensions named in `equal` must be those of the entry, such as
    a head size that a kernel is compiled for; the others may be near. `dtype` is a case's: "bf16", "fp8".
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None  # references run there
    return _lookup(gpu(device), operation, tuple(dims.items()), dtype, tuple(among), tuple(equal))


@cache  # a launch must not wait for a search
def _lookup(
    gpu: GPU,
    operation: str,
    dims: tuple[tuple[str, int], ...],
    dtype: str,
    among: tuple[str, ...],
    equal: tuple[str, ...],
) -> Choice | None:
    table = _table_of(gpu)
    return None if table is None else choose(table, operation, dict(dims), dtype, among, equal)


@cache
def _table_of(gpu: GPU) -> Table | None:
    return table_for(gpu.name, gpu.capability, FOLDER)


def choose(
    table: Table,
    operation: str,
    dims: Mapping[str, int],
    dtype: str,
    among: Collection[str] = (),
    equal: Collection[str] = (),
) -> Choice | None:
    """`lookup` in a table; of several nearest entries the first."""
    fitting = [
        entry
        for entry in table.entries
        if (entry.operation, entry.dtype, entry.dims.keys()) == (operation, dtype, dims.keys())
        and all(entry.dims[name] == dims[name] for name in equal)
        and (not among or any(name in entry.seconds for name in among))
    ]
    if not fitting:
        return None
    nearest = min(fitting, key=lambda entry: distance(entry.dims, dims))
    measured = [name for name in among if name in nearest.seconds]
    chosen = min(measured, key=lambda name: nearest.seconds[name]) if among else nearest.backend
    return Choice(chosen, nearest.launch.get(chosen, {}))


def distance(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """Euclidean, of log(1 + size): twice as long is as far as half as long, and 0 (no) lies apart from 1 (yes)."""
    return math.hypot(*(math.log1p(a[name]) - math.log1p(b[name]) for name in a))


def table_for(name: str, capability: str, folder: Path) -> Table | None:
    """The table of that device, or else the first one of the same compute capability.

    Raises ValueError, naming file and entry, for a table that is damaged.
    """
    own = folder / f"{slug(name)}.json"
    others = (path for path in sorted(folder.glob("*.json")) if path != own)
    for path in (own, *others) if own.is_file() else others:
        if (table := read(path)).capability == capability:
            return table
    return None


def slug(name: str) -> str:
    """A device's name as a file's: NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# --- The file -------------------------------------------------------------------------------------------------------


def to_json(table: Table) -> str:
    """The file's text: the same table gives the same text, entries and keys in their order."""
    fields = {"schema": SCHEMA, "version": VERSION, "device": table.device, "capability": table.capability}
    entries = [
        {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(entry).items()}
        for entry in sorted(table.entries, key=lambda entry: entry.key)
    ]
    return json.dumps(fields | {"entries": entries}, indent=1) + "\n"


def read(path: Path) -> Table:
    """The table in that file; raises ValueError, naming file and entry, if it is damaged or of another version."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict) or (values.get("schema"), values.get("version")) != (SCHEMA, VERSION):
        raise ValueError(f"{path} is not a {SCHEMA} file of version {VERSION}")
    _check(values, _FILE, f"{path}: table")
    for i, entry in enumerate(values["entries"]):
        if entry["backend"] not in entry["seconds"]:
            raise ValueError(f"{path}: table.entries[{i}].seconds lacks {entry['backend']}, the fastest one")
    return Table(values["device"], values["capability"], tuple(Entry(**entry) for entry in values["entries"]))


_SCALAR = int | float | str
_ENTRY = {
    "operation": str,
    "dtype": str,
    "dims": {...: int},  # any names
    "backend": str,
    "launch": {...: {...: _SCALAR}},
    "seconds": {...: int | float},
    "measured": str,
    "versions": {...: str},
}
_FILE = {"schema": str, "version": int, "device": str, "capability": str, "entries": [_ENTRY]}


def _check(value: Any, wanted: Any, where: str) -> None:
    """Raises ValueError, naming the place, unless the JSON value has that form."""
    kind = type(wanted) if isinstance(wanted, dict | list) else wanted
    if not isinstance(value, kind):
        raise ValueError(f"{where} is {value!r:.40}, wanted {getattr(kind, '__name__', kind)}")
    if isinstance(wanted, list):
        for i, item in enumerate(value):
            _check(item, wanted[0], f"{where}[{i}]")
    elif isinstance(wanted, dict):
        fields = dict.fromkeys(value, wanted[...]) if ... in wanted else wanted
        for name in sorted(fields.keys() ^ value.keys()):
            raise ValueError(f"{where} {'lacks' if name in fields else 'has the unknown field'} {name}")
        for name, form in fields.items():
            _check(value[name], form, f"{where}.{name}")
