"""Reads results files in every format that is accepted: this project's own schema, and pytest-benchmark's JSON.

A file in our schema may be of another program: its command is then a script, such as the probe of 2026-11-26. What such
a program measured is no kernel of this repository, so all of it counts as peers.

pytest-benchmark keeps every round if told to, so nothing is lost. What a benchmark measures stands in its `extra_info`
(case, backend, ours, operation, shape, dtype, flops, bytes, world, calls, dims), under names of any schema version.
Where it ran stands in `machine_info["profiling"]`, the fields of `Machine`, which tests/conftest.py writes by
pytest-benchmark's hook. A file without it becomes a CPU's.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from model.errors import UserError
from profiling import migrate
from profiling.results import OK, CaseResult, Machine, Measurement, Run, build, finite, from_own_json


class NoResultsError(UserError):
    """The file is of another program."""


def load(path: Path) -> Run:
    """Reads a results file or a pytest-benchmark JSON file.

    Raises `UserError` for a file that is neither, is damaged, or has a later schema version.
    """
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def parse(content: bytes, source: str) -> Run:
    """The run in a file's content, see `load`; `source` is what errors call it by."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON: {error}") from error
    return from_json(values, source)


def from_json(values: Any, source: str) -> Run:
    """The run that JSON values describe, see `load`; `source` is what errors call them by."""
    run = _run_of(values, source)
    for case in run.cases:
        if (least := min((x for m in case.measurements for x in m.samples), default=0.0)) < 0:
            raise UserError(f"{source} is damaged: {case.case} took {least} s, wanted no negative time")
    return run


def _run_of(values: Any, source: str) -> Run:
    if (run := from_own_json(values, source)) is not None:
        return as_peers(run) if of_another_program(run) else run
    try:
        run = from_pytest_benchmark(values)
    except ValueError as error:
        raise UserError(f"{source} is damaged: {error}") from error
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise UserError(f"{source} is damaged: {type(error).__name__} {error}") from error
    if run is None:
        raise NoResultsError(f"{source} holds no results: it is neither a file of ours nor pytest-benchmark's")
    return run


def of_another_program(run: Run) -> bool:
    """Whether a program outside of this repository measured the run: its command is a script, none of our commands."""
    return run.command.split(" ")[0].endswith(".py")


def as_peers(run: Run) -> Run:
    """The run with every back-end as a peer."""
    cases = (replace(c, measurements=tuple(replace(m, ours=False) for m in c.measurements)) for c in run.cases)
    return replace(run, cases=tuple(cases))


def from_pytest_benchmark(values: Any) -> Run | None:
    """The run in pytest-benchmark's JSON, None if it is something else.

    A benchmark without `extra_info` of ours becomes a case of its full name with the back-end "pytest". It counts as
    ours, so that `compare` fails if it becomes slower, unless its `extra_info` says otherwise.
    """
    if not (isinstance(values, dict) and "benchmarks" in values and "machine_info" in values):
        return None
    cases: dict[str, CaseResult] = {}
    for benchmark in values["benchmarks"]:
        _add(cases, *_benchmark_result(benchmark))
    return Run(
        "pytest --benchmark-only",
        datetime.fromisoformat(values["datetime"]).astimezone(UTC).isoformat(timespec="seconds"),
        _benchmark_machine(values["machine_info"], values.get("commit_info") or {}),
        cases=tuple(cases.values()),
    )


def _add(cases: dict[str, CaseResult], case: CaseResult, measurement: Measurement) -> None:
    """Puts a measurement with the others of its case; the first one that knows FLOPs or bytes says what the case is."""
    before = cases.get(case.case, case)
    known = before if before.flops or before.bytes else case
    cases[case.case] = replace(known, measurements=(*before.measurements, measurement))


def _benchmark_result(benchmark: Mapping[str, Any]) -> tuple[CaseResult, Measurement]:
    info, stats = migrate.case(benchmark.get("extra_info") or {}), benchmark["stats"]
    # Rounds are kept by --benchmark-json and --benchmark-save-data; a file without them still has quartiles.
    samples = stats.get("data") or [stats["q1"], stats["median"], stats["q3"]]
    name = str(info.get("case", benchmark["fullname"]))
    case = CaseResult(
        case=name,
        operation=str(info.get("operation", benchmark["name"])),
        shape=str(info.get("shape", "")),
        dtype=str(info.get("dtype", "")),
        flops=finite(info.get("flops", 0), f"{name}.flops"),
        bytes=finite(info.get("bytes", 0), f"{name}.bytes"),
        world=int(info.get("world", 1)),
        calls=finite(info.get("calls", 0), f"{name}.calls"),
        dims={str(name): int(size) for name, size in info.get("dims", {}).items()},
    )
    backend, ours = str(info.get("backend", "pytest")), bool(info.get("ours", True))
    return case, Measurement(backend, OK, ours, samples=tuple(finite(x, f"{name}.seconds") for x in samples))


def _benchmark_machine(info: Mapping[str, Any], commit: Mapping[str, Any]) -> Machine:
    if "profiling" in info:
        return build(Machine, info["profiling"], "machine_info.profiling")
    cpu = info.get("cpu") or {}
    device = cpu.get("brand_raw") or info.get("processor") or info.get("machine") or "unknown CPU"
    dirty = "-dirty" if commit.get("dirty") else ""
    revision = f"{commit['id']}{dirty}" if commit.get("id") else None
    versions = {"python": str(info["python_version"])} if "python_version" in info else {}
    return Machine("cpu", str(device), int(cpu.get("count", 0)), 0, versions=versions, revision=revision)
