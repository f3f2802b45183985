"""A run: everything one call of `python -m profiling` measured, as frozen dataclasses and as one JSON file.

A run holds what was observed and nothing that follows from it: seconds a call of every round, operation and byte
counts, clocks. Medians, TFLOP/s, bounds and ratios are computed from these where they are shown (`Measurement.seconds`,
`CaseResult.bound`), so no two numbers in a file can contradict each other. All times are in seconds, sizes in bytes.

Every section may be empty: `bench` fills `cases`, `audit` fills `audit`, `gpu --phase e2e` fills
`variants`, `quality` fills `quality`, `soak` fills `soak`, `visit` fills `visits`.
"""

import dataclasses
import json
import math
import statistics
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from model.errors import UserError
from model.files import check_replaceable, replacing
from profiling import migrate
from profiling.soak import Soak, Visit

SCHEMA = "flashtalk-profile"
VERSION = 3  # profiling.migrate reads earlier ones
LOW, HIGH = 1e-30, 1e30  # of numbers in a file

OK = "ok"  # ran and is right; the only status with times
WRONG = "wrong"  # ran, but its output is not the reference's
ERROR = "error"  # raised
NOT_INSTALLED = "not installed"
UNSUPPORTED = "unsupported"  # cannot do this shape, dtype or device
SKIPPED = "skipped"  # no time was left
STATUSES = (OK, WRONG, ERROR, NOT_INSTALLED, UNSUPPORTED, SKIPPED)


@dataclass(frozen=True)
class Machine:
    """Where a run took place."""

    kind: str  # "cuda" or "cpu"
    device: str  # "NVIDIA H100 80GB HBM3", "AMD EPYC"
    units: int  # streaming multiprocessors, or CPU threads used
    memory_bytes: int
    capability: str | None = None  # of a GPU: "9.0"
    l2_bytes: int | None = None
    driver: str | None = None
    versions: dict[str, str] = field(default_factory=dict)  # python, torch, triton, cuda, cudnn, cublas ...
    revision: str | None = None  # git commit; with uncommitted changes to the code, "-dirty-" and their hash follow
    tuned: str | None = None  # hash of the table of launch parameters that this GPU uses
    ecc: bool | None = None  # whether the GPU's memory corrects errors, which costs bandwidth on some
    persistence: bool | None = None  # whether the driver stays loaded between processes
    container: bool | None = None  # whether the process ran inside a container
    environment: dict[str, str] | None = None  # environment variables that change how kernels are built or run


@dataclass(frozen=True)
class Ceilings:
    """What this very machine reached at the start of the run: a large copy and large matrix products."""

    copy_bytes_s: float | None = None  # bytes read plus bytes written, a second
    matmul_flop_s: dict[str, float] = field(default_factory=dict)  # by dtype: fp32, bf16, fp8
    copy_launched: bool = False  # as kernels are; earlier files timed a node of a CUDA graph, slower on a GPU


@dataclass(frozen=True)
class HotReading:
    """What NVML read while a back-end ran on a GPU at its power cap."""

    mhz: float  # median clock of the multiprocessors
    watts: float  # mean power
    joules: float  # of one call


