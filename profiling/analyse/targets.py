"""Compares the goals of `targets.toml` with the newest results and tuned tables that can answer them.

    [[target]]
    name = "self-attention against the best peer"
    device = "H100|H200"                        # regular expression; or kind = "cuda" or "cpu"; by default any machine
    cases = ["chunk_attention/14b-w1/bf16"]     # one goal for each; or variant = "fp8*" and stage = "decode"
    peer = "best"                               # or a back-end's name; for a ratio
    ratio = 1.0
    stretch = 1.1                               # shown, not required

The goal of a case is a lower bound of `ratio` (peer's seconds over ours), `percent_of_ceiling` (of what the machine
reached at the start of the run) or `tflops`, or an upper bound of `seconds`. It applies to the fastest correct back-end
of ours, or to the one named by `backend`; what runs by default and the best peer stand beside it. The goal of a variant
is an upper bound of `seconds` or a lower bound of `ratio` in a stage, or `at_least` or `at_most` for stages that are no
times. If an entry has several goals, meeting one of them is enough. Stages:

    chunk, first_frame      seconds of the whole chunk, and until its first frames are ready
    after_denoise           the part of first_frame that is not denoising
    denoise/step            seconds of one step
    decode, color, ...      seconds of a span in one chunk, its calls together; those beside other work do not count
    vae                     seconds of all decoding and encoding in one chunk, also of what runs beside the student
    fps, peak_bytes, gaps   new frames a second; peak bytes of memory; share of a chunk in which the GPU was idle

If a pattern matches several variants, the best of them counts. Ratios are within one run, never across two. A wrong
kernel misses its goal; a goal that no run can answer is unmeasured. Kernels of other programs are peers.

An entry with `setting` and `quality` is about generated video: a measure of `profiling quality` in one way to run a
preset, at least or at most so large, or at least `ratio` times what another setting, the `peer`, has.

An entry with `setting` and `visit` is about the page of a server as `profiling visit` saw it, in settings that match a
shell pattern, and has `at_most`:

    offset, told_offset     seconds by which 95 % of sound and picture were apart at most: by marks, and by the browser
    longest_stall           seconds for which the picture stood still, interruptions left out

An entry with `gpus = 8` and `link = "H800"` is about that many GPUs, and one with `size = "640x352"` as well about that
picture, which nobody has measured: `project` answers it from all results together, for a stage `fps` or `first_frame`.
The verdict is labelled as projected.
"""

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from model.errors import UserError
from model.files import read_toml
from profiling.analyse.project import Projection, Projector, parse_links, parse_size
from profiling.analyse.verdicts import UNMEASURED_CODE
from profiling.cases.evidence import gather
from profiling.ceilings import above_ceiling, ceiling_notes
from profiling.defaults import default_backend
from profiling.results import ERROR, OK, WRONG, CaseResult, Measurement, Run, as_json_text
from profiling.soak import Spread
from profiling.tables import duration, number, percent, stage_value, terminal

MET, MISSED, UNMEASURED = "met", "missed", "unmeasured"
COLOURS = {MET: "green", MISSED: "red", UNMEASURED: "yellow"}
BEST = "best"  # the fastest right peer
MISSED_CODE = 1  # exit code
CASE_MEASURES = ("ratio", "percent_of_ceiling", "tflops", "seconds")
VARIANT_MEASURES = ("ratio", "seconds", "at_least", "at_most")
QUALITY_MEASURES = ("ratio", "at_least", "at_most")
VISIT_MEASURES = ("at_most",)
VISIT_PARTS = ("offset", "told_offset", "longest_stall")
AT_MOST = ("seconds", "at_most")  # the others are lower bounds
PROJECTED_STAGES = ("fps", "first_frame")
TEXT_KEYS = (
    "name", "device", "kind", "variant", "stage", "setting", "quality", "visit", "backend", "peer", "link", "size",
)  # fmt: skip

# --- Goals ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One entry of the file, for one case, for variants, for generated video, or for a projection."""

    name: str
    subject: str  # case, shell pattern of variants or visits, or setting; "8 x H800" for a projection
    goals: Mapping[str, float]  # by measure; meeting one of them is enough
    device: str = ""  # regular expression, searched in the device's name
    kind: str | None = None
    stage: str | None = None  # of variants
    quality: str | None = None  # of generated video
    visit: str | None = None  # of the page in a browser
    backend: str | None = None
    peer: str | None = None
    stretch: float | None = None  # of the first goal
    gpus: int | None = None  # of a projection
    link: str = ""  # between them
    size: str = ""  # of the picture, WIDTHxHEIGHT; empty: the one that was measured

    @property
    def part(self) -> str:
        """What of the subject it is about; empty for a case."""
        return self.stage or self.quality or self.visit or ""

    def applies(self, run: Run) -> bool:
        """Whether the run took place on a machine that the target is for."""
        machine = run.machine
        return (self.kind in (None, machine.kind)) and re.search(self.device, machine.device) is not None


