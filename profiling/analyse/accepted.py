"""Regressions that are accepted: a TOML file that says which, how far, why, and until when.

    [[accepted]]
    case = "linear/14b-w1-*/fp8"   # a shell pattern of cases or variants; CASE/BACKEND names one back-end
    factor = 1.05                  # the largest ratio, after over before, that is accepted
    why = "sums are exact now"
    until = 2027-01-31             # the last day

A regression within its factor no longer makes `compare` fail. One beyond it does, and so does one that has no ratio,
because its back-end is broken or missing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.files import read_toml
from profiling.analyse.verdicts import Comparison
from profiling.results import finite

FIELDS = ("case", "factor", "why", "until")


@dataclass(frozen=True)
class Accepted:
    """One entry of the file."""

    case: str
    factor: float
    why: str
    until: date

    def names(self, row: Comparison) -> bool:
        """Whether the entry is about that case or back-end."""
        return any(fnmatchcase(name, self.case) for name in (row.name, f"{row.name}/{row.part}"))


def read_accepted(file: Path) -> list[Accepted]:
    """Reads the file. Raises `UserError`, naming the entry, if it cannot be read or an entry is damaged."""
    values = read_toml(file)
    if values.keys() - {"accepted"} or not isinstance(values.get("accepted", []), list):
        raise UserError(f"{file} may hold entries [[accepted]] only, with {', '.join(FIELDS)}")
    try:
        return [_entry(entry, f"accepted[{i}]") for i, entry in enumerate(values.get("accepted", []))]
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _entry(values: Any, where: str) -> Accepted:
    if not isinstance(values, dict) or values.keys() != set(FIELDS):
        raise ValueError(f"{where} must have {', '.join(FIELDS)}, and nothing else")
    case, why, until = values["case"], values["why"], values["until"]
    if not (isinstance(case, str) and isinstance(why, str) and case and why):
        raise ValueError(f"{where}: case and why are texts")
    if not isinstance(until, date) or isinstance(until, datetime):
        raise ValueError(f"{where}: until is a day, such as 2027-01-31, without quotes")
    if (factor := finite(values["factor"], f"{where}.factor")) <= 1:
        raise ValueError(f"{where}: factor {factor} accepts nothing; it is after over before, such as 1.05")
    return Accepted(case, factor, why, until)


def accept(found: Iterable[Comparison], entries: Sequence[Accepted], today: date) -> tuple[list[Comparison], list[str]]:
    """The comparisons with accepted regressions marked, and a line for each entry that no longer applies."""
    rows = [_accepted(row, [entry for entry in entries if today <= entry.until]) for row in found]
    rows.sort(key=lambda row: row.importance)
    lines = []
    for entry in entries:
        regressions = [row for row in rows if (row.regressed or row.accepted) and entry.names(row)]
        if not regressions:
            lines.append(f"accepted regression {entry.case} no longer applies: nothing of that name has regressed")
        elif today > entry.until:
            lines.append(f"accepted regression {entry.case} no longer applies: it was accepted until {entry.until}")
    return rows, lines


def _accepted(row: Comparison, entries: Iterable[Accepted]) -> Comparison:
    if not row.regressed or row.change.ratio is None:
        return row
    entry = next((entry for entry in entries if entry.names(row) and row.change.ratio <= entry.factor), None)
    return replace(row, accepted=f"up to {entry.factor:g} until {entry.until}: {entry.why}") if entry else row