@dataclass(frozen=True)
class Measurement:
    """One back-end on one case."""

    backend: str
    status: str  # ok, wrong, error, not installed, unsupported or skipped
    ours: bool = False  # else it is a peer
    detail: str = ""  # why it is not ok
    error: float | None = None  # relative Frobenius error against the reference
    samples: tuple[float, ...] = ()  # seconds a call, one value a round; a round times all back-ends in turn
    first_call: float | None = None  # seconds, compilation included
    graph: bool = False  # timed as a CUDA graph, so without launch gaps
    hot: HotReading | None = None  # if the samples are those of a hot GPU

    @property
    def seconds(self) -> float | None:
        """Median seconds a call."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def spread(self) -> float | None:
        """Half the distance between the 20th and 80th percentile, relative to the median."""
        if len(self.samples) < 2 or not self.seconds:
            return None
        fifths = statistics.quantiles(self.samples, n=5, method="inclusive")
        return (fifths[3] - fifths[0]) / 2 / self.seconds


@dataclass(frozen=True)
class CaseResult:
    """All back-ends on one case."""

    case: str  # operation/shape/dtype
    operation: str
    shape: str
    dtype: str
    flops: float  # useful ones, a multiply-add is 2
    bytes: float  # every operand read once, every result written once
    world: int = 1  # GPUs that share the work; this is one rank's part
    calls: float = 0  # of this case in one chunk, on one rank
    is_matmul: bool = True  # whether the FLOPs are matrix products, whose ceiling is measured
    dims: dict[str, int] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()

    def of(self, backend: str) -> Measurement | None:
        """The measurement of a back-end."""
        return next((m for m in self.measurements if m.backend == backend), None)

    def best(self, ours: bool | None = None) -> Measurement | None:
        """The fastest right one of all, of ours, or of the peers."""
        timed = [m for m in self.measurements if m.samples and (ours is None or m.ours == ours)]
        return min(timed, key=lambda m: m.seconds or math.inf, default=None)

    def bound(self, ceilings: Ceilings) -> tuple[str, float] | None:
        """What limits the case on that machine, "compute" or "memory", and the seconds it then takes at least."""
        bounds = {}
        if self.is_matmul and (rate := ceilings.matmul_flop_s.get(self.dtype)):
            bounds["compute"] = self.flops / rate
        if self.bytes and ceilings.copy_bytes_s:
            bounds["memory"] = self.bytes / ceilings.copy_bytes_s
        return max(bounds.items(), key=lambda item: item[1]) if bounds else None


@dataclass(frozen=True)
class StageInterval:
    """When one call of a chunk's stage ran, and on which CUDA stream; on a CPU, in which thread."""

    stage: str
    stream: int  # numbered in the order in which streams begin
    begin: float  # seconds from the chunk's beginning
    end: float


@dataclass(frozen=True)
class VariantResult:
    """A whole chunk in one way of running it: precision, kernels, compile mode."""

    variant: str  # "bf16-eager"
    status: str  # as of a measurement
    detail: str = ""
    stages: dict[str, tuple[float, ...]] = field(default_factory=dict)  # span name -> seconds, one value a call
    chunk: tuple[float, ...] = ()  # seconds of each whole chunk
    first_frame: tuple[float, ...] = ()  # seconds from window to first frames, each chunk
    frames: int = 0  # new frames a chunk
    first_call: float | None = None  # seconds of the first chunk, compilation included
    peak_bytes: int | None = None
    weights_bytes: int | None = None  # of student and VAE
    gaps: float | None = None  # share of a chunk in which the GPU had nothing to do
    trace: str | None = None  # file name of a Perfetto trace
    timeline: tuple[StageInterval, ...] = ()  # of the traced chunk

    def per_chunk(self, stage: str) -> tuple[float, ...]:
        """Seconds of a stage in each chunk, all its calls together; nothing if its calls are no whole chunks."""
        calls, chunks = self.stages.get(stage, ()), len(self.chunk)
        if not calls or not chunks or len(calls) % chunks:
            return ()
        each = len(calls) // chunks
        return tuple(sum(calls[i : i + each]) for i in range(0, len(calls), each))


@dataclass(frozen=True)
class AuditResult:
    """One Triton kernel, compiled ahead of time at one case's shape."""

    case: str
    kernel: str
    target: str  # "sm_90"
    grid: tuple[int, ...] = ()
    warps: int = 0  # a block
    stages: int = 0
    registers: int = 0  # a thread
    spills: int = 0  # bytes
    local: int = 0  # bytes of local memory a thread
    shared: int = 0  # bytes a block
    occupancy: float = 0.0  # resident warps over the most there can be
    blocks: int = 0  # resident on one multiprocessor
    instructions: dict[str, int] = field(default_factory=dict)  # in the SASS, counted as they stand
    tile: dict[str, float] = field(default_factory=dict)  # of one pass of the main loop, see `profiling.audit`
    bounds: dict[str, float] = field(default_factory=dict)  # unit -> least seconds of the whole launch, modelled
    tflops: float | None = None  # modelled upper bound
    warnings: tuple[str, ...] = ()  # of ptxas
    faults: tuple[str, ...] = ()  # what breaks the budget, or the reason it did not compile


@dataclass(frozen=True)
class NvmlTrace:
    """Clocks, power, temperature and memory of the GPU over a run, as NVML reports them; all of one length."""

    seconds: tuple[float, ...] = ()  # since the run began
    sm_mhz: tuple[float, ...] = ()
    memory_mhz: tuple[float, ...] = ()
    watts: tuple[float, ...] = ()
    celsius: tuple[float, ...] = ()
    used_bytes: tuple[float, ...] = ()
    throttled: dict[str, float] = field(default_factory=dict)  # reason -> share of the readings
    power_limit_watts: float | None = None
    note: str = ""  # why there are no readings


