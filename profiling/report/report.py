"""Shows a run as one self-contained HTML file, as PNG files of its figures, as tables, or as JSON.

Numbers come from `profiling.tables`, the verdict on top from verdict.py, figures from figures.py, history.py and
roofline.py, the page from report.html.j2 and sort.js. What a run does not contain is left out.
"""

import base64
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console

from model.errors import UserError
from model.files import refuse_to_replace
from profiling.analyse.targets import MISSED, TargetResult, read_targets
from profiling.analyse.verdicts import Comparison
from profiling.ceilings import with_launched_copy
from profiling.defaults import default_backend
from profiling.formats import load
from profiling.report import figures, quality, soak
from profiling.report.history import history
from profiling.report.roofline import roofline
from profiling.report.verdict import (
    CHANGES,
    Tile,
    answered_goals,
    before_and_after,
    change_in_words,
    changes,
    counted,
    tiles,
)
from profiling.results import ERROR, OK, WRONG, AuditResult, CaseResult, Run, write
from profiling.soak import soak_lines, visit_lines
from profiling.tables import (
    AUDIT_UNITS,
    STEP,
    MeasurementRow,
    VariantRow,
    audit_table,
    duration,
    measurement_rows,
    measurement_table,
    memory,
    number,
    percent,
    quality_lines,
    quality_table,
    rate,
    ratio,
    terminal,
    variant_rows,
    variant_table,
)

TEMPLATE, SCRIPT = "report.html.j2", "sort.js"  # beside this file

Drawn = dict[str, tuple[Figure, Figure]]  # by name, each for a page and for a phone


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A run with what it is held against."""

    run: Run
    others: list[tuple[str, Run]]  # committed ones, as (file, run), the newest first
    unreadable: list[str]  # an error message for each committed file that cannot be read
    goals: list[TargetResult]  # that the run answers
    changed: list[Comparison]  # since earlier results

    @property
    def tiles(self) -> list[Tile]:
        """The verdict."""
        return list(tiles(self.run, self.goals, self.changed))


def report_command(run: Path, out: Path | None, png: Path | None, results: Path, targets: Path, json: bool) -> int:
    """Implements `python -m profiling report`: writes the requested page and figures, or else prints tables."""
    found = gather_evidence(run, results, targets)
    if out:
        refuse_to_replace(out, run=run)
    if out or png:
        drawn = draw_figures(found)
        files: dict[Path, str | bytes] = {out: render_page(found, drawn)} if out else {}
        if png:
            files |= {png / f"{name}.png": figures.png(wide) for name, (wide, _) in drawn.items()}
        for path, content in files.items():
            write(path, content)
    if json:
        print(dumps(report_json(found.run), indent=1))
    elif not (out or png):
        show(found, terminal())
    return 0


def gather_evidence(path: Path, results: Path, targets: Path) -> Evidence:
    """The run in a file, the committed runs in the folder `results`, and the verdicts on it.

    Raises `UserError` if the run or the goals cannot be read.
    """
    shown, unreadable = str(path), []
    runs = [(shown, load(path))]
    for file in sorted(results.glob("*.json")):
        try:
            runs += [] if file.samefile(path) else [(str(file), load(file))]
        except UserError as error:
            unreadable.append(str(error))
    runs = with_launched_copy(sorted(runs, key=lambda item: item[1].started, reverse=True))
    others = [item for item in runs if item[0] != shown]
    run = dict(runs)[shown]
    goals = answered_goals(run, shown, read_targets(targets))
    return Evidence(run, others, unreadable, goals, changes(run, shown, others))


def draw_figures(found: Evidence) -> Drawn:
    """All figures by name; what a run has no numbers for is left out."""
    functions = {
        "quality": quality.measures,
        "drift": quality.drift,
        "soak": soak.soak_tracks,
        "latencies": soak.soak_latencies,
        "visit": soak.visit_tracks,
        "timeline": figures.timeline,
        "roofline": roofline,
        "history": partial(history, others=[run for _, run in found.others]),
        "gauges": figures.nvml_strips,
    }
    drawn: Drawn = {}
    for name, function in functions.items():
        if wide := function(found.run):
            drawn[name] = wide, function(found.run, width=figures.NARROW) or wide
    return drawn


def render_page(found: Evidence, drawn: Drawn) -> str:
    """The run as an HTML document that refers to nothing outside of it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (duration, memory, number, percent, rate, ratio, change_in_words, before_and_after, counted)
    environment.filters |= {function.__name__: function for function in functions}
    run, script = found.run, Path(__file__).with_name(SCRIPT).read_text()
    rows, (settings, lines) = variant_rows(run), quality_lines(run.quality)
    return environment.get_template(TEMPLATE).render(
        run=run,
        revision=revision(run),
        facts=list(facts(run)),
        tiles=found.tiles,
        missed=[goal for goal in found.goals if goal.verdict == MISSED],
        others=[goal for goal in found.goals if goal.verdict != MISSED],
        changed=[row for row in found.changed if row.change.verdict in CHANGES],
        throttling=figures.throttling(run),
        pictures={name: [_data_url(figure) for figure in pair] for name, pair in drawn.items()},
        above=list(dict.fromkeys(row.above for row in measurement_rows(run) if row.above)),
        cases=[CaseGroup.of(case, run) for case in run.cases],
        settings=settings,
        quality_lines=lines,
        soak=[list(soak_lines(result)) for result in run.soak],
        visits=[list(visit_lines(result)) for result in run.visits],
        variants=rows,
        variant_lines=list(variant_lines(rows)),
        audit=[(result, *_modelled(result)) for result in run.audit],
        audit_units=AUDIT_UNITS,
        targets=list(dict.fromkeys(result.target for result in run.audit)),
        unreadable=found.unreadable,
        ok=OK,
        script=Markup(script),  # a file of this package, so it needs no escaping
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _data_url(figure: Figure) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(figures.svg(figure)).decode()}"


