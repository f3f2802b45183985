"""Compares two runs: what became faster or slower, and what broke.

A round is one sample, and rounds scatter. So two sets of rounds are compared, not two numbers, and in logarithms:

    ratio     after over before, by Hodges and Lehmann: the median of the ratios of all pairs of rounds
    interval  of that ratio at the 99 % level, from the ranks of these pairs (the interval of the Mann-Whitney test);
              no distribution of times is assumed
    noise     the largest of three: how far the first run is from itself (odd rounds from even ones, first half from
              second half); how far it is from further runs of the same code (`--again`); how far peers, whose code is
              the same, have shifted between the runs (the larger median, of the case's peers or of all peers)
    spikes    rounds further from the median than 4 robust standard deviations (1.4826 times the median distance) are
              left out: an interrupt is not the kernel's time
    drift     where a round resembles the previous one (rank correlation r above 2 / sqrt(rounds)), rounds say less than
              independent ones would, and the interval is widened by sqrt((1 + r) / (1 - r))

*Slower*: the interval excludes 1, and the ratio exceeds 1 + the larger of threshold and noise. *Faster* is the
opposite; everything else is the *same*. Fewer than five rounds per side cannot reach 99 %: then a large difference gets
a verdict, and the rest is *unsure*.

The operating curve, over 2,000 synthetic pairs per point: 20 rounds each, lognormal noise of 3 %, one round in twenty a
spike (1.1 to 2.7 times as long), threshold 2 %. Called slower, if the second run is truly slower by

    0 %: 0.5 %    2 %: 22 %    3 %: 54 %    4 %: 85 %    5 %: 95 %    6 %: 98 %    8 %: 99.5 %

Of equal pairs, 99.0 % are called the same. A slowdown of 5 % is found by 10 rounds in 66 % of the pairs, by 40 rounds
in all of them. With 1 % of noise, 2.5 % are found in 93 %, and all equal pairs are called the same. On a machine that
drifts, equal pairs are called the same in 99 % (a ramp of 3 %), 93 % (a step of 3 %) and 93 % (noise with an
autocorrelation of 0.7), and 5 % are found in 90, 80 and 33 %. No number of rounds shows what differs from process to
process, such as memory placement, clocks and neighbours: `--again` does, and so do the peers.
"""

import json
import math
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Table
from scipy.stats import rankdata

from model.errors import UserError
from profiling.formats import from_json, load
from profiling.results import ERROR, OK, WRONG, Machine, Run, as_json_text
from profiling.tables import duration, number, percent, terminal

Z_99 = 2.5758  # standard deviations that contain 99 % of a normal distribution
SPIKE_SIGMAS = 4.0  # robust standard deviations
MIN_ROUNDS = 5  # per side; fewer cannot give an interval at 99 %
FEW_ROUNDS_CHANGE = 0.10  # smallest change that counts with fewer rounds
MAX_FULL_ROWS = 40  # of longer comparisons, new and unchanged rows are only counted
OWN_PACKAGE = "flashtalk-triton"  # whose version may differ, as it is what is compared

BROKEN, MISSING, SLOWER, LARGER = "broken", "missing", "slower", "larger"
REGRESSIONS = (BROKEN, MISSING, SLOWER, LARGER)
UNSURE, STILL_BROKEN, FASTER, SMALLER, FIXED, NEW, SAME = (
    "unsure",
    "still broken",
    "faster",
    "smaller",
    "fixed",
    "new",
    "same",
)
ORDER = (*REGRESSIONS, UNSURE, STILL_BROKEN, FASTER, SMALLER, FIXED, NEW, SAME)
COLOURS = dict.fromkeys(REGRESSIONS, "red") | dict.fromkeys((FASTER, SMALLER, FIXED), "green") | {UNSURE: "yellow"}

# --- Statistics -----------------------------------------------------------------------------------------------------

Logs = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """The difference between the rounds of two runs."""

    verdict: str  # slower, faster, same or unsure
    ratio: float | None  # after over before
    low: float | None  # interval of the ratio; None where rounds are too few for one
    high: float | None
    noise: float | None  # relative: 0.02 is 2 %
    detail: str = ""