def read_targets(file: Path) -> list[Target]:
    """The targets of a file, one for each case of an entry. Raises `UserError` that names a faulty entry."""
    document = read_toml(file)
    entries = document.get("target")
    if set(document) != {"target"} or not isinstance(entries, list):
        raise UserError(f"{file} must consist of [[target]] entries, and has {', '.join(document) or 'nothing'}")
    targets = []
    for place, entry in enumerate(entries, 1):
        try:
            targets += _parse_entry(entry)
        except ValueError as error:
            title = f"{entry['name']!r}" if isinstance(entry, dict) and "name" in entry else f"number {place}"
            raise UserError(f"{file}: target {title}: {error}") from error
    return targets


def _parse_entry(entry: dict[str, Any]) -> list[Target]:
    """The targets of one entry. Raises ValueError that says what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError("is not a table; write [[target]]")
    allowed = _measures(entry)
    known = (*TEXT_KEYS, *allowed, "cases", "stretch", "gpus")
    for key in entry:
        if key not in known:
            raise ValueError(f"{key} is not a key of it; there are {', '.join(known)}")
    for key in TEXT_KEYS:
        if not isinstance(entry.get(key, ""), str):
            raise ValueError(f"{key} = {entry[key]!r}, wanted a text")
    goals = {key: _positive(entry, key) for key in entry if key in allowed}
    variants, cases, gpus, setting = (entry.get(key) for key in ("variant", "cases", "gpus", "setting"))
    cases = [] if cases is None else cases
    if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
        raise ValueError(f"cases = {cases!r}, wanted a list of names")
    _require(bool(entry.get("name")), "has no name")
    chosen = [bool(cases), bool(variants), bool(setting), gpus is not None]
    _require(chosen.count(True) == 1, "wants either cases, a variant, a setting, or gpus")
    _require(
        ("stage" in entry) == (not cases and not setting), "a stage goes with a variant or gpus, and these need one"
    )
    parts = ("quality" in entry) + ("visit" in entry)
    _require(parts == bool(setting), "a quality or a visit goes with a setting, and a setting needs one of them")
    _require(entry.get("visit") in (None, *VISIT_PARTS), f"a visit has {', '.join(VISIT_PARTS)}")
    _require(bool(goals), f"has no goal; there are {', '.join(allowed)}")
    _require(("ratio" in goals) == ("peer" in entry), "a ratio needs a peer, and a peer a ratio")
    _require(not ("backend" in entry and not cases), "a backend goes with cases")
    _require(("link" in entry) == (gpus is not None), "a link goes with gpus, and gpus need one")
    _require("size" not in entry or gpus is not None, "a size goes with gpus")
    _require(re.fullmatch(r"\d+x\d+", entry.get("size", "1x1")) is not None, "a size is WIDTHxHEIGHT, such as 640x352")
    if gpus is not None:
        _require(type(gpus) is int and gpus > 0, f"gpus = {gpus!r}, wanted a number of GPUs")
        _require(entry["stage"] in PROJECTED_STAGES, f"projections have the stages {', '.join(PROJECTED_STAGES)}")
        _require("ratio" not in goals, "a projection has no peer")
    _require(entry.get("kind") in (None, "cuda", "cpu"), f"kind = {entry.get('kind')!r}, wanted cuda or cpu")
    try:
        re.compile(entry.get("device", ""))
    except re.error as error:
        raise ValueError(f"device is no regular expression: {error}") from error
    common = {key: entry[key] for key in entry if key not in (*goals, "cases", "variant", "setting", "stretch")}
    stretch = _positive(entry, "stretch") if "stretch" in entry else None
    subjects = cases or [variants or setting or f"{gpus} x {entry['link']} {entry.get('size', '')}".strip()]
    return [Target(subject=subject, goals=goals, stretch=stretch, **common) for subject in subjects]


def _measures(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The goals that an entry may have."""
    if "setting" in entry:
        return VISIT_MEASURES if "visit" in entry else QUALITY_MEASURES
    return VARIANT_MEASURES if "stage" in entry and "cases" not in entry else CASE_MEASURES


