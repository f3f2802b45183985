"""Shows a run as one self-contained HTML file, as PNG files of its figures, as tables, or as JSON.

Numbers come from `profiling.tables`, figures from figures.py and roofline.py, the page from report.html.j2. What a run
does not contain is left out, or one sentence says why it is missing.
"""

import base64
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from json import dumps
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console

from model.errors import UserError
from profiling.formats import load
from profiling.report import figures
from profiling.report.figures import FigureOrReason
from profiling.report.roofline import roofline
from profiling.results import ERROR, OK, WRONG, AuditResult, CaseResult, Run, write
from profiling.tables import (
    MeasurementRow,
    audit_table,
    duration,
    gigabytes,
    measurement_rows,
    measurement_table,
    number,
    percent,
    rate,
    terminal,
    variant_rows,
    variant_table,
)

TEMPLATE = "report.html.j2"  # beside this file


def report_command(run: Path, out: Path | None, png: Path | None, results: Path, json: bool) -> int:
    """Implements `python -m profiling report`: writes the requested page and figures, or else prints tables."""
    measured = load(run)
    if out or png:
        others, unreadable = load_committed(results)
        drawn = draw_figures(measured, others)
        files: dict[Path, str | bytes] = {out: render_page(measured, drawn, unreadable)} if out else {}
        if png:
            files |= {png / f"{name}.png": figures.png(f) for name, f in drawn.items() if not isinstance(f, str)}
        for path, content in files.items():
            write(path, content)
    if json:
        print(dumps(report_json(measured), indent=1))
    elif not (out or png):
        show(measured, terminal())
    return 0


def load_committed(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs in a folder, and an error message for each file that cannot be read."""
    runs, unreadable = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            runs.append(load(path))
        except UserError as error:
            unreadable.append(str(error))
    return runs, unreadable


def draw_figures(run: Run, others: Sequence[Run]) -> dict[str, FigureOrReason]:
    """All figures by name; `others` are runs that the history may include."""
    return {
        "waterfall": figures.waterfall(run),
        "timeline": figures.timeline(run),
        "streams": figures.streams(run),
        "roofline": roofline(run),
        "history": figures.history(run, others),
        "gauges": figures.nvml_strips(run),
    }


def render_page(run: Run, drawn: dict[str, FigureOrReason], unreadable: Sequence[str]) -> str:
    """The run as an HTML document that refers to nothing outside of it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "gigabytes": gigabytes, "number": number, "percent": percent}
    return environment.get_template(TEMPLATE).render(
        run=run,
        facts=list(facts(run)),
        headlines=list(headlines(run)),
        throttling=figures.throttling(run)[0],
        pictures={name: _data_url(f) for name, f in drawn.items() if not isinstance(f, str)},
        sentences={name: f for name, f in drawn.items() if isinstance(f, str)},
        cases=list(_cases(run)),
        variants=variant_rows(run),
        audit=[(result, *_modelled(result)) for result in run.audit],
        unreadable=unreadable,
        ok=OK,
    )


def _data_url(figure: figures.Figure) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(figures.svg(figure)).decode()}"


def _cases(run: Run) -> Iterator[tuple[CaseResult, list[MeasurementRow]]]:
    """Cases with their rows."""
    for name, group in groupby(measurement_rows(run), key=lambda row: row.case):
        if case := run.case(name):
            yield case, list(group)


def _modelled(result: AuditResult) -> tuple[str, str]:
    """A kernel's tensor-core instructions, and the unit that bounds it with its least time."""
    products = ", ".join(f"{count} {name}" for name, count in result.instructions.items() if name.endswith("MMA"))
    unit, seconds = max(result.bounds.items(), key=lambda item: item[1], default=("", None))
    return products, f"{unit} {duration(seconds)}".strip()