def compare_samples(
    before: Sequence[float],
    after: Sequence[float],
    again: Iterable[Sequence[float]] = (),
    threshold: float = 0.02,
    shift: float = 0.0,
) -> Change:
    """Compares two sets of samples, of at least one each; `again` are further samples of the first kind.

    `shift` is noise known from elsewhere, as the logarithm of a ratio.
    """
    if not all(0 < time < math.inf for time in (*before, *after)):  # NaN is neither
        return Change(UNSURE, None, None, None, None, "a time that is not above zero")
    if min(len(before), len(after)) < MIN_ROUNDS:
        return _compare_few(before, after, threshold)
    a, b = without_spikes(before), without_spikes(after)
    pairs = np.sort(np.subtract.outer(b, a), axis=None)
    inflation = max(_variance_inflation(a), _variance_inflation(b))
    spread = math.sqrt(inflation * len(a) * len(b) * (len(a) + len(b) + 1) / 12)
    outside = math.floor(len(pairs) / 2 - Z_99 * spread)  # pairs beyond each end of the interval
    ratio = float(np.median(pairs))
    noise = max(shift, _noise(a, [without_spikes(samples) for samples in again if samples]))
    low, high = (pairs[outside], pairs[-1 - outside]) if outside >= 0 else (-math.inf, math.inf)
    limit = max(math.log1p(threshold), noise)
    verdict = SLOWER if low > 0 and ratio > limit else FASTER if high < 0 and ratio < -limit else SAME
    detail = ""
    if verdict == SAME and abs(ratio) > math.log1p(threshold):
        detail = "too scattered to tell" if low <= 0 <= high else "within the noise"
    low, high = (math.exp(end) if math.isfinite(end) else None for end in (low, high))
    return Change(verdict, math.exp(ratio), low, high, math.expm1(noise), detail)


def without_spikes(samples: Sequence[float]) -> Logs:
    """The logarithms of the samples, in their order, without spikes."""
    logs = np.log(np.asarray(samples, dtype=np.float64))
    distance = np.abs(logs - np.median(logs))
    return logs[distance <= SPIKE_SIGMAS * 1.4826 * np.median(distance)] if np.median(distance) > 0 else logs


def _variance_inflation(x: Logs) -> float:
    """By what factor autocorrelation inflates the variance of a mean; 1 if samples may be independent."""
    ranks = rankdata(x) - (len(x) + 1) / 2
    correlation = (ranks[1:] * ranks[:-1]).sum() / max(np.square(ranks).sum(), 1.0)
    return float((1 + correlation) / (1 - correlation)) if correlation > 2 / math.sqrt(len(x)) else 1.0


def _noise(a: Logs, again: Iterable[Logs]) -> float:
    half = len(a) // 2
    pairs = [(a[::2], a[1::2]), (a[:half], a[half:]), *((a, other) for other in again)]
    return max(abs(float(np.median(np.subtract.outer(y, x)))) for x, y in pairs)


def _compare_few(before: Sequence[float], after: Sequence[float], threshold: float) -> Change:
    """For too few rounds: a change if the ranges do not overlap and the medians are far from each other."""
    ratio = float(np.median(after) / np.median(before))
    count = f"{min(len(before), len(after))} rounds, too few for statistics"
    apart = min(after) > max(before) or max(after) < min(before)
    least = max(threshold, FEW_ROUNDS_CHANGE)
    if min(len(before), len(after)) > 1 and apart and abs(math.log(ratio)) > math.log1p(least):
        verdict, detail = (SLOWER if ratio > 1 else FASTER), f"{count}: apart, by more than {least:.0%}"
    elif abs(math.log(ratio)) <= math.log1p(threshold):
        verdict, detail = SAME, f"{count}: medians within {percent(threshold)}"
    else:
        verdict, detail = UNSURE, f"{count}, and not far apart"
    return Change(verdict, ratio, None, None, None, detail)


