"""The results that a name stands for: a results file, a folder of them, or a git revision with its committed ones.

Files add up: each measures some cases, and of each case the newest measurement counts. So a tree is asked for a case,
never for a file.
"""

import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model.errors import UserError
from profiling.formats import NoResultsError, load, parse
from profiling.results import ERROR, OK, WRONG, Machine, Run

MEASURED = (OK, WRONG, ERROR)  # statuses that say something about the code
CHUNK = "chunk"  # the quantity of a variant that stands for all
WHOLE_CASE = "all"  # the back-end that a campaign names where a case took the whole process with it


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


def items_of(run: Run) -> dict[tuple[str, str], Item]:
    """All that a run has measured, by (case, back-end) and (variant, quantity)."""
    found = {}
    for case in run.cases:
        for m in case.measurements:
            found[case.case, m.backend] = Item(m.status, m.ours, m.samples, m.detail, m.graph)
    for variant in run.variants:
        if variant.status != OK:
            found[variant.variant, CHUNK] = Item(variant.status, True, detail=variant.detail)
            continue
        times = {CHUNK: variant.chunk, "first frame": variant.first_frame}
        times |= {stage: variant.per_chunk(stage) or calls for stage, calls in variant.stages.items()}
        found |= {(variant.variant, part): Item(OK, True, samples) for part, samples in times.items() if samples}
        if variant.peak_bytes:
            found[variant.variant, "peak memory"] = Item(OK, True, (float(variant.peak_bytes),), memory=True)
    return found


@dataclass(frozen=True)
class Source:
    """A run, and what to call it."""

    name: str
    run: Run
    later: bool = False  # measured at the revision, but committed after it


@dataclass(frozen=True)
class Tree:
    """All runs that one name stands for."""

    name: str
    sources: tuple[Source, ...]  # the first one that has measured a case speaks for it
    whole: bool = True  # False for a single file, which says nothing about the cases that it lacks
    unread: tuple[str, ...] = ()  # committed files that cannot be read any more

    @property
    def measured_later(self) -> bool:
        """Whether results were measured at this revision and committed later."""
        return any(source.later for source in self.sources)

    def may_hold(self, entry: "Entry") -> bool:
        """Whether a measurement that the tree lacks may stand in one of its files that cannot be read."""
        return bool(self.unread) and entry.source.run.started <= max(s.run.started for s in self.sources)


class Key(NamedTuple):
    """What is compared with what: times of two devices never are."""

    device: str
    name: str  # of the case or variant
    part: str  # back-end or quantity


@dataclass(frozen=True)
class Entry:
    """An item, and the run that it comes from."""

    item: Item
    source: Source

    def is_measurement_of(self, other: "Entry") -> bool:
        """Whether both are one and the same measurement, kept in both trees.

        A campaign's runs are kept together, too, in a file that began with the first one: rounds do not come twice, but
        a size in bytes does.
        """
        a, b = self.item, other.item
        same_run = self.source.run.started == other.source.run.started
        return (a.status, a.samples) == (b.status, b.samples) and (same_run or len(set(a.samples)) > 1)


def device_of(machine: Machine) -> str:
    """The device in words, as far as its times are comparable."""
    return f"{machine.device}, {machine.units} {'threads' if machine.kind == 'cpu' else 'multiprocessors'}"


def newest_entries(tree: Tree, *, any_device: bool = False) -> dict[Key, Entry]:
    """The newest measurement of each item in a tree; an item that no run has measured has the newest reason for it.

    With `any_device`, all devices are taken for one, which is called "".
    """
    found: dict[Key, Entry] = {}
    lost: set[tuple[str, str]] = set()  # cases whose newest measurement ended the process
    for source in tree.sources:
        device = "" if any_device else device_of(source.run.machine)
        items = {Key(device, *name): Entry(item, source) for name, item in items_of(source.run).items()}
        for key, entry in items.items():
            if key[:2] not in lost and (key not in found or _says_more(entry.item, found[key].item)):
                found[key] = entry
        lost |= {key[:2] for key in items if key.part == WHOLE_CASE}
    return found


def _says_more(item: Item, newer: Item) -> bool:
    """Whether an item says more than a newer one, which was not measured, or found right without a time."""
    if newer.status in MEASURED:
        return newer.status == OK and not newer.samples and bool(item.samples)
    return item.status in MEASURED


def find_tree(name: str, results: Path) -> Tree:
    """The results of a file, of a folder, or of a git revision.

    Those of a revision are all in its tree's results folder and, ahead of them, those that were measured at it and
    committed later. Raises `UserError` if `name` is none of these, or has no results.
    """
    path = Path(name)
    if path.is_dir():
        if sources := _newest_first(_read_folder(path)):
            return Tree(name, sources)
        raise UserError(f"no file in {name} holds times; run bench --out there")
    if path.exists():
        return Tree(name, (Source(name, load(path)),), whole=False)
    try:
        commit = _git(results, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").decode().strip()
    except (OSError, subprocess.CalledProcessError):
        raise UserError(
            f"{name} is neither a file, a folder nor a git revision; give results, or a revision with some"
        ) from None
    sources, unread = _read_committed(commit, results)
    later, _ = _read_committed("HEAD", results)
    measured_at_it = [replace(source, later=True) for source in later if source.run.machine.revision == commit]
    if not (tree := (*_newest_first(measured_at_it), *_newest_first(sources))):
        raise UserError(
            f"no readable results of {name} ({commit[:9]}) are committed in {results}: none were measured at it, and "
            "none are in its tree; run bench --out there and commit the file"
        )
    return Tree(name, tree, unread=tuple(unread))


def _read_folder(folder: Path) -> Iterator[Source]:
    """All results files of a folder; those of other programs, such as traces, are left out."""
    for file in sorted(folder.rglob("*.json")):
        with suppress(NoResultsError):
            yield Source(str(file), load(file))


def _read_committed(revision: str, results: Path) -> tuple[list[Source], list[str]]:
    """All results files in a revision's tree, and the names of the JSON files that cannot be read."""
    sources, unread = [], []
    for file in _git(results, "ls-tree", "-r", "-z", "--name-only", revision, "--", results.name).decode().split("\0"):
        if file.endswith(".json"):
            name = f"{revision[:9]}:{file}"
            try:
                sources.append(Source(name, parse(_git(results, "show", f"{revision}:./{file}"), name)))
            except UserError:  # of an older or a later program
                unread.append(name)
    return sources, unread


def _newest_first(sources: Iterable[Source]) -> tuple[Source, ...]:
    timed = [source for source in sources if source.run.cases or source.run.variants]
    return tuple(sorted(timed, key=lambda source: source.run.started, reverse=True))


def _git(results: Path, *arguments: str) -> bytes:
    """Runs git in the folder that contains the results folder."""
    folder = results.resolve().parent
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True).stdout
