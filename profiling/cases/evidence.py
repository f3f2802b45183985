"""All that was measured, from results files and from the tables of `kernels/tuned`, as runs with true ceilings.

An entry of a tuned table becomes a run of its own, named after the cases that have its operation, dtype and dimensions.
It was measured in one session with its peers, like a case of `bench`, and keeps one time for each back-end. It has no
ceilings: the tuner stores none.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kernels.tuning import FOLDER, SCHEMA, TunedEntry, TunedTable, read_table
from model.errors import UserError
from profiling.cases.case import Case
from profiling.cases.registry import registry
from profiling.ceilings import with_launched_copy
from profiling.formats import load
from profiling.results import OK, CaseResult, Machine, Measurement, Run

RESULTS = Path(__file__).parents[1] / "results"
COMMITTED = (RESULTS, FOLDER)  # folders that may not exist before anything is measured


def gather(places: Sequence[Path]) -> tuple[list[tuple[str, Run]], list[str]]:
    """The runs in files and folders, as (file, run), the newest first; and errors about files in the folders.

    Raises `UserError` for a file that cannot be read, if it was named itself.
    """
    found, notes = [], []
    for place in places:
        if not place.is_dir():
            if place not in COMMITTED:
                found += _read(place)
            continue
        for file in sorted(place.glob("*.json")):
            try:
                found += _read(file)
            except UserError as error:
                notes.append(str(error))
    return with_launched_copy(sorted(found, key=lambda item: item[1].started, reverse=True)), notes


def _read(file: Path) -> list[tuple[str, Run]]:
    """The runs of a results file, which is one, or of a tuned table, which has one for each entry."""
    if not _is_table(file):
        return [(str(file), load(file))]
    try:
        return [(str(file), run) for run in tuned_runs(read_table(file))]
    except ValueError as error:
        raise UserError(str(error)) from error


def _is_table(file: Path) -> bool:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):  # `load` says what is wrong
        return False
    return isinstance(values, dict) and values.get("schema") == SCHEMA


def tuned_runs(table: TunedTable) -> Iterator[Run]:
    """The entries of a tuned table that belong to cases of the registry, each as a run."""
    cases: dict[tuple[Any, ...], list[Case]] = {}
    for case in registry().values():
        cases.setdefault(_key(case.operation.name, case.dtype, case.shape.dims), []).append(case)
    for entry in table.entries:
        if same := cases.get(_key(entry.operation, entry.dtype, entry.dims)):
            machine = Machine("cuda", table.device, 0, 0, table.capability, versions=dict(entry.versions))
            yield Run("tune", entry.measured, machine, cases=tuple(_result(case, entry) for case in same))


def _key(operation: str, dtype: str, dims: Mapping[str, int]) -> tuple[Any, ...]:
    return operation, dtype, tuple(sorted(dims.items()))


def _result(case: Case, entry: TunedEntry) -> CaseResult:
    ours = {b.name for b in case.backends if b.ours}
    times = entry.seconds.items()
    return case.result(tuple(Measurement(name, OK, name in ours, samples=(seconds,)) for name, seconds in times))