# --- Runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One quantity that a run has measured: the time of a back-end on a case, or a quantity of a variant."""

    status: str
    ours: bool
    samples: tuple[float, ...] = ()  # seconds, or bytes
    detail: str = ""
    graph: bool = False
    memory: bool = False  # whether samples are bytes

    @property
    def value(self) -> float | None:
        """The median sample."""
        return float(np.median(self.samples)) if self.samples else None


@dataclass(frozen=True)
class Comparison:
    """One item in both runs."""

    name: str  # of the case or variant
    part: str  # back-end or quantity
    ours: bool  # only then does a regression count
    memory: bool
    before: float | None  # median seconds, or bytes
    after: float | None
    rounds: tuple[int, int]
    change: Change

    @property
    def regressed(self) -> bool:
        """Whether it makes the comparison fail."""
        return self.ours and self.change.verdict in REGRESSIONS

    @property
    def importance(self) -> tuple[bool, int, bool, float]:
        """A sort key that puts the most important first."""
        distance = abs(math.log(self.change.ratio)) if self.change.ratio else 0.0
        return (not self.regressed, ORDER.index(self.change.verdict), not self.ours, -distance)


def items_of(run: Run) -> dict[tuple[str, str], Item]:
    """All that a run has measured, by (case, back-end) and (variant, quantity)."""
    found = {}
    for case in run.cases:
        for m in case.measurements:
            found[case.case, m.backend] = Item(m.status, m.ours, m.samples, m.detail, m.graph)
    for variant in run.variants:
        if variant.status != OK:
            found[variant.variant, "chunk"] = Item(variant.status, True, detail=variant.detail)
            continue
        times = {"chunk": variant.chunk, "first frame": variant.first_frame}
        times |= {stage: variant.per_chunk(stage) or calls for stage, calls in variant.stages.items()}
        found |= {(variant.variant, part): Item(OK, True, samples) for part, samples in times.items() if samples}
        if variant.peak_bytes:
            found[variant.variant, "peak memory"] = Item(OK, True, (float(variant.peak_bytes),), memory=True)
    return found


# Peers that are torch.compile of our own functions: they change with our code, so their shifts explain nothing.
OWN_CODE_COMPILED = frozenset({"compiled", "bf16-compiled"})


def peer_shifts(old: Mapping[tuple[str, str], Item], new: Mapping[tuple[str, str], Item]) -> dict[str, float]:
    """The median shift of a case's peers, as a logarithm, by case; under "" the median size of all peers' shifts."""
    moves: dict[str, list[float]] = defaultdict(list)
    for (name, part), a in old.items():
        b = new.get((name, part))
        if not a.ours and part not in OWN_CODE_COMPILED and a.value and b is not None and b.value:
            move = math.log(b.value / a.value)
            moves[name].append(move)
            moves[""].append(abs(move))
    return {name: float(np.median(distances)) for name, distances in moves.items()}


def explained_by_peers(a: Item | None, b: Item | None, everywhere: float, beside: float) -> float:
    """The shift of an item of ours that peers explain; those of its own case only if it has the same direction."""
    if a is None or b is None or not a.ours or not a.value or not b.value:
        return 0.0
    same_way = beside * math.log(b.value / a.value) > 0
    return max(everywhere, abs(beside) if same_way else 0.0)