@dataclasses.dataclass(frozen=True)
class CaseGroup:
    """A case with its back-ends: the fastest of ours first, then the others, the fast ones first."""

    case: CaseResult
    rows: list[MeasurementRow]  # right ones, and those that are wrong or failed
    absent: list[MeasurementRow]  # not installed, unsupported, skipped
    default: str | None  # the back-end that runs if nothing is asked for

    @classmethod
    def of(cls, case: CaseResult, run: Run) -> "CaseGroup":
        """The group of one of the run's cases."""
        best, choice = case.best(ours=True), any(m.ours for m in case.measurements)
        rows = [row for row in measurement_rows(run) if row.case == case.case]
        shown = [row for row in rows if row.status in (OK, WRONG, ERROR)]
        shown.sort(key=lambda row: (not (best and row.backend == best.backend), row.seconds or 1e30))
        absent = [row for row in rows if row not in shown]
        return cls(case, shown, absent, default_backend(case, run.machine) if choice else None)

    @property
    def default_elsewhere(self) -> bool:
        """Whether what runs by default is not among the rows."""
        return self.default is not None and self.default not in [row.backend for row in self.rows]


def variant_lines(rows: Sequence[VariantRow]) -> Iterator[tuple[str, list[str]]]:
    """The numbers of variants as lines of a table: a name, and a cell for each variant; without empty lines."""
    stages = dict.fromkeys(stage for row in rows for stage in row.stages)
    lines = {
        "chunk": [duration(row.seconds) for row in rows],
        "times as fast as the first": [number(row.ratio) if len(rows) > 1 else "" for row in rows],
        "frames a second": [f"{row.fps:.1f}" if row.fps else "" for row in rows],
        "first frame": [duration(row.first_frame) for row in rows],
    }
    for stage in stages:
        calls = [round(row.calls.get(stage, 0)) for row in rows]
        name = f"{stage}, each of {max(calls)}" if stage == STEP else stage
        lines[name] = [duration(row.stages.get(stage)) for row in rows]
        lines[f"{stage}, beside other work"] = [duration(row.beside.get(stage) or None) for row in rows]
    lines |= {
        "critical path of the traced chunk": [duration(row.critical) for row in rows],
        "all its work": [duration(row.work) for row in rows],
        "GPU idle": [percent(row.gaps) for row in rows],
        "peak memory": [memory(row.peak_bytes) for row in rows],
        "weights": [memory(row.weights_bytes) for row in rows],
        "first chunk, with compilation": [duration(row.first_call) for row in rows],
    }
    return ((name, cells) for name, cells in lines.items() if any(cells))


