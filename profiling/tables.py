"""Numbers derived from a run's measurements, in one place: speed, share of the ceiling, ratio to the best peer.

`bench` prints these rows; `report` draws them and writes them as JSON. Functions come in pairs: `measurement_rows` and
`measurement_table` for cases, `variant_rows` and `variant_table` for whole chunks. `audit_table` is the table of an
audit.
"""

import csv
import io
import math
import os
import statistics
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from profiling.ceilings import above_ceiling
from profiling.results import (
    ERROR,
    OK,
    WRONG,
    AuditResult,
    CaseResult,
    Ceilings,
    Machine,
    Measurement,
    Quality,
    Run,
    StageInterval,
    VariantResult,
)

LOG_WIDTH = 140
AUDIT_UNITS = ("tensor", "mufu", "fp32", "l2")  # of a multiprocessor, in the audit's model
STEP = "denoise/step"  # the stage whose calls count one by one
CLOCK_TOLERANCE = 1e-5  # seconds that successive stages may seem to overlap: the tracer's clock is no better


@dataclass(frozen=True)
class MeasurementRow:
    """One back-end on one case. A number that was not measured, or has no ceiling to relate to, is None."""

    case: str
    backend: str
    ours: bool
    status: str
    seconds: float | None  # median per call
    p20: float | None  # seconds: a fifth of the samples are faster
    p80: float | None  # seconds: a fifth of the samples are slower
    spread: float | None  # see `Measurement.spread`
    tflops: float | None  # 1e12 FLOP/s
    gbs: float | None  # 1e9 bytes/s, of the least bytes that the case needs
    bound: str | None  # "compute" or "memory"
    ceiling: float | None  # share of the machine's ceiling: least seconds over measured seconds
    ratio: float | None  # best peer's seconds over this one's; above 1 is faster than the best peer
    error: float | None  # relative, against the reference
    detail: str
    above: str  # why it is faster than the ceiling allows; empty if it is not


def measurement_rows(run: Run) -> list[MeasurementRow]:
    """All measurements of a run, in its order, with the numbers derived from them."""
    return [_row(case, m, run.ceilings, run.machine) for case in run.cases for m in case.measurements]


def _row(case: CaseResult, m: Measurement, ceilings: Ceilings, machine: Machine) -> MeasurementRow:
    seconds, bound, peer = m.seconds, case.bound(ceilings), case.best(ours=False)
    fifths = statistics.quantiles(m.samples, n=5, method="inclusive") if len(m.samples) > 1 else None
    return MeasurementRow(
        case=case.case,
        backend=m.backend,
        ours=m.ours,
        status=m.status,
        seconds=seconds,
        p20=fifths[0] if fifths else None,
        p80=fifths[3] if fifths else None,
        spread=m.spread if seconds else None,
        tflops=case.flops / seconds / 1e12 if seconds and case.flops else None,
        gbs=case.bytes / seconds / 1e9 if seconds and case.bytes else None,
        bound=bound[0] if bound else None,
        ceiling=bound[1] / seconds if seconds and bound else None,
        ratio=peer.seconds / seconds if seconds and peer and peer.seconds else None,
        error=m.error,
        detail=m.detail,
        above=above_ceiling(case, seconds, ceilings, machine),
    )


def measurement_csv(run: Run) -> str:
    """All measurements of a run as CSV: the fields of `MeasurementRow`, and a column `dims.NAME` for each dimension.

    A number that was not measured is empty.
    """
    dims = [case.dims for case in run.cases for _ in case.measurements]
    columns = [f.name for f in fields(MeasurementRow)] + [f"dims.{name}" for name in dict.fromkeys(chain(*dims))]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row, sizes in zip(measurement_rows(run), dims, strict=True):
        writer.writerow(asdict(row) | {f"dims.{name}": size for name, size in sizes.items()})
    return out.getvalue()