def compare_runs(before: Run, after: Run, again: Sequence[Run] = (), threshold: float = 0.02) -> list[Comparison]:
    """Compares all that either run has measured, the most important first.

    If nothing in the two runs is ours, nothing is a peer either: then every regression counts.
    """
    old, new, further = items_of(before), items_of(after), [items_of(run) for run in again]
    if not any(item.ours for item in (*old.values(), *new.values())):
        old, new = ({name: replace(item, ours=True) for name, item in items.items()} for items in (old, new))
    # With other versions, the peers' code has changed too.
    shifts = {} if machine_differences(before.machine, after.machine) else peer_shifts(old, new)
    failed = {v.variant for run in (before, after) for v in run.variants if v.status != OK}
    found = []
    for name, part in dict.fromkeys((*old, *new)):
        a, b = old.get((name, part)), new.get((name, part))
        others = [run[name, part].samples for run in further if (name, part) in run]
        shift = explained_by_peers(a, b, shifts.get("", 0.0), shifts.get(name, 0.0))
        change = _item_change(a, b, others, threshold, shift)
        if change is None or (name in failed and part != "chunk"):  # a failed variant is reported once
            continue
        there = [item for item in (a, b) if item]
        found.append(
            Comparison(
                name,
                part,
                any(item.ours for item in there),
                any(item.memory for item in there),
                a.value if a else None,
                b.value if b else None,
                (len(a.samples) if a else 0, len(b.samples) if b else 0),
                change,
            )
        )
    return sorted(found, key=lambda row: row.importance)


def _item_change(
    a: Item | None, b: Item | None, others: Iterable[tuple[float, ...]], threshold: float, shift: float
) -> Change | None:
    """The change of an item; None if neither run has measured it."""
    failed, was, now = (WRONG, ERROR), a.status if a else None, b.status if b else None
    if a and b and was == now == OK:
        return _timed_change(a, b, others, threshold, shift)
    why = f"{b.status}: {b.detail}" if b and b.detail else now or "not in the second run"
    verdict = None
    if was == OK:
        verdict = BROKEN if now in failed else MISSING
    elif now == OK:
        verdict, why = FIXED if was in failed else NEW, ""
    elif now in failed:
        verdict = STILL_BROKEN if was in failed else NEW
    return Change(verdict, None, None, None, None, why) if verdict else None


def _timed_change(a: Item, b: Item, others: Iterable[tuple[float, ...]], threshold: float, shift: float) -> Change:
    if not a.samples or not b.samples:
        verdict, detail = (UNSURE, "timed in one run only") if a.samples or b.samples else (SAME, "right, not timed")
        return Change(verdict, None, None, None, None, detail)
    if a.memory:  # memory is exact, so there is no noise
        ratio = b.samples[0] / a.samples[0]
        verdict = LARGER if ratio > 1 + threshold else SMALLER if ratio < 1 / (1 + threshold) else SAME
        return Change(verdict, ratio, ratio, ratio, 0.0)
    change = compare_samples(a.samples, b.samples, others, threshold, shift)
    if a.graph != b.graph:
        detail = "; ".join(filter(None, (change.detail, "timed as a CUDA graph in one run only")))
        change = replace(change, detail=detail)
    return change


def machine_differences(a: Machine, b: Machine) -> list[str]:
    """What makes times of the two incomparable: device, driver and versions, where both state them."""
    x, y = machine_facts(a), machine_facts(b)
    return [f"{name} {x[name]} / {y[name]}" for name in x if name in y and x[name] != y[name]]


def machine_facts(machine: Machine) -> dict[str, str]:
    """What a machine states about itself that decides how fast it runs."""
    units = "CPU threads" if machine.kind == "cpu" else "multiprocessors"
    found = {name: getattr(machine, name) for name in ("device", "kind", "capability", "driver")}
    found |= {units: machine.units} | {name: text for name, text in machine.versions.items() if name != OWN_PACKAGE}
    if python := machine.versions.get("python"):
        found["python"] = ".".join(python.split(".")[:2])
    return {name: str(value) for name, value in found.items() if value}


