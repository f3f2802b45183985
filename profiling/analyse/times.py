"""How long a call of a chunk takes on a device, from what was measured there.

The best of these that there is:

    measured   the time of a case with this operation, shape and dtype, by the back-end that runs by default
    scaled     that of the nearest measured shape, by FLOPs, or by bytes where memory limits it
    ceiling    FLOPs and bytes over what large products and a large copy reached on the device, the longer of the two

A share of a shape fills the GPU less well. Where the kernel's tile is known, products and convolutions are scaled by
the waves of tiles that the GPU works through, instead of by FLOPs: a wave takes as long for one tile as for one tile on
each multiprocessor. No call is shorter than the shortest kernel.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kernels.tuning import FOLDER, TunedTable, distance, table_for
from model.errors import UserError
from profiling.analyse.calls import Call, work
from profiling.analyse.waves import launch_parameters, wave_work
from profiling.ceilings import copy_is_too_low
from profiling.defaults import CHOICES, default_backend
from profiling.devices import named
from profiling.formats import of_another_program
from profiling.results import CaseResult, Run

MEASURED, SCALED, CEILING = "measured", "scaled", "ceiling"


@dataclass(frozen=True)
class Timed:
    """Seconds of a call, and where they come from."""

    seconds: float
    source: str  # measured, scaled or ceiling
    basis: str = ""  # the case that was measured, if any


@dataclass(frozen=True)
class _Measured:
    case: str
    dims: Mapping[str, int]
    flops: float
    bytes: float
    seconds: float


class Times:
    """Times of calls on one device, from all results of it."""

    def __init__(self, runs: Sequence[Run], device: str) -> None:
        """`runs` are the newest first; those of other devices do not count. Raises `UserError` without ceilings."""
        own = [run for run in runs if run.machine.device == device]
        sheet = named(device)
        if sheet is None:
            raise UserError(f"{device} is not in devices.toml, which says how many multiprocessors it has")
        self._units, self._least, self._table = sheet.multiprocessors, sheet.kernel_s, _table(device, sheet.capability)
        self._cases = _newest_cases(own)
        rates = [r.ceilings.copy_bytes_s for r in own if not copy_is_too_low(r.machine, r.ceilings)]
        copies = [rate for rate in rates if rate]
        self._products: dict[str, float] = {}
        for run in own:
            self._products = run.ceilings.matmul_flop_s | self._products
        if not copies or "bf16" not in self._products:
            raise UserError(f"no results say how fast {device} copies and multiplies; give those of bench")
        self._copy = copies[0]

    @property
    def ceilings(self) -> str:
        """The ceilings in words."""
        products = ", ".join(f"{rate / 1e12:.0f} TFLOP/s in {dtype}" for dtype, rate in sorted(self._products.items()))
        return f"{self._copy / 1e12:.2f} TB/s copied, {products}"

    def of(self, call: Call) -> Timed:
        """The time of a call."""
        dims, candidates = dict(call.dims), self._cases.get((call.operation, call.dtype), [])
        same = [m for m in candidates if m.dims == dims and abs(m.flops - call.flops) <= 1e-3 * m.flops]
        if same:
            return Timed(same[0].seconds, MEASURED, same[0].case)
        memory = call.bytes / self._copy
        if nearest := self._nearest(call.operation, dims, candidates):
            return Timed(max(self._scaled(call, nearest), memory, self._least), SCALED, nearest.case)
        products = call.flops / self._products.get(call.dtype, self._products["bf16"]) if call.is_matmul else 0.0
        return Timed(max(products, memory, self._least), CEILING)

    @staticmethod
    def _nearest(operation: str, dims: Mapping[str, int], candidates: Sequence[_Measured]) -> _Measured | None:
        choice = CHOICES.get(operation)
        exact = [name for name in (choice.match_exactly if choice else ()) if name in dims and name != "kt"]
        fitting = [m for m in candidates if m.dims.keys() == dims.keys() and all(m.dims[n] == dims[n] for n in exact)]
        return min(fitting, key=lambda m: distance(m.dims, dims), default=None)

    def _scaled(self, call: Call, m: _Measured) -> float:
        """The time of a measured shape, for another one."""
        if not call.is_matmul:
            return m.seconds * call.bytes / m.bytes
        launch = launch_parameters(self._table, call.operation, m.dims, call.dtype)
        if not launch:
            return m.seconds * call.flops / m.flops
        here, there = (
            wave_work(call.operation, dims, flops, launch, self._units)
            for dims, flops in ((dict(call.dims), call.flops), (m.dims, m.flops))
        )
        return m.seconds * here / there


def _newest_cases(runs: Sequence[Run]) -> dict[tuple[str, str], list[_Measured]]:
    """Of each operation, dtype and shape one time: that of the tuned table, or else of the newest run.

    A table's time is of the launch parameters that are used now, a run's may be of older ones.
    """
    found: dict[tuple[str, str], list[_Measured]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.command != "tune"):  # stable: the newest stay first
        for case in () if of_another_program(run) else run.cases:
            same = found[case.operation, case.dtype]
            seconds = _seconds(case, run)
            if seconds and case.dims and not any(m.dims == case.dims for m in same):
                same.append(_Measured(case.case, case.dims, *_work(case), seconds))
    return found


def _seconds(case: CaseResult, run: Run) -> float | None:
    """The time of the back-end that runs by default, or else of the fastest one of ours."""
    backend = default_backend(case, run.machine)
    chosen = case.of(backend) if backend else None
    if chosen is None or not chosen.seconds:
        chosen = case.best(ours=True)
    return chosen.seconds if chosen else None


def _work(case: CaseResult) -> tuple[float, float]:
    """FLOPs and bytes as calls count them, or as the case does."""
    try:
        return work(case.operation, case.dims, case.dtype)
    except KeyError:  # an operation that no chunk calls, or dimensions of an older version
        return case.flops, case.bytes


def _table(device: str, capability: str) -> TunedTable | None:
    try:
        return table_for(device, capability, FOLDER)
    except ValueError as error:
        raise UserError(str(error)) from error
