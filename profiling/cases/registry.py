"""All cases by name, and the selection that a command line asks for."""

import contextlib
import difflib
import fnmatch
import runpy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.config import PRESETS
from model.errors import UserError
from profiling.cases.case import TOLERANCES, Case
from profiling.cases.shapes import student_shapes, vae_shapes


@dataclass(frozen=True)
class Family:
    """The cases of a preset: at which world sizes and in which dtypes it is measured."""

    tag: str  # of the preset in the names of shapes
    worlds: tuple[int, ...]
    dtypes: tuple[str, ...]  # an operation that has none of them is measured in all of its own


DEFAULTS = {"cuda": ["*/14b-*"], "cpu": ["*/tiny-w1*"]}  # patterns of the cases that suit a device type

FAMILIES = {
    "tiny-random": Family("tiny", (1, 2), ("fp32",)),
    "flashtalk-14b": Family("14b", (1, 2, 4, 8), ("bf16", "fp8", "int8")),
}


def preset_cases(preset: str) -> Iterator[Case]:
    """All cases of a preset, at every world size it is measured at."""
    config, family = PRESETS[preset], FAMILIES[preset]
    for world in family.worlds:
        tag = f"{family.tag}-w{world}"
        for operation, shape in (*student_shapes(config, world, tag), *vae_shapes(config, world, tag)):
            for dtype in [d for d in family.dtypes if d in operation.backends] or list(operation.backends):
                yield Case(operation, shape, dtype, operation.tolerances.get(dtype, TOLERANCES[dtype]))


def load_cases(file: Path) -> list[Case]:
    """The list `CASES` of a Python file, for work in progress and for tests.

    Raises `UserError` if the file cannot be run, has no such list, or uses a name twice.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            cases = list(runpy.run_path(str(file))["CASES"])
    except Exception as error:  # the user's file may raise anything
        raise UserError(f"--cases {file} gives no CASES: {type(error).__name__} {error}") from error
    for case in cases:
        if not isinstance(case, Case):
            raise UserError(f"--cases {file}: CASES holds {case!r:.60}, wanted profiling.cases.Case")
        if twice := _twice(backend.name for backend in case.backends):
            raise UserError(f"--cases {file}: {case.name} has two back-ends called {twice}")
    if twice := _twice(case.name for case in cases):
        raise UserError(f"--cases {file}: two cases are called {twice}")
    return cases


def _twice(names: Iterable[str]) -> str | None:
    """The first name that occurs a second time."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def registry(extra: Path | None = None) -> dict[str, Case]:
    """All cases by name, with those of the Python file `extra`; raises `UserError` if it redefines one of ours."""
    cases = {case.name: case for preset in FAMILIES for case in preset_cases(preset)}
    for case in load_cases(extra) if extra else ():
        if case.name in cases:
            raise UserError(f"--cases {extra}: the registry has a {case.name} of its own")
        cases[case.name] = case
    return cases


def requested_cases(patterns: Sequence[str], device: torch.device, extra: Path | None) -> list[Case]:
    """The cases that a command's patterns ask for.

    Without patterns these are the cases of the file `extra`, or without that too, those that suit the device.
    """
    if extra is not None and not patterns:
        return load_cases(extra)
    return select(registry(extra), patterns or DEFAULTS[device.type], DEFAULTS[device.type])


def select(cases: Mapping[str, Case], patterns: Sequence[str], preferred: Sequence[str] = ()) -> list[Case]:
    """The cases whose name matches one of the shell patterns; a pattern without a wildcard may be a part of the name.

    A part of a name selects only cases that also match `preferred`, if any of them do: whoever names an operation on a
    CPU does not ask for the shapes of eight GPUs.

    Raises `UserError` for a pattern that matches nothing, and suggests the nearest names.
    """
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        if any(c in pattern for c in "*?["):
            names = fnmatch.filter(cases, pattern)
        else:
            names = [name for name in cases if pattern in name]
            near = [name for name in names if any(fnmatch.fnmatch(name, p) for p in preferred)]
            names = near if near and pattern not in names else names
        if not names:
            close = ", ".join(difflib.get_close_matches(pattern, cases, n=3, cutoff=0.3)) or "none"
            raise UserError(f"there is no case {pattern}; nearest: {close} (bench --list names all)")
        chosen |= {name: cases[name] for name in names}
    return list(chosen.values())