def _positive(entry: Mapping[str, Any], key: str) -> float:
    value = entry[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{key} = {value!r}, wanted a positive number")
    return float(value)


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise ValueError(complaint)


# --- Values ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A back-end that stands beside a goal; without seconds, the run did not time it."""

    backend: str
    seconds: float | None = None


@dataclass(frozen=True)
class TargetResult:
    """A target with its verdict; the contenders are those of the run that answers for a case."""

    target: Target
    verdict: str
    measure: str  # the goal that was met, or nearest to it
    value: float | None = None
    detail: str = ""  # why it is unmeasured, or the back-end or variant that answered
    file: str | None = None
    fastest: Contender | None = None  # of ours
    default: Contender | None = None  # what runs if nothing is asked for
    peer: Contender | None = None  # the best one

    @property
    def shortfall(self) -> float | None:
        """By what share of the goal it was missed; negative if it was met."""
        if self.value is None:
            return None
        goal = self.target.goals[self.measure]
        return (self.value - goal) / goal * (1 if self.measure in AT_MOST else -1)

    @property
    def stretched(self) -> bool:
        """Whether the stretch goal is met too."""
        target = self.target
        if self.value is None or target.stretch is None or self.measure != next(iter(target.goals)):
            return False
        return self.value <= target.stretch if self.measure in AT_MOST else self.value >= target.stretch

    @property
    def wanted(self) -> str:
        """The goal in words: "≥ 1.20 x"."""
        return ("≤ " if self.measure in AT_MOST else "≥ ") + self._with_unit(self.target.goals[self.measure])

    @property
    def got(self) -> str:
        """The value in words; empty if nothing was measured."""
        return "" if self.value is None else self._with_unit(self.value)

    def _with_unit(self, value: float) -> str:
        if self.measure == "seconds" or self.target.visit:
            return duration(value)
        if self.target.stage == "peak_bytes":
            return f"{value / 2**30:.2f} GiB"
        if self.target.stage == "gaps":
            return percent(value)
        unit = {"ratio": "x", "percent_of_ceiling": "%", "tflops": "TFLOP/s"}.get(self.measure, "")
        return f"{number(value)} {unit}".strip()


class _UnmeasuredError(Exception):
    """The run cannot answer; the message says why."""


class _AbsentError(_UnmeasuredError):
    """The run has nothing of what the target is about."""


class _BrokenError(Exception):
    """The back-end or variant that should answer is wrong; the message says how."""


def evaluate(target: Target, runs: Sequence[tuple[str, Run]]) -> TargetResult:
    """Evaluates a target on the first of the runs, given as (file, run), that can answer it."""
    first, reason, absent = next(iter(target.goals)), "", "no results of such a machine"
    runs = [(file, run) for file, run in runs if target.applies(run)]
    if target.gpus is not None:
        return _evaluate_projection(target, runs)
    for file, run in runs:
        results = []
        for measure in target.goals:
            try:
                value, detail = _value(target, measure, run)
            except _BrokenError as error:
                return TargetResult(target, MISSED, measure, detail=str(error), file=file)
            except _AbsentError as error:
                absent = str(error)
                continue
            except _UnmeasuredError as error:
                reason = reason or str(error)  # of the newest run that has something of it
                continue
            results.append(_judged(TargetResult(target, MET, measure, value, detail, file)))
        if results:
            return _with_contenders(min(results, key=lambda result: result.shortfall or 0), run)
    return TargetResult(target, UNMEASURED, first, detail=reason or absent)


def _judged(result: TargetResult) -> TargetResult:
    return result if (result.shortfall or 0) <= 0 else replace(result, verdict=MISSED)


def _with_contenders(result: TargetResult, run: Run) -> TargetResult:
    """The result with the fastest back-end of ours, the default one and the best peer of its case."""
    if (case := run.case(result.target.subject)) is None:
        return result
    default = default_backend(case, run.machine)
    return replace(
        result,
        fastest=_contender(case.best(ours=True)),
        default=_contender(case.of(default) or Measurement(default, OK)) if default else None,
        peer=_contender(case.best(ours=False)),
    )


def _contender(m: Measurement | None) -> Contender | None:
    return Contender(m.backend, m.seconds) if m else None


def _evaluate_projection(target: Target, runs: Sequence[tuple[str, Run]]) -> TargetResult:
    """Evaluates a target on the projection of all the runs together."""
    measure = next(iter(target.goals))
    try:
        (link,) = parse_links(target.link)
        size = parse_size(target.size) if target.size else None
        projector = Projector(runs)
        one, projection = (projector.project(projector.setting(world, link, size)) for world in (1, target.gpus or 1))
    except UserError as error:
        return TargetResult(target, UNMEASURED, measure, detail=str(error))
    value = projection.fps if target.stage == "fps" else projection.startup
    result = _judged(TargetResult(target, MET, measure, value))
    return replace(result, detail=f"projected, {projector.precision}: {_why(one, projection)}")


def _why(one: Projection, projection: Projection) -> str:
    """What the chunk's time consists of, beside an even share of that of one GPU."""
    world, exchanged = projection.setting.world, duration(projection.exchange) or "nothing"
    more = percent(projection.computed * world / one.computed - 1)
    beyond = {name: seconds - one.operations.get(name, 0.0) / world for name, seconds in projection.operations.items()}
    largest = sorted(((name, s) for name, s in beyond.items() if s > 0), key=lambda item: -item[1])[:3]
    named = f" ({', '.join(f'{name} {duration(seconds)}' for name, seconds in largest)})" if largest else ""
    computed = f"computes {duration(projection.computed)}, {more} more than an even share{named}"
    return f"a chunk of {duration(projection.chunk)} {computed}, and exchanges {exchanged}"


def _value(target: Target, measure: str, run: Run) -> tuple[float, str]:
    """What a run answers, and which back-end or variant that is of."""
    if target.visit:
        return _visit_value(target, target.visit, run)
    kind = _variant_value if target.stage else _quality_value if target.quality else _case_value
    return kind(target, measure, run)


def _case_value(target: Target, measure: str, run: Run) -> tuple[float, str]:
    if (case := run.case(target.subject)) is None:
        raise _AbsentError("not in any results")
    mine, seconds = _our_measurement(target, case)
    if measure == "ratio":
        peer = case.best(ours=False) if target.peer == BEST else case.of(target.peer or "")
        if peer is None or peer.seconds is None:
            raise _UnmeasuredError(f"peer {target.peer}: {peer.status if peer else 'not measured'}")
        return peer.seconds / seconds, f"{mine} against {peer.backend}"
    if measure == "percent_of_ceiling":
        if (bound := case.bound(run.ceilings)) is None:
            raise _UnmeasuredError("that run measured no ceiling for it")
        above = above_ceiling(case, seconds, run.ceilings, run.machine)
        return 100 * bound[1] / seconds, f"{mine}, bound by {bound[0]}" + (f"; above it: {above}" if above else "")
    return (case.flops / seconds / 1e12 if measure == "tflops" else seconds), mine


def _our_measurement(target: Target, case: CaseResult) -> tuple[str, float]:
    """Name and seconds of the back-end that a target is about."""
    chosen = case.of(target.backend) if target.backend else case.best(ours=True)
    if chosen is not None and chosen.seconds is not None:
        return chosen.backend, chosen.seconds
    candidates = [m for m in case.measurements if (m.backend == target.backend if target.backend else m.ours)]
    for m in candidates:
        if m.status in (WRONG, ERROR):
            raise _BrokenError(f"{m.backend} is {'wrong' if m.status == WRONG else 'failing'}: {m.detail}")
    if not candidates:
        raise _UnmeasuredError(f"no back-end {target.backend}" if target.backend else "only peers were measured")
    status = candidates[0].status
    raise _UnmeasuredError(f"{candidates[0].backend}: {'not timed' if status == OK else status}")


def _variant_value(target: Target, measure: str, run: Run) -> tuple[float, str]:
    stage = target.stage or ""
    mine, value = _best_variant(run, target.subject, stage, least=measure != "at_least")
    if measure == "ratio":
        try:
            peer, theirs = _best_variant(run, target.peer or "", stage, least=True)
        except _AbsentError as error:
            raise _UnmeasuredError(f"peer {target.peer}: not in the run of {mine}") from error
        except _BrokenError as error:
            raise _UnmeasuredError(f"peer {error}") from error
        return theirs / value, f"{mine} against {peer}"
    return value, mine


def _quality_value(target: Target, measure: str, run: Run) -> tuple[float, str]:
    value = _quality(run, target.subject, target.quality or "")
    if measure == "ratio":
        peer = target.peer or ""
        return value / _quality(run, peer, target.quality or ""), f"against {peer}"
    return value, ""


def _quality(run: Run, setting: str, measure: str) -> float:
    if not run.quality:
        raise _AbsentError("no results of profiling quality")
    if (row := run.quality_of(setting, measure)) is None:
        raise _UnmeasuredError(f"no {measure} of {setting}")
    if row.value is None:
        raise _BrokenError(f"{measure} of {setting} is not defined")
    return row.value


def _visit_value(target: Target, part: str, run: Run) -> tuple[float, str]:
    """The worst of the visits in that setting."""
    if not (visits := [visit for visit in run.visits if fnmatch.fnmatchcase(visit.setting, target.subject)]):
        raise _AbsentError("no results of profiling visit")
    found = (getattr(visit, part) for visit in visits)
    values = [value for each in found if (value := each.p95 if isinstance(each, Spread) else each) is not None]
    if len(values) < len(visits):
        raise _UnmeasuredError(f"no {part} in that visit")
    return max(values), visits[0].setting


def _best_variant(run: Run, pattern: str, stage: str, *, least: bool) -> tuple[str, float]:
    """Name and value of the variant with the least, or the most, of a stage."""
    chosen = [v for v in run.variants if fnmatch.fnmatchcase(v.variant, pattern)]
    values = {v.variant: x for v in chosen if v.status == OK and (x := stage_value(v, stage)) is not None}
    if values:
        return (min if least else max)(values.items(), key=lambda item: item[1])
    for v in chosen:
        if v.status in (WRONG, ERROR):
            raise _BrokenError(f"{v.variant} is {'wrong' if v.status == WRONG else 'failing'}: {v.detail}")
    if chosen:
        raise _UnmeasuredError(f"no {stage} of {pattern}")
    raise _AbsentError(f"no variant {pattern}")


# --- The command ----------------------------------------------------------------------------------------------------


def targets_command(file: Path, files: Sequence[Path], allow_unmeasured: bool, as_json: bool) -> int:
    """Implements `python -m profiling targets`; returns 1 if a target is missed, else 3 if one is unmeasured."""
    targets = read_targets(file)
    runs, notes = gather(files)
    results = [evaluate(target, runs) for target in targets]
    counts = Counter(result.verdict for result in results)
    if as_json:
        rows = [asdict(o) | {"shortfall": o.shortfall, "stretched": o.stretched} for o in results]
        print(as_json_text({"counts": dict(counts), "notes": notes, "targets": rows}))
    else:
        console = terminal()
        console.print(_table(results))
        for note in ceiling_notes(_answering(results, runs)):
            console.print(escape(note), soft_wrap=True)
        for note in notes:
            console.print(f"not read: {escape(note)}", soft_wrap=True)
        console.print(", ".join(f"{counts[v]} {v}" for v in (MET, MISSED, UNMEASURED)), soft_wrap=True)
    if counts[MISSED]:
        return MISSED_CODE
    return UNMEASURED_CODE if counts[UNMEASURED] and not allow_unmeasured else 0


def _answering(results: Iterable[TargetResult], runs: Sequence[tuple[str, Run]]) -> list[Run]:
    """The runs that answered for a share of a ceiling."""
    files = {result.file for result in results if result.measure == "percent_of_ceiling"}
    return [run for file, run in runs if file in files]


def _table(results: Iterable[TargetResult]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("goal", overflow="fold", min_width=36)
    for heading in ("wanted", "got"):
        out.add_column(heading, justify="right", no_wrap=True)
    for heading in ("fastest of ours", "by default", "best peer", "verdict"):
        out.add_column(heading, no_wrap=True)
    for name, group in groupby(results, lambda o: o.target.name):
        out.add_section()
        out.add_row(f"[bold]{escape(name)}[/]")
        for (verdict, detail), same in groupby(group, lambda o: (o.verdict, o.detail)):
            answers = list(same)
            if verdict == UNMEASURED and len(answers) > 1:
                out.add_row(f"{len(answers)} cases\n  [dim]{escape(detail)}[/]", *_cells(answers[0]))
                continue
            for result in answers:
                target = result.target
                subject = f"{target.part} of {target.subject}" if target.part else target.subject
                source = ", ".join(filter(None, (detail, result.file and Path(result.file).name)))
                out.add_row(f"{escape(subject)}\n  [dim]{escape(source)}[/]", *_cells(result))
    return out


def _cells(result: TargetResult) -> Iterator[str]:
    """What was wanted, what was measured, who did it, and the verdict."""
    target, verdict = result.target, result.verdict
    yield result.wanted
    yield result.got
    for contender in (result.fastest, result.default, result.peer):
        yield f"{escape(contender.backend)}\n[dim]{duration(contender.seconds)}[/]" if contender else ""
    if verdict == MISSED and result.shortfall is not None:
        verdict += f" by {percent(result.shortfall)}"
    verdict += "\nstretch too" if result.stretched else ""
    verdict += "\nprojected" if target.gpus and result.value is not None else ""
    yield f"[{COLOURS[result.verdict]}]{verdict}[/]"
