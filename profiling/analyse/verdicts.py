"""What became of each measured quantity between two trees of results: a verdict each, and what a reader must know."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from model.errors import UserError
from profiling.analyse.samples import FASTER, SAME, SLOWER, UNSURE, Change, compare_samples
from profiling.analyse.trees import CHUNK, MEASURED, Entry, Item, Key, Source, Tree, device_of, newest_entries
from profiling.results import ERROR, OK, WRONG, Machine, Run
from profiling.tables import percent

OWN_PACKAGE = "flashtalk-triton"  # whose version may differ, as it is what is compared

BROKEN, MISSING, LARGER = "broken", "missing", "larger"
REGRESSIONS = (BROKEN, MISSING, SLOWER, LARGER)
STILL_BROKEN, SMALLER, FIXED, NEW, UNMEASURED = "still broken", "smaller", "fixed", "new", "not measured in between"
UNMEASURED_CODE = 3  # exit code of commands that need a measurement which is missing
ORDER = (*REGRESSIONS, UNSURE, STILL_BROKEN, FASTER, SMALLER, FIXED, NEW, SAME, UNMEASURED)


@dataclass(frozen=True)
class Comparison:
    """One item in both trees."""

    device: str
    name: str  # of the case or variant
    part: str  # back-end or quantity
    ours: bool  # only then does a regression count
    memory: bool
    before: float | None  # median seconds, or bytes
    after: float | None
    rounds: tuple[int, int]
    files: tuple[str | None, str | None]
    change: Change
    accepted: str = ""  # why a regression is accepted

    @property
    def regressed(self) -> bool:
        """Whether it makes the comparison fail."""
        return self.ours and self.change.verdict in REGRESSIONS and not self.accepted

    @property
    def importance(self) -> tuple[bool, int, bool, float]:
        """A sort key that puts the most important first."""
        distance = abs(math.log(self.change.ratio)) if self.change.ratio else 0.0
        return (not self.regressed, ORDER.index(self.change.verdict), not self.ours, -distance)


# --- Two trees, side by side ----------------------------------------------------------------------------------------

Pair = tuple[Entry | None, Entry | None]


@dataclass(frozen=True)
class Join:
    """The newest measurements of two trees, side by side."""

    before: Tree
    after: Tree
    pairs: Mapping[Key, Pair]
    devices_after: Mapping[tuple[str, str], str]  # name and part -> a device on which the second tree has measured it
    left_out: int  # items that a tree has besides the single file on the other side

    def run_pairs(self) -> list[tuple[Source, Source]]:
        """The runs that have measured the same items, each pair once; not a run with itself."""
        found = {}
        for a, b in self.pairs.values():
            if a and b and not b.is_measurement_of(a):
                found[a.source.name, b.source.name] = (a.source, b.source)
        return list(found.values())


def join(before: Tree, after: Tree, *, any_device: bool = False) -> Join:
    """Puts the newest measurements of two trees side by side, each device's by themselves.

    A single file says nothing about cases that it lacks. Beside a tree, therefore, only its own cases count.
    """
    old, new = (newest_entries(tree, any_device=any_device) for tree in (before, after))
    pairs = {key: (old.get(key), new.get(key)) for key in dict.fromkeys((*old, *new))}
    scope = {key[:2] for key in pairs}
    if before.whole != after.whole:
        scope = {key[:2] for key in (new if before.whole else old)}
    kept = {key: pair for key, pair in pairs.items() if key[:2] in scope}
    devices_after = {(k.name, k.part): k.device for k, entry in new.items() if entry.item.status in MEASURED}
    return Join(before, after, kept, devices_after, len(pairs) - len(kept))


def require_comparable(joined: Join, *, force: bool) -> list[str]:
    """Says which runs differ in device or versions, a line each.

    Raises `UserError` if all do and `force` is not given: then nothing can be compared.
    """
    runs = joined.run_pairs()
    first, second = joined.before.sources, joined.after.sources
    if {device_of(a.run.machine) for a in first}.isdisjoint(device_of(b.run.machine) for b in second):
        runs = [(first[0], second[0])]
    lines = [
        f"{a.name} and {b.name} differ in {', '.join(differing)}"
        for a, b in runs
        if (differing := machine_differences(a.run.machine, b.run.machine))
    ]
    if lines and len(lines) == len(runs) and not force:
        raise UserError(f"{lines[0]}, so their times say nothing about the code; --force compares them anyway")
    return lines


# --- Verdicts -------------------------------------------------------------------------------------------------------


def compare_trees(joined: Join, again: Sequence[Tree], threshold: float, *, force: bool) -> list[Comparison]:
    """Compares all that either tree has measured, the most important first.

    Args:
        joined: the two trees; of any device if `force` is given.
        again: further results of the same code as the first tree's; their spread is noise.
        threshold: the smallest change that counts, as a fraction.
        force: compares times of other versions too; they are unsure otherwise.

    If nothing in the two trees is ours, nothing is a peer either: then every regression counts.
    """
    pairs = joined.pairs
    if not any(entry.item.ours for pair in pairs.values() for entry in pair if entry):
        pairs = {key: (_as_ours(a), _as_ours(b)) for key, (a, b) in pairs.items()}
    further = [newest_entries(tree, any_device=force) for tree in again]
    failed = {key[:2] for key, pair in pairs.items() if key.part == CHUNK and any(map(_failed, pair))}
    by_runs: dict[tuple[str | None, str | None], list[Key]] = defaultdict(list)
    for key, pair in pairs.items():
        if key[:2] not in failed or key.part == CHUNK:  # a failed variant is reported once
            by_runs[_files(pair)].append(key)
    found: list[Comparison] = []
    for keys in by_runs.values():
        comparer = _Comparer(joined, {key: pairs[key] for key in keys}, further, threshold, force)
        changes = ((key, comparer.change(key)) for key in keys)
        found += [_comparison(key, pairs[key], change) for key, change in changes if change]
    return sorted(found, key=lambda row: row.importance)


def _failed(entry: Entry | None) -> bool:
    return entry is not None and entry.item.status != OK


def _as_ours(entry: Entry | None) -> Entry | None:
    return entry and replace(entry, item=replace(entry.item, ours=True))


def _files(pair: Pair) -> tuple[str | None, str | None]:
    a, b = (entry.source.name if entry else None for entry in pair)
    return a, b


def _comparison(key: Key, pair: Pair, change: Change) -> Comparison:
    items = [entry.item if entry else None for entry in pair]
    there = [item for item in items if item]
    (old, new), (a, b) = ((item.value if item else None for item in items), (len(i.samples) if i else 0 for i in items))
    ours, memory = any(item.ours for item in there), any(item.memory for item in there)
    return Comparison(*key, ours, memory, old, new, (a, b), _files(pair), change)


class _Comparer:
    """Gives verdicts on what one pair of runs has measured: only within it are the peers a measure of the machine."""

    def __init__(
        self,
        joined: Join,
        pairs: Mapping[Key, Pair],
        again: Sequence[Mapping[Key, Entry]],
        threshold: float,
        force: bool,
    ) -> None:
        self._joined, self._pairs, self._again = joined, pairs, again
        self._threshold, self._force = threshold, force
        a, b = next(iter(pairs.values()))
        self._differing = machine_differences(a.source.run.machine, b.source.run.machine) if a and b else []
        # With other versions, the peers' code has changed too.
        self._shifts = {} if self._differing else peer_shifts(pairs)

    def change(self, key: Key) -> Change | None:
        """The verdict on an item; None if neither run has measured it."""
        a, b = self._pairs[key]
        if a and b and b.is_measurement_of(a):
            return None if a.item.status not in MEASURED else _untimed(UNMEASURED)
        if a and b and a.item.status == b.item.status == OK:
            if self._differing and not self._force:
                return _untimed(UNSURE, f"not compared: {', '.join(self._differing)}")
            return self._timed_change(key, a, b)
        change = _status_change(a.item if a else None, b.item if b else None)
        if change and not (a and b):
            return self._one_sided_change(key, a, b) or change
        return change

    def _one_sided_change(self, key: Key, a: Entry | None, b: Entry | None) -> Change | None:
        """The verdict on an item that one tree seems to lack; None if it does lack it."""
        if a and (device := self._joined.devices_after.get((key.name, key.part))):
            return _untimed(UNMEASURED, f"measured on {device} only")
        if a and a.source.later and not self._joined.after.measured_later:  # so nobody measured there what it may lack
            return _untimed(UNMEASURED, "not measured at the second revision")
        if (a and self._joined.after.may_hold(a)) or (b and self._joined.before.may_hold(b)):
            return _untimed(UNSURE, "perhaps in a file that cannot be read any more")
        return None

    def _timed_change(self, key: Key, a: Entry, b: Entry) -> Change:
        others = [
            entry.item.samples
            for run in self._again
            if (entry := run.get(key))
            and not entry.is_measurement_of(a)
            and (self._force or not machine_differences(a.source.run.machine, entry.source.run.machine))
        ]
        shift = explained_by_peers(a.item, b.item, self._shifts.get("", 0.0), self._shifts.get(key.name, 0.0))
        return _timed_change(a.item, b.item, others, self._threshold, shift)


def _untimed(verdict: str, detail: str = "") -> Change:
    return Change(verdict, None, None, None, None, detail)


def _status_change(a: Item | None, b: Item | None) -> Change | None:
    """The change of an item that is not timed in both runs; None if neither has measured it."""
    failed, was, now = (WRONG, ERROR), a.status if a else None, b.status if b else None
    why = f"{b.status}: {b.detail}" if b and b.detail else now or "not in the second results"
    verdict = None
    if was == OK:
        verdict = BROKEN if now in failed else MISSING
    elif now == OK:
        verdict, why = FIXED if was in failed else NEW, ""
    elif now in failed:
        verdict = STILL_BROKEN if was in failed else NEW
    return _untimed(verdict, why) if verdict else None


def _timed_change(a: Item, b: Item, others: Iterable[tuple[float, ...]], threshold: float, shift: float) -> Change:
    if not a.samples or not b.samples:
        timed_once = a.samples or b.samples
        return _untimed(UNSURE, "timed in one run only") if timed_once else _untimed(SAME, "right, not timed")
    if a.memory:  # memory is exact, so there is no noise
        ratio = b.samples[0] / a.samples[0]
        verdict = LARGER if ratio > 1 + threshold else SMALLER if ratio < 1 / (1 + threshold) else SAME
        return Change(verdict, ratio, ratio, ratio, 0.0)
    change = compare_samples(a.samples, b.samples, others, threshold, shift)
    if a.graph != b.graph:
        detail = "; ".join(filter(None, (change.detail, "timed as a CUDA graph in one run only")))
        change = replace(change, detail=detail)
    return change


# Peers that are torch.compile of our own functions: they change with our code, so their shifts explain nothing.
OWN_CODE_COMPILED = frozenset({"compiled", "bf16-compiled"})


def peer_shifts(pairs: Mapping[Key, Pair]) -> dict[str, float]:
    """The median shift of a case's peers, as a logarithm, by case; under "" the median size of all peers' shifts."""
    moves: dict[str, list[float]] = defaultdict(list)
    for key, (a, b) in pairs.items():
        if a and b and not a.item.ours and key.part not in OWN_CODE_COMPILED and a.item.value and b.item.value:
            move = math.log(b.item.value / a.item.value)
            moves[key.name].append(move)
            moves[""].append(abs(move))
    return {name: float(np.median(distances)) for name, distances in moves.items()}


def explained_by_peers(a: Item, b: Item, everywhere: float, beside: float) -> float:
    """The shift of an item of ours that peers explain; those of its own case only if it has the same direction."""
    if not a.ours or not a.value or not b.value:
        return 0.0
    same_way = beside * math.log(b.value / a.value) > 0
    return max(everywhere, abs(beside) if same_way else 0.0)


# --- What a reader must know ----------------------------------------------------------------------------------------


def machine_differences(a: Machine, b: Machine) -> list[str]:
    """What makes times of the two incomparable: device, driver and versions, where both state them."""
    x, y = machine_facts(a), machine_facts(b)
    return [f"{name} {x[name]} / {y[name]}" for name in x if name in y and not same_version(x[name], y[name])]


def machine_facts(machine: Machine) -> dict[str, str]:
    """What a machine states about itself that decides how fast it runs."""
    units = "CPU threads" if machine.kind == "cpu" else "multiprocessors"
    found = {name: getattr(machine, name) for name in ("device", "kind", "capability", "driver")}
    found |= {units: machine.units} | {name: text for name, text in machine.versions.items() if name != OWN_PACKAGE}
    if python := machine.versions.get("python"):
        found["python"] = ".".join(python.split(".")[:2])
    return {name: str(value) for name, value in found.items() if value}


def same_version(a: str, b: str) -> bool:
    """Whether two spellings are of one version: the build after a plus counts only where both state it."""
    (a, _, build_a), (b, _, build_b) = a.partition("+"), b.partition("+")
    return a == b and (build_a == build_b or not build_a or not build_b)


def provenance_differences(a: Run, b: Run) -> list[str]:
    """In what the circumstances of two runs differ that may explain a shift, a line each, where both state them."""
    m, n = a.machine, b.machine
    limits = [f"{x:.0f} W" if (x := run.nvml.power_limit_watts) else None for run in (a, b)]
    facts = {
        "table of launch parameters": (m.tuned, n.tuned),
        "power limit": limits,
        "ECC": (_on_off(m.ecc), _on_off(n.ecc)),
        "persistence mode": (_on_off(m.persistence), _on_off(n.persistence)),
        "inside a container": (_yes_no(m.container), _yes_no(n.container)),
    }
    if m.environment is not None and n.environment is not None:
        for name in sorted(m.environment | n.environment):
            facts[f"environment variable {name}"] = [e.get(name, "not set") for e in (m.environment, n.environment)]
    return [f"{name}: {x} in the first run, {y} in the second" for name, (x, y) in facts.items() if x and y and x != y]


def _on_off(state: bool | None) -> str | None:
    return None if state is None else "on" if state else "off"


def _yes_no(state: bool | None) -> str | None:
    return None if state is None else "yes" if state else "no"


def comparison_notes(before: Run, after: Run, found: Iterable[Comparison], threshold: float) -> list[str]:
    """What a reader must know about two runs: other circumstances, throttling, shifted ceilings and peers."""
    notes = []
    for title, run in (("first", before), ("second", after)):
        if run.nvml.throttled:
            reasons = ", ".join(f"{name} {part:.0%} of the time" for name, part in run.nvml.throttled.items())
            notes.append(f"the {title} run was throttled: {reasons}")
        if "-dirty" in (run.machine.revision or ""):
            notes.append(f"the {title} run was made with uncommitted changes: {run.machine.revision}")
    notes += provenance_differences(before, after)
    old, new = ({"copied": r.ceilings.copy_bytes_s} | r.ceilings.matmul_flop_s for r in (before, after))
    if before.ceilings.copy_launched != after.ceilings.copy_launched:  # two ways to copy say nothing about the machine
        del old["copied"]
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


def tree_notes(joined: Join, found: Sequence[Comparison], threshold: float) -> list[str]:
    """What a reader must know about two trees: of each pair of runs that is compared, and of what is not compared."""
    runs, notes = joined.run_pairs(), []
    for a, b in runs:
        rows = [row for row in found if row.files == (a.name, b.name)]
        title = f"{a.name} and {b.name}: " if len(runs) > 1 else ""
        notes += [title + note for note in comparison_notes(a.run, b.run, rows, threshold)]
    if unread := (*joined.before.unread, *joined.after.unread):
        notes.append(f"not read, as these are no results or of a later version: {', '.join(unread)}")
    if joined.left_out:
        tree, file = (joined.before, joined.after) if joined.before.whole else (joined.after, joined.before)
        notes.append(f"measurements of {tree.name} left out, as {file.name} lacks their cases: {joined.left_out}")
    return notes