def terminal() -> Console:
    """A console on standard output; a file or a pipe, which has no width, gets one that fits the tables."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else LOG_WIDTH, highlight=False)


def measurement_table(rows: Iterable[MeasurementRow]) -> Table:
    """The rows for a terminal: each case's name, then its back-ends below it, ours in bold."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("case, back-end", overflow="fold")
    for heading in ("p20", "p50", "p80", "TFLOP/s", "GB/s", "of ceiling", "x peer"):
        out.add_column(heading, justify="right", no_wrap=True)
    rows = list(rows)
    for case, group in groupby(rows, key=lambda row: row.case):
        out.add_section()
        out.add_row(escape(case))
        for row in group:
            out.add_row(*_cells(row), style="bold" if row.ours else None)
    if above := list(dict.fromkeys(row.above for row in rows if row.above)):
        out.caption = "\n".join(f"! above its ceiling: {escape(reason)}" for reason in above)
    return out


def _cells(row: MeasurementRow) -> Iterator[str]:
    name = f"  {escape(row.backend)}" + (" (ours)" if row.ours else "")
    if row.status != OK:
        colour = "red" if row.status in (WRONG, ERROR) else "yellow"
        yield f"{name}: [{colour}]{escape(row.status)}[/]" + (
            f"\n    [dim]{escape(row.detail)}[/]" if row.detail else ""
        )
        return
    yield name
    yield duration(row.p20)
    yield duration(row.seconds) or "right"  # checked only
    yield duration(row.p80)
    yield number(row.tflops)
    yield number(row.gbs)
    yield share_of_ceiling(row)
    yield ratio(row.ratio)


def share_of_ceiling(row: MeasurementRow) -> str:
    """The share of the ceiling and what bounds it, with an exclamation mark if it is above: "87% memory"."""
    return f"{percent(row.ceiling)}{'!' if row.above else ''} {row.bound or ''}".strip()


@dataclass(frozen=True)
class VariantRow:
    """One way of running a chunk. A number that was not measured is None."""

    variant: str
    status: str
    frames: int  # new frames per chunk
    seconds: float | None  # median of its chunks
    fps: float | None  # new frames over that
    first_frame: float | None  # median seconds from window to first frames
    ratio: float | None  # the baseline's seconds over this one's; the baseline is the run's first variant
    stages: dict[str, float]  # span -> median seconds in a chunk, without calls beside other work; of a step, one call
    calls: dict[str, float]  # span -> calls per chunk
    beside: dict[str, float]  # span -> median seconds in a chunk of the calls beside other work, on another stream
    first_call: float | None
    peak_bytes: int | None
    weights_bytes: int | None
    gaps: float | None
    detail: str
    work: float | None  # summed seconds of the traced chunk's stages
    critical: float | None  # seconds of its critical path


def critical_path(timeline: Iterable[StageInterval]) -> float:
    """Seconds of the longest chain of stages that do not overlap: no schedule of this chunk is shorter."""
    ends, longest = [0.0], [0.0]  # the longest chain that ends by then, for rising ends
    for interval in sorted(timeline, key=lambda interval: interval.end):
        before = bisect_right(ends, interval.begin + CLOCK_TOLERANCE) - 1
        chain = longest[before] + interval.end - interval.begin
        ends.append(interval.end)
        longest.append(max(longest[-1], chain))
    return longest[-1]


