"""What a run means, in a few tiles on top of its report: the goals that it answers, and what changed since before.

It is compared with the newest earlier results of the same cases on the same device, as `python -m profiling compare`
does it.
"""

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from profiling.analyse.samples import FASTER, SLOWER
from profiling.analyse.targets import MET, MISSED, UNMEASURED, Target, TargetResult, evaluate
from profiling.analyse.trees import Source, Tree
from profiling.analyse.verdicts import BROKEN, FIXED, LARGER, MISSING, SMALLER, Comparison, compare_trees, join
from profiling.results import ERROR, WRONG, Run
from profiling.tables import duration, memory, number, percent, variant_rows

THRESHOLD = 0.02  # the smallest change that counts
CHANGES = (BROKEN, MISSING, SLOWER, LARGER, FASTER, SMALLER, FIXED)


@dataclass(frozen=True)
class Tile:
    """A number with its name, and what to know about it."""

    name: str
    value: str
    detail: str = ""
    tone: str = ""  # "good", "bad", or neither


def answered_goals(run: Run, file: str, targets: Sequence[Target]) -> list[TargetResult]:
    """The verdicts on the goals about a case or variant of the run: those missed, those unmeasured, the rest."""
    results = [evaluate(target, [(file, run)]) for target in targets if target.applies(run) and _is_about(target, run)]
    return sorted(results, key=lambda result: (MISSED, UNMEASURED, MET).index(result.verdict))


def _is_about(target: Target, run: Run) -> bool:
    """Whether the run has a variant that the target is about, or has measured a back-end of ours on its case."""
    if target.gpus is not None:
        return False
    if target.quality:
        return any(row.setting == target.subject for row in run.quality)
    if target.stage:
        return any(fnmatch.fnmatchcase(variant.variant, target.subject) for variant in run.variants)
    case = run.case(target.subject)
    return case is not None and any(m.ours for m in case.measurements)


def changes(run: Run, file: str, others: Sequence[tuple[str, Run]]) -> list[Comparison]:
    """How back-ends and variants of ours changed since earlier results, given as (file, run), the newest first.

    Empty if no earlier run has timed the same on such a machine.
    """
    earlier = tuple(Source(name, other) for name, other in others if other.started < run.started)
    joined = join(Tree("earlier results", earlier), Tree(file, (Source(file, run),), whole=False))
    rows = [row for row in compare_trees(joined, (), THRESHOLD, force=False) if row.ours]
    if not any(row.change.ratio for row in rows):
        return []
    return [row for row in rows if row.change.ratio or row.change.verdict in CHANGES]


def tiles(run: Run, goals: Sequence[TargetResult], changed: Sequence[Comparison]) -> Iterator[Tile]:
    """The verdict on a run, and its main numbers."""
    if goals:
        yield _goals_tile(goals)
    if run.variants or any(case.best(ours=True) for case in run.cases):
        yield from _change_tiles(changed)
    yield from _variant_tiles(run)
    yield from _quality_tiles(run)
    pairs = [(ours, peer) for c in run.cases if (ours := c.best(True)) and (peer := c.best(False))]
    if pairs:
        won = sum((ours.seconds or 0) < (peer.seconds or 0) for ours, peer in pairs)
        yield Tile("Faster than the best peer", f"{won} of {len(pairs)}", "cases, by the fastest back-end of ours")
    if run.audit:
        yield Tile("Kernels compiled", f"{sum(bool(a.registers) for a in run.audit)} of {len(run.audit)}")
    bad = [f"{m.backend} on {c.case}" for c in run.cases for m in c.measurements if m.status in (WRONG, ERROR)]
    bad += [v.variant for v in run.variants if v.status in (WRONG, ERROR)]
    if bad:
        yield Tile("Wrong or failed", str(len(bad)), _first_few(bad), "bad")
    if faulty := [f"{a.kernel} on {a.case}" for a in run.audit if a.faults]:
        yield Tile("Over budget, or not compiled", str(len(faulty)), _first_few(faulty), "bad")


def _goals_tile(goals: Sequence[TargetResult]) -> Tile:
    met = sum(goal.verdict == MET for goal in goals)
    others = [goal for goal in goals if goal.verdict != MET]
    tone = "bad" if any(goal.verdict == MISSED for goal in goals) else "good" if met else ""
    return Tile("Goals met", f"{met} of {len(goals)}", counted(others), tone)


def counted(goals: Iterable[TargetResult]) -> str:
    """How many goals have each verdict: "3 missed, 1 met"."""
    return ", ".join(f"{count} {verdict}" for verdict, count in Counter(goal.verdict for goal in goals).items())


def _change_tiles(changed: Sequence[Comparison]) -> Iterator[Tile]:
    if not changed:
        yield Tile("Since the last run", "\u2013", "no comparable run: none before has timed the same")
        return
    regressed = [row for row in changed if row.regressed]
    files = dict.fromkeys(Path(row.files[0]).stem for row in changed if row.files[0])
    yield Tile(
        "Regressed",
        f"{len(regressed)} of {len(changed)}",
        f"since {_first_few([*files], 2)}",
        "bad" if regressed else "",
    )
    timed = [row for row in changed if row.change.ratio and row.change.verdict in CHANGES]
    for name, way, tone in (("Biggest loss", 1, "bad"), ("Biggest gain", -1, "good")):
        if found := [row for row in timed if way * ((row.change.ratio or 1) - 1) > 0]:
            row = max(found, key=lambda row: way * (row.change.ratio or 1))
            yield Tile(name, change_in_words(row), f"{row.name} {row.part}, {before_and_after(row)}", tone)


def change_in_words(row: Comparison) -> str:
    """By what share it changed: "+3.2%", or "2.41 x"; empty if it was not timed twice."""
    if row.change.ratio is None:
        return ""
    if row.change.ratio >= 2:
        return f"{number(row.change.ratio)} x"
    share = row.change.ratio - 1
    return ("+" if share >= 0 else "\u2212") + percent(abs(share))


def before_and_after(row: Comparison) -> str:
    """Both values: "1.20 ms to 1.24 ms"."""
    words = memory if row.memory else duration
    return f"{words(row.before) or 'nothing'} to {words(row.after) or 'nothing'}"


def _variant_tiles(run: Run) -> Iterator[Tile]:
    """The fastest variant's numbers."""
    timed = [row for row in variant_rows(run) if row.seconds]
    if not timed:
        return
    best = min(timed, key=lambda row: row.seconds or 0)
    ratio = f", {number(best.ratio)} times as fast as {timed[0].variant}" if best.variant != timed[0].variant else ""
    yield Tile("A chunk", duration(best.seconds), best.variant + ratio)
    if best.fps:
        yield Tile("Frames a second", f"{best.fps:.1f}", f"{best.frames} new frames a chunk")
    if best.first_frame:
        yield Tile("First frame", duration(best.first_frame), "from window of sound to frames")
    if best.peak_bytes:
        yield Tile("Peak memory", memory(best.peak_bytes), f"{memory(best.weights_bytes)} of it weights")


def _quality_tiles(run: Run) -> Iterator[Tile]:
    """The first setting's main measures."""
    for measure, name in (("r of open", "Lips follow the voice"), ("sharpness, of the portrait's", "Sharpness")):
        if row := next((row for row in run.quality if row.measure == measure), None):
            yield Tile(name, number(row.value), f"{row.measure}; {row.setting}")


def _first_few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