def facts(run: Run) -> Iterator[tuple[str, str]]:
    """What is needed to judge a run's numbers, as (name, text)."""
    m, c = run.machine, run.ceilings
    units = "multiprocessors" if m.kind == "cuda" else "threads"
    parts = [m.device]
    parts += [f"{m.units} {units}"] if m.units else []  # files of other programs may not state it
    parts += [gigabytes(m.memory_bytes)] if m.memory_bytes else []
    parts += [f"compute capability {m.capability}"] if m.capability else []
    parts += [f"L2 {number(m.l2_bytes / 1e6)} MB"] if m.l2_bytes else []
    parts += [f"driver {m.driver}"] if m.driver else []
    yield "device", ", ".join(parts)
    ceilings = [f"copy {rate(c.copy_bytes_s, 'B')}"] if c.copy_bytes_s else []
    ceilings += [f"{dtype} products {rate(flop_s, 'FLOP')}" for dtype, flop_s in c.matmul_flop_s.items()]
    yield "measured ceilings", ", ".join(ceilings) or "none were measured"
    yield "versions", ", ".join(f"{name} {version}" for name, version in m.versions.items()) or "unknown"
    yield "revision", m.revision or "unknown"
    yield "command", run.command
    yield "date", f"{run.started.replace('T', ' ').replace('+00:00', ' UTC')}, took {duration(run.seconds)}"


def headlines(run: Run) -> Iterator[str]:
    """A few sentences for readers in a hurry."""
    timed = [row for row in variant_rows(run) if row.seconds]
    if timed:
        fastest = min(timed, key=lambda row: row.seconds or 0)
        speed = f", {number(fastest.fps)} FPS" if fastest.fps else ""
        yield f"{fastest.variant} makes a chunk in {duration(fastest.seconds)}{speed}."
        if fastest is not timed[0]:
            yield f"That is {number(fastest.ratio)} times as fast as the baseline, {timed[0].variant}."
    for row in timed:
        if row.critical and row.work:
            path, work = duration(row.critical), duration(row.work)
            yield f"{row.variant}: the critical path of a chunk is {path}, all its work {work}."
    pairs = [(ours, peer) for c in run.cases if (ours := c.best(True)) and (peer := c.best(False))]
    if pairs:
        won = sum((ours.seconds or 0) < (peer.seconds or 0) for ours, peer in pairs)
        yield f"Ours is faster than the best peer in {won} of the {len(pairs)} cases that time both."
    bad = [f"{r.backend} on {r.case}" for r in measurement_rows(run) if r.status in (WRONG, ERROR)]
    bad += [v.variant for v in run.variants if v.status in (WRONG, ERROR)]
    if bad:
        yield f"Wrong or failed: {_first_few(bad)}."
    if faulty := [f"{a.kernel} on {a.case}" for a in run.audit if a.faults]:
        yield f"Over budget, or not compiled: {_first_few(faulty)}."


def _first_few(names: Sequence[str], most: int = 5) -> str:
    """The first few of the names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def report_json(run: Run) -> dict[str, Any]:
    """The page's numbers as JSON values: seconds, shares, 1e12 FLOP/s, 1e9 bytes/s."""
    return {
        "command": run.command,
        "started": run.started,
        "machine": dataclasses.asdict(run.machine),
        "ceilings": dataclasses.asdict(run.ceilings),
        "throttled": run.nvml.throttled,
        "cases": _plain(measurement_rows(run)),
        "variants": _plain(variant_rows(run)),
        "audit": _plain(run.audit),
        "notes": list(run.notes),
    }


def _plain(items: Iterable[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(item) for item in items]


def show(run: Run, console: Console) -> None:
    """Prints the run to a terminal."""
    for name, text in facts(run):
        console.print(f"{name}: {text}", markup=False, highlight=False)
    console.print(figures.throttling(run)[0], markup=False, highlight=False)
    if run.variants:
        console.print(variant_table(variant_rows(run)))
    if run.cases:
        console.print(measurement_table(measurement_rows(run)))
    if run.audit:
        console.print(audit_table(run.audit))
    for line in (*headlines(run), *run.notes):
        console.print(line, markup=False, highlight=False)
