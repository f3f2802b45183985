"""Cases over a range of sizes of one dimension, and their line plot: `bench CASE --sweep rows=1024:16384:x2`."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from model.errors import UserError
from profiling.cases import Case
from profiling.results import CaseResult, Run, check_writable, write
from profiling.tables import MeasurementRow, measurement_rows

MAX_SIZES = 100
FORM = re.compile(r"(?P<names>\w+(=\w+)*)=(?P<first>\d+):(?P<last>\d+):(?P<sign>[x+])(?P<step>\d+)")
PLOT_SUFFIXES = (".png", ".svg")
PANEL = (8.0, 4.0)  # inches
STYLE: Any = {"svg.fonttype": "path", "svg.hashsalt": "flashtalk", "text.parse_math": False}  # names may hold dollars


@dataclass(frozen=True)
class Sweep:
    """Sizes that the dimensions `names` take, all of them the same one at a time."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    geometric: bool

    def label(self, size: int | None = None) -> str:
        """Names the dimensions, and the size if there is one: "queries=keys", "queries=keys=4096"."""
        return "=".join((*self.names, *(() if size is None else (str(size),))))


def parse_sweep(text: str) -> Sweep:
    """The sweep that `--sweep` names: DIMENSION=FIRST:LAST:xFACTOR or :+STEP; A=B=... sets two dimensions alike.

    Raises `UserError` for anything else, and for more than `MAX_SIZES` sizes.
    """
    if (found := FORM.fullmatch(text)) is None:
        raise UserError(f"--sweep {text}: write it like rows=1024:16384:x2 or rows=1000:5000:+500")
    first, last, step = (int(found[name]) for name in ("first", "last", "step"))
    geometric = found["sign"] == "x"
    if not 0 < first <= last or step < (2 if geometric else 1):
        raise UserError(f"--sweep {text}: it must begin above 0, not above its end, and grow")
    sizes = [first]
    while (size := sizes[-1] * step if geometric else sizes[-1] + step) <= last:
        sizes.append(size)
    if len(sizes) > MAX_SIZES:
        raise UserError(f"--sweep {text}: {len(sizes)} sizes; at most {MAX_SIZES} can be measured")
    return Sweep(tuple(found["names"].split("=")), tuple(sizes), geometric)


def swept_cases(cases: Iterable[Case], sweep: Sweep) -> Iterator[Case]:
    """Each case at every size. These shapes are no part of a chunk, so they have no calls.

    Raises `UserError` for a case that lacks a dimension.
    """
    for case in cases:
        if unknown := [name for name in sweep.names if name not in case.shape.dims]:
            known = ", ".join(case.shape.dims)
            raise UserError(f"--sweep {sweep.label()}: {case.name} has no dimension {unknown[0]}, but {known}")
        for size in sweep.sizes:
            dims = {**case.shape.dims, **dict.fromkeys(sweep.names, size)}
            name = f"{case.shape.name}-{sweep.label(size)}"
            yield replace(case, shape=replace(case.shape, name=name, dims=dims, calls=0))


def check_plot(path: Path, sweep: str | None) -> None:
    """Raises `UserError` unless there is a sweep to draw, and the file's name says in which format."""
    if sweep is None:
        raise UserError(f"--plot {path} draws a sweep: add one, such as --sweep rows=1024:16384:x2")
    if path.suffix not in PLOT_SUFFIXES:
        raise UserError(f"--plot {path}: its name must end in {' or '.join(PLOT_SUFFIXES)}")
    check_writable(path)


@matplotlib.rc_context(STYLE)
def write_plot(run: Run, sweep: Sweep, path: Path) -> None:
    """Writes a line plot of a swept run: speed by size, a panel for each case, a line for each back-end.

    Speed is TFLOP/s of matrix products, GB/s of everything else. A line is the median with its 20th to 80th percentile;
    the dashed one is what the machine's ceilings allow.
    """
    families = [list(group) for _, group in groupby(run.cases, lambda case: _family(case, sweep))]
    figure = Figure((PANEL[0], PANEL[1] * len(families)), layout="constrained")
    rows = iter(measurement_rows(run))
    for axes, cases in zip(figure.subplots(len(families), squeeze=False)[:, 0], families, strict=True):
        points = [(case, next(rows)) for case in cases for _ in case.measurements]
        _draw(axes, cases, points, run, sweep)
    figure.suptitle(run.machine.device)
    buffer = io.BytesIO()
    stable = {"Date": None, "Creator": None} if path.suffix == ".svg" else None  # the same run gives the same file
    figure.savefig(buffer, format=path.suffix[1:], metadata=stable)
    write(path, buffer.getvalue())


def _family(case: CaseResult, sweep: Sweep) -> str:
    """The name of the case before it was swept."""
    shape = case.shape.removesuffix(f"-{sweep.label(case.dims[sweep.names[0]])}")
    return f"{case.operation}/{shape}/{case.dtype}"


def _draw(
    axes: Axes, cases: Sequence[CaseResult], points: Sequence[tuple[CaseResult, MeasurementRow]], run: Run, sweep: Sweep
) -> None:
    for backend in dict.fromkeys(row.backend for _, row in points):
        timed = [(c, row, row.seconds) for c, row in points if row.backend == backend and row.seconds is not None]
        if timed:
            sizes = [c.dims[sweep.names[0]] for c, _, _ in timed]
            median = [_speed(c, seconds) for c, _, seconds in timed]
            slow = [_speed(c, row.p80 or seconds) for c, row, seconds in timed]
            fast = [_speed(c, row.p20 or seconds) for c, row, seconds in timed]
            ours = timed[0][1].ours
            (line,) = axes.plot(sizes, median, marker="o", lw=2.4 if ours else 1.2, label=backend + " (ours)" * ours)
            axes.fill_between(sizes, slow, fast, color=line.get_color(), alpha=0.2, lw=0)
    if bounds := [(c, bound[1]) for c in cases if (bound := c.bound(run.ceilings))]:
        sizes, ceiling = [c.dims[sweep.names[0]] for c, _ in bounds], [_speed(c, seconds) for c, seconds in bounds]
        axes.plot(sizes, ceiling, "--", color="grey", lw=1, label="ceiling")
    if sweep.geometric:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(sweep.sizes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:.0f}"))
    axes.tick_params("x", rotation=30 if len(sweep.sizes) > 8 else 0)
    axes.set(title=_family(cases[0], sweep), xlabel=sweep.label(), ylabel="TFLOP/s" if cases[0].is_matmul else "GB/s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _speed(case: CaseResult, seconds: float) -> float:
    """TFLOP/s of matrix products, GB/s of everything else."""
    return (case.flops / 1e12 if case.is_matmul else case.bytes / 1e9) / seconds