def calls_beside(variant: VariantResult, stage: str) -> tuple[bool, ...]:
    """For each call of a stage in a chunk, whether it runs beside other work: on a stream that is not the busiest one.

    The traced chunk shows it. Without one, or where its calls are others, all calls count as one after the other.
    """
    busy: defaultdict[int, float] = defaultdict(float)
    for interval in variant.timeline:
        busy[interval.stream] += interval.end - interval.begin
    calls = sorted((i for i in variant.timeline if i.stage == stage), key=lambda i: i.begin)
    if len(calls) * len(variant.chunk) != len(variant.stages.get(stage, ())):
        return (False,) * (len(variant.stages.get(stage, ())) // max(len(variant.chunk), 1))
    main = [i for i in variant.timeline if i.stream == max(busy, key=lambda stream: busy[stream])]
    return tuple(i not in main and any(_overlap(i, other) for other in main) for i in calls)


def stage_value(variant: VariantResult, stage: str) -> float | None:
    """The median of a stage over a variant's chunks; None if it was not measured.

    Stages are spans, whose calls in a chunk count together unless they run beside other work, and those that
    `profiling.analyse.targets` defines.
    """
    if stage in ("peak_bytes", "gaps"):
        return getattr(variant, stage)
    if stage == "fps":
        return variant.frames / statistics.median(variant.chunk) if variant.chunk else None
    if stage == "after_denoise":
        first, steps = stage_value(variant, "first_frame"), variant.per_chunk(STEP)
        return first - statistics.median(steps) if first and steps else None
    if stage == "vae":
        parts = [variant.per_chunk(name) for name in ("decode", "motion")]
        return sum(map(statistics.median, parts)) if all(parts) else None
    whole = {"chunk": variant.chunk, "first_frame": variant.first_frame, STEP: variant.stages.get(stage, ())}
    samples = whole[stage] if stage in whole else _in_each_chunk(variant, stage, beside=False)
    return statistics.median(samples) if samples else None


def _in_each_chunk(variant: VariantResult, stage: str, *, beside: bool) -> tuple[float, ...]:
    """Seconds of a stage in each chunk: of its calls beside other work, or of the others."""
    if not variant.per_chunk(stage):
        return ()
    hidden, calls = calls_beside(variant, stage), variant.stages[stage]
    chunks = (calls[i : i + len(hidden)] for i in range(0, len(calls), len(hidden)))
    return tuple(sum(s for s, h in zip(chunk, hidden, strict=True) if h == beside) for chunk in chunks)


def _overlap(a: StageInterval, b: StageInterval) -> bool:
    return min(a.end, b.end) - max(a.begin, b.begin) > CLOCK_TOLERANCE


def variant_rows(run: Run) -> list[VariantRow]:
    """All variants of a run, in its order, with the numbers derived from them."""
    baseline = next((seconds for v in run.variants if (seconds := _chunk_seconds(v))), None)
    return [_variant_row(v, baseline) for v in run.variants]


def _chunk_seconds(variant: VariantResult) -> float | None:
    return stage_value(variant, "chunk") if variant.status == OK else None


def _variant_row(v: VariantResult, baseline: float | None) -> VariantRow:
    seconds = _chunk_seconds(v)
    return VariantRow(
        variant=v.variant,
        status=v.status,
        frames=v.frames,
        seconds=seconds,
        fps=v.frames / seconds if seconds and v.frames else None,
        first_frame=statistics.median(v.first_frame) if v.first_frame else None,
        ratio=baseline / seconds if seconds and baseline else None,
        stages={span: value for span in v.stages if (value := stage_value(v, span)) is not None} if seconds else {},
        calls={span: len(calls) / len(v.chunk) for span, calls in v.stages.items()} if seconds else {},
        beside={
            span: statistics.median(found)
            for span in v.stages
            if seconds and (found := _in_each_chunk(v, span, beside=True))
        },
        first_call=v.first_call,
        peak_bytes=v.peak_bytes,
        weights_bytes=v.weights_bytes,
        gaps=v.gaps,
        detail=v.detail,
        work=sum(interval.end - interval.begin for interval in v.timeline) or None,
        critical=critical_path(v.timeline) or None,
    )


def variant_table(rows: Iterable[VariantRow]) -> Table:
    """The variants for a terminal; a span's time is that of its calls in a chunk, but for a step's, which is one."""
    rows = list(rows)
    spans = list(dict.fromkeys(span for row in rows for span in row.stages))
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("variant", overflow="fold")
    for heading in ("chunk", *spans, "FPS", "first frame", "x baseline", "peak memory", "GPU idle"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        name = escape(row.variant)
        if row.status != OK:
            name += f": [red]{escape(row.status)}[/]" + (f"\n  [dim]{escape(row.detail)}[/]" if row.detail else "")
        out.add_row(
            name,
            duration(row.seconds),
            *(duration(row.stages.get(span)) for span in spans),
            number(row.fps),
            duration(row.first_frame),
            ratio(row.ratio),
            memory(row.peak_bytes),
            percent(row.gaps),
        )
    return out


def audit_table(results: Sequence[AuditResult]) -> Table:
    """The results of an audit for a terminal: each case, then its kernels, in red if something is wrong with them."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("case, kernel", overflow="fold")
    numbers = ("regs", "spills", "smem", "occupancy", "MMA", *AUDIT_UNITS)
    for heading in numbers:
        out.add_column(heading, justify="right", no_wrap=True)
    out.add_column("bound", no_wrap=True)
    out.add_column("TFLOP/s", justify="right", no_wrap=True)
    case = None
    for result in results:
        if result.case != case:
            out.add_section()
            out.add_row(escape(result.case))
            case = result.case
        out.add_row(*_audit_cells(result), style="red" if result.faults else None)
    out.title = f"compiled for {', '.join(dict.fromkeys(result.target for result in results))}"
    out.caption = (
        f"{', '.join(AUDIT_UNITS)}: cycles of one pass, modelled (-: not modelled); TFLOP/s: modelled upper bound"
    )
    return out


def _audit_cells(result: AuditResult) -> Iterator[str]:
    yield f"  {escape(result.kernel)} {result.target}"
    if not result.instructions:  # did not compile
        return
    yield str(result.registers)
    yield str(result.spills)
    yield f"{result.shared / 1024:.0f}K"
    yield percent(result.occupancy)
    yield " ".join(name for name in result.instructions if name.endswith("MMA"))
    if not result.bounds:
        yield from ("" for _ in AUDIT_UNITS)
        yield "not modelled"
        yield ""
        return
    bound = max(result.bounds, key=lambda unit: result.bounds[unit])
    for unit in AUDIT_UNITS:
        value = number(result.tile.get(f"{unit}_cycles")) or "-"
        yield f"[bold]{value}[/]" if unit == bound else value
    yield bound
    yield number(result.tflops)


def number(value: float | None) -> str:
    """Three significant digits, or all digits before the point: 0.0123, 4.56, 1234. Empty for None and NaN."""
    if value is None or not math.isfinite(value):
        return ""
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, 2 - magnitude)}f}"


def ratio(value: float | None) -> str:
    """How many times as fast: 1.13, 0.71, 0.00241. Empty for None and NaN."""
    return f"{value:.2f}" if value is not None and 0.1 < value < math.inf else number(value)


def percent(value: float | None) -> str:
    """A share in percent: 0.0712 is 7.1 %, 0.83 is 83 %, 0.000123 is 0.0123 %. Empty for None and NaN."""
    if value is None or not math.isfinite(value):
        return ""
    if 0 < abs(value) < 0.00095:
        return f"{number(100 * value)}%"
    return f"{value:.1%}" if abs(value) < 0.0995 else f"{value:.0%}"


def duration(seconds: float | None) -> str:
    """Seconds in a suitable unit: 12.6 ns, 12.3 µs, 4.56 ms, 7.89 s. Empty for None."""
    if seconds is None:
        return ""
    units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
    scale, unit = next(((s, u) for s, u in units if abs(seconds) >= s), (1e-9, "ns"))
    return f"{number(seconds / scale)} {unit}"


def memory(size: float | None) -> str:
    """Bytes in a suitable unit: 344 B, 160 KiB, 21.7 GiB. Empty for None."""
    return "" if size is None else _scaled(size, 1024, ("B", "KiB", "MiB", "GiB"))


def rate(value: float | None, unit: str) -> str:
    """A rate per second in a suitable unit: 2.86 TB/s, 1.15 GFLOP/s. Empty for None."""
    return "" if value is None else f"{_scaled(value, 1000, ('', 'k', 'M', 'G', 'T'))}{unit}/s"


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    """The value in the largest unit that it fills, each `base` times the one before; whole in the smallest."""
    power = 0
    while abs(value) >= base and power + 1 < len(units):
        value, power = value / base, power + 1
    return f"{number(value) if power else f'{value:g}'} {units[power]}"


def quality_lines(rows: Sequence[Quality]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Settings, and for each measure its name and a cell for each setting: "0.71 (0.66 to 0.75)"."""
    settings, measures = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("setting", "measure"))
    found = {(row.measure, row.setting): row for row in rows}
    return settings, [(m, [_quality_cell(found.get((m, setting))) for setting in settings]) for m in measures]


def _quality_cell(row: Quality | None) -> str:
    if row is None:
        return ""
    return number(row.value) + ("" if row.low is None else f" ({number(row.low)} to {number(row.high)})")


def quality_table(rows: Sequence[Quality]) -> Table:
    """The measures for a terminal, a column for each setting."""
    settings, lines = quality_lines(rows)
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("measure", overflow="fold")
    for setting in settings:
        out.add_column(setting, justify="right")
    for measure, cells in lines:
        out.add_row(measure, *cells)
    out.caption = "with 95 % intervals over streams"
    return out