def _modelled(result: AuditResult) -> tuple[str, str, float | None]:
    """A kernel's tensor-core instructions, the unit that bounds it with its least time, and this in seconds."""
    products = ", ".join(f"{count} {name}" for name, count in result.instructions.items() if name.endswith("MMA"))
    unit, seconds = max(result.bounds.items(), key=lambda item: item[1], default=("not modelled", None))
    return products, f"{unit} {duration(seconds)}".strip(), seconds


def revision(run: Run) -> str:
    """The revision of a run, short, and whether changes to it were not committed."""
    commit, dirty, _ = (run.machine.revision or "").partition("-dirty")
    return f"{commit[:9]}, with uncommitted changes" if dirty else commit[:9]


def facts(run: Run) -> Iterator[tuple[str, str]]:
    """What is needed to judge a run's numbers, as (name, text)."""
    m, c = run.machine, run.ceilings
    parts = [f"{m.units} {'multiprocessors' if m.kind == 'cuda' else 'threads'}"] if m.units else []
    parts += [memory(m.memory_bytes)] if m.memory_bytes else []  # files of other programs may not state it
    parts += [f"compute capability {m.capability}"] if m.capability else []
    parts += [f"L2 {memory(m.l2_bytes)}"] if m.l2_bytes else []
    parts += [f"driver {m.driver}"] if m.driver else []
    parts += [f"power limit {run.nvml.power_limit_watts:.0f} W"] if run.nvml.power_limit_watts else []
    if parts:
        yield "device", ", ".join(parts)
    ceilings = [f"copy {rate(c.copy_bytes_s, 'B')}"] if c.copy_bytes_s else []
    ceilings += [f"{dtype} products {rate(flop_s, 'FLOP')}" for dtype, flop_s in c.matmul_flop_s.items()]
    if ceilings:
        yield "measured ceilings", ", ".join(ceilings)
    if m.versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in m.versions.items())
    if m.revision:
        yield "revision", m.revision
    yield "command", run.command
    yield "date", f"{date(run)}, took {duration(run.seconds)}" if run.seconds else date(run)
    yield from (("note", note) for note in run.notes)


def date(run: Run) -> str:
    """When the run began, as one writes it."""
    return run.started.replace("T", " ").replace("+00:00", " UTC")


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
        "quality": _plain(run.quality),
        "soak": _plain(run.soak),
        "visits": _plain(run.visits),
        "notes": list(run.notes),
    }


def _plain(items: Iterable[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(item) for item in items]


def show(found: Evidence, console: Console) -> None:
    """Prints the run to a terminal."""
    run = found.run
    lines = [run.machine.device, *(f"{name}: {text}" for name, text in facts(run)), figures.throttling(run)]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    if run.variants:
        console.print(variant_table(variant_rows(run)))
    if run.cases:
        console.print(measurement_table(measurement_rows(run)))
    if run.quality:
        console.print(quality_table(run.quality))
    for lines in (*map(soak_lines, run.soak), *map(visit_lines, run.visits)):
        for name, value in lines:
            console.print(f"{name}: {value}", markup=False, highlight=False)
    if run.audit:
        console.print(audit_table(run.audit))
    for tile in found.tiles:
        line = f"{tile.name}: {tile.value}" + (f" ({tile.detail})" if tile.detail else "")
        console.print(line, markup=False, highlight=False)
