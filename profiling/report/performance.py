"""Writes docs/performance.md, and tables in other documents, so that no number is typed in.

Each row is the newest measurement of its case or variant on a device, from a results file or a tuned table, and says
where it comes from. Times are medians. Results of other programs are left out.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from model.config import PRESETS
from model.errors import UserError
from profiling.analyse.calibration import STEP, calls_seconds
from profiling.analyse.calls import Call
from profiling.analyse.project import Projection, Projector, assumptions, gpus_of, table_rows
from profiling.analyse.targets import MISSED, TargetResult, evaluate, read_targets
from profiling.analyse.times import MEASURED
from profiling.cases.evidence import COMMITTED, gather
from profiling.ceilings import ceiling_notes
from profiling.defaults import default_backend
from profiling.formats import of_another_program
from profiling.report.markdown import head, line
from profiling.report.memory import memory_tables
from profiling.report.precision import PSNR, kernels_table, psnr_table
from profiling.report.sizing import sizing_table
from profiling.results import OK, CaseResult, Measurement, Run, VariantResult, write
from profiling.soak import soak_lines, visit_lines
from profiling.tables import duration, measurement_rows, memory, number, percent, share_of_ceiling, stage_value

TARGETS = Path(__file__).parents[1] / "analyse" / "targets.toml"
# In the repository; all but the first have tables between markers.
PAGE, README, CLUSTER = Path("docs/performance.md"), Path("README.md"), Path("docs/cluster.md")
PRECISION = Path("docs/precision-and-memory.md")
BEGIN, END = "<!-- written by `python -m profiling docs` -->", "<!-- end of what it writes -->"
SIDES = ("bf16-eager", "fp8-vae")  # variants of the preset that README compares: the published form, and the fastest
PRESET = "flashtalk-14b"
SMALLEST_SHARE = 0.002  # of a step, that a call has in its table
LINKS, WORLDS, SIZES = ("H100", "H800"), (1, 2, 4, 8), ((320, 640), (720, 1280))  # that are projected

Item = TypeVar("Item", CaseResult, VariantResult)

HEAD = """# Performance

Written by `python -m profiling docs` from the runs in [profiling/results](../profiling/results) and the tables in
[kernels/tuned](../kernels/tuned). `python -m profiling report RUN` shows a run in full, `python -m profiling targets`
holds them all to the goals.

Weights and data are random, but for those of generated video. Times are medians. Of each case and each way to run a
chunk, the newest measurement is shown. A revision that ends in *dirty* had changes that were not committed; tuned
tables store no revision.
"""

CASES_HEAD = """## Operations

- *Fastest of ours* is the fastest right back-end of this repository that was measured.
- *By default* is the one that runs if nothing is asked for, by the tuned tables as they are now.
- *Best peer* is the fastest of what one would use instead: cuDNN, cuBLAS, PyTorch eager or compiled.
- *x peer* is the best peer's time over the fastest of ours: above 1 is faster.
- *Of ceiling* is the share of what the same card copied or multiplied at the start of the run. Tables store none.
"""

QUALITY_HEAD = """
## Generated video