@dataclass(frozen=True)
class Quality:
    """A measure of generated video, in one way to run a preset, with its 95 % interval over streams."""

    setting: str  # "bf16, 4 steps, 33 frames"
    measure: str  # "r of open"
    value: float | None  # None where it is not defined, such as a correlation with what does not move
    low: float | None  # None for a single stream
    high: float | None
    track: tuple[float, ...] = ()  # of a drift: the mean over streams, in equal parts along them


@dataclass(frozen=True)
class Run:
    """One results file."""

    command: str
    started: str  # ISO 8601, UTC
    machine: Machine
    seconds: float = 0.0  # wall time
    ceilings: Ceilings = field(default_factory=Ceilings)
    cases: tuple[CaseResult, ...] = ()
    variants: tuple[VariantResult, ...] = ()
    audit: tuple[AuditResult, ...] = ()
    quality: tuple[Quality, ...] = ()
    soak: tuple[Soak, ...] = ()
    visits: tuple[Visit, ...] = ()
    nvml: NvmlTrace = field(default_factory=NvmlTrace)
    notes: tuple[str, ...] = ()

    def case(self, name: str) -> CaseResult | None:
        """The result of that case."""
        return next((c for c in self.cases if c.case == name), None)

    def quality_of(self, setting: str, measure: str) -> Quality | None:
        """That measure of that setting."""
        return next((q for q in self.quality if (q.setting, q.measure) == (setting, measure)), None)


def now() -> str:
    """The time as `Run.started` has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def to_json(run: Run) -> dict[str, Any]:
    """The run as JSON values, with schema and version in front; NaN and infinities, which JSON lacks, as null."""
    return {"schema": SCHEMA, "version": VERSION} | _plain(dataclasses.asdict(run))


def as_json_text(values: Any) -> str:
    """The values as JSON; NaN and infinities, which JSON lacks, as null."""
    return json.dumps(_plain(values), indent=1, allow_nan=False)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all. Raises `UserError` if it cannot be written."""
    with _writing(path), replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def check_writable(path: Path) -> None:
    """Raises `UserError` if `path` cannot be written; makes its folder, but not the file."""
    with _writing(path):
        check_replaceable(path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes the folder of `path`; turns an OSError of the body into a `UserError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another place") from error


def save(run: Run, path: Path) -> None:
    """Writes a results file whole or not at all."""
    write(path, as_json_text(to_json(run)) + "\n")


def from_own_json(values: Any, source: str) -> Run | None:
    """The run that JSON values in this project's schema describe, None if they are in another one.

    Values of an earlier schema version are migrated. Raises `UserError`, which calls the values by `source`, if they
    are damaged or of a later version.
    """
    if not (isinstance(values, dict) and values.get("schema") == SCHEMA):
        return None
    if values.get("version") not in range(1, VERSION + 1):
        raise UserError(f"{source} has schema version {values.get('version')!r}, this is version {VERSION}")
    try:
        values = migrate.newest(values)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{source} is damaged: {type(error).__name__} {error}") from error
    try:
        return build(Run, {k: v for k, v in values.items() if k not in ("schema", "version")}, "run")
    except (TypeError, ValueError) as error:
        raise UserError(f"{source} is damaged: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite(value: Any, where: str) -> float:
    """The value if it is a number within a file's limits, else ValueError; Python's JSON has NaN and infinity too."""
    if isinstance(value, int | float) and not isinstance(value, bool) and (value == 0 or LOW < abs(value) < HIGH):
        return float(value)
    raise ValueError(f"{where} is {value!r:.40}, wanted a finite number")


T = TypeVar("T")


# msgspec would read dataclasses too, but lets unknown fields, NaN and 1e300 pass.
def build(cls: type[T], values: Any, where: str) -> T:
    """The dataclass `cls` from JSON values, every field checked against its annotation; ValueError names the field."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {type(values).__name__}, wanted an object")
    hints = typing.get_type_hints(cls)
    if unknown := set(values) - set(hints):
        raise ValueError(f"{where} has the unknown field {sorted(unknown)[0]}")
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in values:
            raise ValueError(f"{where} lacks {f.name}")
    return cls(**{name: _value(hints[name], item, f"{where}.{name}") for name, item in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _value(arguments[0], value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _value(arguments[1], item, f"{where}[{key}]") for key, item in value.items()}
    if hint is float:
        return finite(value, where)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool) == isinstance(value, bool):
        return value
    raise ValueError(f"{where} is {value!r:.40}, wanted {getattr(hint, '__name__', hint)}")