def comparison_notes(before: Run, after: Run, found: Iterable[Comparison], threshold: float) -> list[str]:
    """What a reader must know about the two machines: shifted ceilings and peers, throttling, uncommitted changes."""
    notes = []
    for title, run in (("first", before), ("second", after)):
        if run.nvml.throttled:
            reasons = ", ".join(f"{name} {part:.0%} of the time" for name, part in run.nvml.throttled.items())
            notes.append(f"the {title} run was throttled: {reasons}")
        if (run.machine.revision or "").endswith("-dirty"):
            notes.append(f"the {title} run was made with uncommitted changes to {run.machine.revision}")
    old, new = ({"copied": r.ceilings.copy_bytes_s} | r.ceilings.matmul_flop_s for r in (before, after))
    for name in old:
        a, b = old[name] or 0.0, new.get(name) or 0.0
        if min(a, b) > 0 and abs(math.log(b / a)) > math.log1p(threshold):
            what = name if name == "copied" else f"multiplied {name} matrices"
            notes.append(
                f"in the second run the machine {what} {percent(abs(b / a - 1))} {'faster' if b > a else 'slower'}"
            )
    peers = [row.change.ratio for row in found if not row.ours and row.change.ratio]
    if peers and abs(math.log(middle := float(np.median(peers)))) > math.log1p(threshold):
        how = f"{percent(abs(middle - 1))} {'slower' if middle > 1 else 'faster'}"
        notes.append(
            f"peers, whose code did not change, became {how} (median of {len(peers)}): perhaps the machine did"
        )
    if unknown := machine_facts(before.machine).keys() ^ machine_facts(after.machine).keys():
        notes.append(f"stated by one run only, so not compared: {', '.join(sorted(unknown))}")
    return notes


# --- Where runs come from -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A run, and what to call it."""

    name: str
    run: Run
    given: bool = False  # as a file, not looked up in git