By the preset `tiny`, of people and voices that no training saw, against their truth. `r` is the correlation of what is
read from the picture with the truth; 0 is the best lag, 1 the best of the ratios. `report` shows all measures.
"""

QUALITY_COLUMNS = {
    "r of the opening": "r of open",
    "r of closed lips": "r of close",
    "lag in frames": "lag of open, frames",
    "sharpness, of the portrait's": "sharpness, of the portrait's",
    "seams": "seam ratio",
    "blinks, of the data's": "blinks, of the data's",
    "distance to the portrait, Lab": "distance to the portrait, Lab",
}


# --- The page -------------------------------------------------------------------------------------------------------


def performance_page(runs: Sequence[tuple[str, Run]]) -> str:
    """The page in Markdown; `runs` are given as (file, run), the newest first."""
    runs = [(file, run) for file, run in runs if not of_another_program(run)]
    try:
        projector = Projector(runs)
    except UserError:  # no chunk was measured, or too little to project from
        projector = None
    projected = (*step_table(projector), "", *projections(projector, projected_goals(runs)), "") if projector else ()
    lines = [*_variants(runs), "", *projected, CASES_HEAD, *_cases(runs), *_quality(runs), *_soak(runs)]
    return HEAD + "\n" + "\n".join(lines) + "\n"


def _variants(runs: Sequence[tuple[str, Run]]) -> Iterator[str]:
    yield "## Whole chunks\n"
    yield from _header(
        "chunk", "time", "FPS", "first frame", "a step", "decode alone", "encode again", "GPU idle", "peak memory"
    )
    for file, run, variant in _newest(runs, lambda run: run.variants, lambda variant: variant.variant):
        if variant.status == OK:
            stages = ("first_frame", "denoise/step", "decode", "motion")
            cells = (
                f"`{variant.variant}`", duration(stage_value(variant, "chunk")), fps(variant),
                *(duration(stage_value(variant, stage)) for stage in stages),
                percent(variant.gaps), memory(variant.peak_bytes),
            )  # fmt: skip
            yield line(*cells, *_source(file, run))
    yield ""
    yield "*Decode alone* leaves out calls that run beside other work, as that of the motion latents does."


def step_table(projector: Projector) -> Iterator[str]:
    """A denoising step beside the calls that it makes, each timed alone, and what is left."""
    measured = projector.measured
    work = [work for work in projector.recipe if work.stage == STEP][-1]
    total, step = calls_seconds(work, projector.times), stage_value(measured.variant, STEP) or 0.0
    rows = [(call, count, projector.times.of(call)) for call, count in work.calls.items()]
    rows.sort(key=lambda row: -row[1] * row[2].seconds)
    shown = [row for row in rows if row[1] * row[2].seconds >= SMALLEST_SHARE * step]
    yield f"## A step of `{measured.variant.variant}`\n"
    yield (
        "The calls of the last step, recorded from the model, each timed alone, where the clock is higher than in a "
        "long run.\n"
    )
    yield from head("call", "calls", "one call", "all calls", "share of the step", "time from")
    for call, count, timed in shown:
        seconds = timed.seconds * count
        cells = (_name(call), str(count), duration(timed.seconds), duration(seconds), percent(seconds / step))
        yield line(
            *cells, f"`{timed.basis}`" + ("" if timed.source == MEASURED else ", scaled") if timed.basis else "ceiling"
        )
    others, left = len(rows) - len(shown), total - sum(count * timed.seconds for _, count, timed in shown)
    yield line(f"{others} other shapes", "", "", duration(left), percent(left / step), "")
    yield line("sum", "", "", duration(total), percent(total / step), "")
    yield line("the step as measured", "", "", duration(step), "", "")


def _name(call: Call) -> str:
    dims = dict(call.dims)
    shape = ", ".join(
        f"{name} {dims[name]}" for name in ("rows", "tokens", "queries", "inputs", "outputs") if name in dims
    )
    return f"{call.operation} {call.dtype}, {shape or f'{call.bytes / 1e6:.0f} MB'}"


def projected_goals(runs: Sequence[tuple[str, Run]]) -> list[TargetResult]:
    """The goals that projections answer."""
    return [evaluate(target, runs) for target in read_targets(TARGETS) if target.gpus is not None]


def projections(projector: Projector, goals: Iterable[TargetResult]) -> Iterator[str]:
    """What is projected for several GPUs, with all that it assumes, and the goals that this answers."""
    yield "## Several GPUs: projections\n"
    yield (
        "**Projected, not measured**: by `python -m profiling project`, which also answers for other links, sizes and "
        "steps.\n"
    )
    for sentence in assumptions(projector, LINKS):
        yield f"- {sentence}"
    yield "\nThe measured chunk on one GPU, and its calls before and after calibration:\n"
    yield from head("part", "measured", "calls, each alone", "of measured", "calibrated", "of measured")
    for part in projector.calibration.parts:
        shares = (percent(seconds / part.measured) for seconds in (part.calls, part.calibrated))
        cells = (duration(seconds) for seconds in (part.calls, part.calibrated))
        yield line(part.name, duration(part.measured), *itertools.chain(*zip(cells, shares, strict=True)))
    for link in LINKS:
        yield f"\nProjected, link of {link}:\n"
        found = [projector.project(projector.setting(world, link)) for world in WORLDS]
        yield from _projection_table(found, table_rows(found))
    yield f"\nProjected for other pictures, link of {LINKS[0]}, in frames a second:\n"
    by_size = {size: [projector.project(projector.setting(w, LINKS[0], size)) for w in WORLDS] for size in SIZES}
    rows = ([f"{width} x {height}", *(f"{p.fps:.1f}" for p in found)] for (width, height), found in by_size.items())
    yield from _projection_table(by_size[SIZES[0]], rows)
    yield "\nThe goals for several GPUs, as projected:\n"
    yield from head("goal", "wanted", "projected", "verdict", "of what the time consists")
    for goal in goals:
        missed = f" by {percent(goal.shortfall)}" if goal.verdict == MISSED else ""
        yield line(goal.target.name, goal.wanted, goal.got, goal.verdict + missed, goal.detail)


def _projection_table(found: Sequence[Projection], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield from head("projected", *(gpus_of(projection) for projection in found))
    for cells in rows:
        yield line(*cells)


def _cases(runs: Sequence[tuple[str, Run]]) -> Iterator[str]:
    measured = [
        (file, run, case)
        for file, run, case in _newest(runs, lambda run: run.cases, lambda case: case.case)
        if case.best(ours=True)
    ]
    measured.sort(key=lambda item: item[2].case)
    yield from _header("case", "fastest of ours", "of ceiling", "by default", "best peer", "x peer")
    reasons: list[str] = []
    for file, run, case in measured:
        rows = {row.backend: row for row in measurement_rows(run) if row.case == case.case}
        ours = rows[(case.best(ours=True) or Measurement("", OK)).backend]
        speed = f", {number(ours.tflops)} TFLOP/s" if case.is_matmul else ""
        peer = case.best(ours=False)
        cells = (
            f"`{case.case}`",
            f"{_contender(case, ours.backend)}{speed}",
            share_of_ceiling(ours),
            _contender(case, default_backend(case, run.machine)),
            _contender(case, peer.backend if peer else None),
            f"{ours.ratio:.2f}" if ours.ratio else "",
        )
        yield line(*cells, *_source(file, run))
        if ours.above:
            reasons.append(f"`{case.case}`, {ours.backend}, is above its ceiling (!): {ours.above}.")
    for note in (*reasons, *ceiling_notes(run for _, run, _ in measured)):
        yield f"\n{note}"


def _quality(runs: Sequence[tuple[str, Run]]) -> Iterator[str]:
    """A table for each run of `profiling quality`: its settings, and the long streams that it followed."""
    judged = [(file, run) for file, run in runs if run.quality and run.command != PSNR]
    if judged:
        yield QUALITY_HEAD
    for file, run in judged:
        link, day, device, commit = _source(file, run)
        yield f"{'; '.join(run.notes)}: {link}, {day}, {device}, {commit}\n"
        still = list(dict.fromkeys(row.setting for row in run.quality if not row.track))
        yield from head("setting", *QUALITY_COLUMNS)
        for setting in still:
            found = (run.quality_of(setting, measure) for measure in QUALITY_COLUMNS.values())
            yield line(setting, *(number(row.value) if row else "" for row in found))
        yield ""
        if long := [row for row in run.quality if row.track]:
            yield from head("long streams", "measure", "value", "95 % interval")
            for row in long:
                yield line(row.setting, row.measure, number(row.value), f"{number(row.low)} to {number(row.high)}")
            yield ""


def _soak(runs: Sequence[tuple[str, Run]]) -> Iterator[str]:
    """A table for each live session that was treated at random, and for each visit to a page."""
    if any(run.soak or run.visits for _, run in runs):
        yield "## Live session\n"
    for file, run in runs:
        for lines in (*map(soak_lines, run.soak), *map(visit_lines, run.visits)):
            link, day, device, commit = _source(file, run)
            yield f"`{run.command}`, threads: {run.machine.units}: {link}, {day}, {device}, {commit}\n"
            yield from head("what", "value")
            for cells in lines:
                yield line(*cells)
            yield ""


def _newest(
    runs: Sequence[tuple[str, Run]], items: Callable[[Run], Iterable[Item]], name: Callable[[Item], str]
) -> list[tuple[str, Run, Item]]:
    """Of each name and device the newest item, as (file, run, item); `runs` are the newest first."""
    found: dict[tuple[str, str], tuple[str, Run, Item]] = {}
    for file, run in runs:
        for item in items(run):
            found.setdefault((name(item), run.machine.device), (file, run, item))
    return list(found.values())


def _contender(case: CaseResult, backend: str | None) -> str:
    """A back-end with its time, or without one if the run did not time it."""
    measured = case.of(backend) if backend else None
    return f"{backend} {duration(measured.seconds)}" if measured and measured.seconds else backend or ""


def _source(file: str, run: Run) -> tuple[str, str, str, str]:
    """Where a row comes from: a link to the file, date, device, revision."""
    path = Path(file)
    revision, dirty, _ = (run.machine.revision or "").partition("-dirty")
    device = run.machine.device.removeprefix("NVIDIA ")
    link = f"[{path.stem}](../{'/'.join(path.parts[-3:])})"
    return link, run.started[:10], device, f"{revision[:9]}{dirty}" or "none stored"


def _header(*names: str) -> Iterator[str]:
    yield from head(*names, "run", "date", "device", "revision")


# --- README's table -------------------------------------------------------------------------------------------------


def readme_table(runs: Sequence[tuple[str, Run]]) -> str:
    """The short table: the published form of the preset beside the fastest one. `UserError` if one is missing."""
    found = {
        variant.variant: (file, run, variant)
        for file, run, variant in reversed(_newest(runs, lambda run: run.variants, lambda v: v.variant))
    }
    if missing := [name for name in SIDES if name not in found]:
        raise UserError(f"no results have the variant {' or '.join(missing)}, which README's table is about")
    (left_file, run, left), (right_file, _, right) = (found[name] for name in SIDES)
    chunk, device = PRESETS[PRESET].chunk, run.machine.device.split()[1]
    what = f"one {device}, {chunk.width} x {chunk.height}, {left.frames} new frames a chunk, {chunk.sample_steps} steps"
    lines = [
        line(f"{what}, random weights", "published form, eager bf16", f"this repository, `{right.variant}`"),
        line("---", "---", "---"),
    ]
    lines += [line(name, value(left), f"**{value(right)}**") for name, value in _README_ROWS.items()]
    links = (f"[{Path(f).name}](profiling/results/{Path(f).name})" for f in (left_file, right_file))
    lines += ["", "Left: {}. Right:\n{}. [All results](docs/performance.md)".format(*links)]
    return "\n".join(lines)


def _seconds(stage: str) -> Callable[[VariantResult], str]:
    return lambda variant: f"{stage_value(variant, stage) or 0:.2f} s"


def fps(variant: VariantResult) -> str:
    """New frames a second: "14.1"."""
    return f"{stage_value(variant, 'fps') or 0:.1f}"


_README_ROWS: dict[str, Callable[[VariantResult], str]] = {
    "chunk": _seconds("chunk"),
    "frames a second (real time is 25)": fps,
    "window of sound to first frame": _seconds("first_frame"),
    "one denoising step": _seconds("denoise/step"),
    "GPU memory at the peak": lambda variant: memory(variant.peak_bytes),
    "GPU idle in a chunk": lambda variant: f"{100 * (variant.gaps or 0):.1f} %",
}


def with_tables(text: str, tables: Sequence[str], name: Path = README) -> str:
    """The text of a document with each table between a pair of its markers. Raises `UserError` if it lacks any."""
    done = ""
    for table in tables:
        before, begin, rest = text.partition(BEGIN)
        _, end, text = rest.partition(END)
        if not (begin and end):
            raise UserError(f"{name} has no lines {BEGIN} and {END}, between which its table stands")
        done += f"{before}{BEGIN}\n\n{table}\n\n{END}"
    return done + text


# --- The command ----------------------------------------------------------------------------------------------------


def documents(root: Path, places: Sequence[Path] = COMMITTED) -> dict[Path, str]:
    """Each generated document's path and text, for the repository at `root`."""
    runs, unreadable = gather(places)
    if unreadable:
        raise UserError(unreadable[0])
    precision = (psnr_table(runs), kernels_table(runs), memory_tables())
    tables = {README: (readme_table(runs),), CLUSTER: (sizing_table(runs),), PRECISION: precision}
    try:
        texts = {name: (root / name).read_text() for name in tables}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); call this in the repository") from error
    written = {root / name: with_tables(texts[name], parts, name) for name, parts in tables.items()}
    return {root / PAGE: performance_page(runs)} | written


def docs_command(root: Path, check: bool) -> int:
    """Implements `python -m profiling docs`; with `check` it writes nothing and returns 1 if a document differs."""
    texts = documents(root)
    if not check:
        for path, text in texts.items():
            write(path, text)
            print(path)
        return 0
    differ = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    for path in differ:
        print(f"{path} is not what the results give; run `python -m profiling docs`", file=sys.stderr)
    return int(bool(differ))