def find_runs(name: str, results: Path) -> list[Source]:
    """The run in a file, or the runs of a git revision, the newest first.

    Runs of a revision are those measured at it or, if there are none, those committed in its tree. Raises `UserError`
    if `name` is neither, or the revision has no results.
    """
    if Path(name).exists():
        return [Source(name, load(Path(name)), given=True)]
    try:
        commit = _git(results, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip()
    except (OSError, subprocess.CalledProcessError):
        raise UserError(f"{name} is neither a file nor a git revision; give a results file or a revision") from None
    found = [s for s in _committed("HEAD", results) if s.run.machine.revision == commit] or _committed(commit, results)
    if not found:
        raise UserError(
            f"no readable results of {name} ({commit[:9]}) are committed in {results}: none were measured at it, and "
            "none are in its tree; run bench --out there and commit the file"
        )
    return sorted(found, key=lambda source: source.run.started, reverse=True)


def _committed(revision: str, results: Path) -> list[Source]:
    """The runs with times in the results folder of a revision's tree."""
    found = []
    for file in _git(results, "ls-tree", "-r", "-z", "--name-only", revision, "--", results.name).split("\0"):
        if file.endswith(".json"):
            text, name = _git(results, "show", f"{revision}:./{file}"), f"{revision[:9]}:{file}"
            with suppress(UserError, ValueError):  # for example of another schema version
                found.append(Source(name, from_json(json.loads(text), name)))
    return [source for source in found if source.run.cases or source.run.variants]


def _git(results: Path, *arguments: str) -> str:
    """Runs git in the folder that contains the results folder."""
    folder = results.resolve().parent
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout


def choose_pair(befores: Sequence[Source], afters: Sequence[Source]) -> tuple[Source, Source]:
    """The newest two runs that are comparable and have something in common; without such, the newest of each.

    Results stay in the tree when others are added, so two revisions may share some. These are left out on one side.
    Raises `UserError` if they have nothing else.
    """
    if befores[0].given and afters[0].given:
        return befores[0], afters[0]
    fresh = [b for b in afters if all(a.run != b.run for a in befores)]
    older = befores if fresh else [a for a in befores if all(a.run != b.run for b in afters)]
    if not older:
        raise UserError(f"{befores[0].name} and {afters[0].name} are the same results; nothing was measured in between")
    pairs = [(a, b) for a in older for b in fresh or afters]
    like = [(a, b) for a, b in pairs if items_of(a.run).keys() & items_of(b.run).keys()] or pairs
    return next((pair for pair in like if not machine_differences(pair[0].run.machine, pair[1].run.machine)), like[0])


# --- The command ----------------------------------------------------------------------------------------------------


def compare_command(
    before: str, after: str, again: list[str], threshold: float, force: bool, results: Path, as_json: bool
) -> int:
    """Implements `python -m profiling compare`; returns 1 if something of ours regressed."""
    if not 0 <= threshold < 1:
        raise UserError(f"--threshold {threshold}: it is a share between 0 and 1; 0.02 is 2 %")
    a, b = choose_pair(find_runs(before, results), find_runs(after, results))
    further = [choose_pair([a], find_runs(name, results))[1] for name in again]
    forced = [
        f"{a.name} and {other.name} differ in {', '.join(differing)}"
        for other in (b, *further)
        if (differing := machine_differences(a.run.machine, other.run.machine))
    ]
    if forced and not force:
        raise UserError(f"{forced[0]}, so their times say nothing about the code; --force compares them anyway")
    found = compare_runs(a.run, b.run, [source.run for source in further], threshold)
    if not found:
        raise UserError(f"{a.name} and {b.name} hold no times; compare runs of bench, or of gpu --phase bench or e2e")
    notes = comparison_notes(a.run, b.run, found, threshold)
    regressed = any(row.regressed for row in found)
    if as_json:
        print(as_json_text(_document(a, b, further, forced, notes, found)))
    else:
        _show(a, b, forced, notes, found)
    return int(regressed)


def _document(
    a: Source, b: Source, further: Iterable[Source], forced: list[str], notes: list[str], found: Sequence[Comparison]
) -> dict[str, Any]:
    def about(source: Source) -> dict[str, Any]:
        run = source.run
        return {"file": source.name, "started": run.started, "machine": asdict(run.machine)}

    return {
        "regressed": any(row.regressed for row in found),
        "counts": dict(Counter(row.change.verdict for row in found)),
        "forced": forced,  # differences that --force overrode
        "notes": notes,
        "before": about(a),
        "after": about(b),
        "again": [about(source) for source in further],
        "rows": [asdict(row) | {"regressed": row.regressed} for row in found],
    }


def _show(a: Source, b: Source, forced: Iterable[str], notes: Iterable[str], found: Sequence[Comparison]) -> None:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("case, back-end", overflow="fold")
    for heading in ("before", "after", "ratio", "99 % sure", "noise"):
        out.add_column(heading, justify="right", no_wrap=True)
    verdict = None
    for row in found:
        if row.change.verdict in (NEW, SAME) and len(found) > MAX_FULL_ROWS:
            continue
        if row.change.verdict != verdict:
            verdict = row.change.verdict
            out.add_section()
            out.add_row(verdict.upper(), style=COLOURS.get(verdict))
        out.add_row(*_cells(row))
    console = terminal()
    for line in forced:
        console.print(f"[yellow]forced: {escape(line)}[/]")
    console.print(
        f"before {escape(a.name)}, {a.run.started}; after {escape(b.name)}, {b.run.started}",
        highlight=False,
        soft_wrap=True,
    )
    if out.row_count:
        console.print(out)
    for line in notes:
        console.print(f"note: {escape(line)}", soft_wrap=True)
    counts = Counter(row.change.verdict for row in found)
    console.print(
        ", ".join(f"{counts[verdict]} {verdict}" for verdict in ORDER if counts[verdict]),
        highlight=False,
        soft_wrap=True,
    )
    if regressed := sum(row.regressed for row in found):
        console.print(f"[red]{regressed} regressed[/]", soft_wrap=True)


def _cells(row: Comparison) -> Iterator[str]:
    change = row.change
    detail = f"\n  [dim]{escape(change.detail)}[/]" if change.detail else ""
    yield f"{escape(row.name)}\n  {escape(row.part)}{'' if row.ours else ' [dim](peer)[/]'}{detail}"
    for value in (row.before, row.after):
        yield (f"{value / 2**30:.2f} GiB" if value is not None else "") if row.memory else duration(value)
    yield _ratio(change.ratio)
    yield f"{_ratio(change.low)}-{_ratio(change.high)}" if change.low and change.high and not row.memory else ""
    yield f"±{percent(change.noise)}" if change.noise is not None and not row.memory else ""


def _ratio(value: float | None) -> str:
    return f"{value:.3f}" if value and 0.1 < value < 10 else number(value)
