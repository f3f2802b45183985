"""Checks Triton kernels on a CPU, in Triton's interpreter: are they right? Nothing is timed.

Triton decides when a kernel is defined whether it will compile or interpret it. `TRITON_INTERPRET=1` must therefore be
in the environment before any module with kernels is imported; `python -m profiling bench --interpret` sees to that.
"""

import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from triton.runtime.interpreter import InterpretedFunction

from model.errors import UserError
from profiling.cases import TOLERANCES, Case
from profiling.machine import describe_machine
from profiling.measure.bench import BenchOptions, chosen_cases, require_known_backends
from profiling.measure.check import check_case
from profiling.results import (
    ERROR,
    NOT_INSTALLED,
    OK,
    UNSUPPORTED,
    WRONG,
    CaseResult,
    Measurement,
    Run,
    as_json_text,
    now,
    to_json,
)
from profiling.tables import terminal

CPU = torch.device("cpu")
STATUS_COLOURS = {WRONG: "red", ERROR: "red", UNSUPPORTED: "yellow", NOT_INSTALLED: "yellow"}


def interpreted_case(case: Case) -> Case:
    """The case with its kernels alone, on CPU tensors, and in float32 in place of bfloat16.

    A kernel is a back-end that has a launcher in some dtype. Triton 3.6 interprets products of bfloat16 wrongly.
    """
    operation = case.operation
    kernels = {b.name for backends in operation.backends.values() for b in backends if b.launcher is not None}
    backends = tuple(replace(b, devices=("cuda",) if b.gluon else ("cpu",)) for b in case.backends if b.name in kernels)
    dtype = "fp32" if case.dtype == "bf16" else case.dtype
    tolerance = operation.tolerances.get(dtype, TOLERANCES[dtype])
    return Case(replace(operation, backends={dtype: backends}), case.shape, dtype, tolerance)


@contextmanager
def interpreted_launches(on_launch: Callable[[], None]) -> Iterator[None]:
    """While the body runs, `on_launch` is called whenever Triton's interpreter runs a kernel."""
    run = InterpretedFunction.run

    def recorded(self: InterpretedFunction[Any], *args: Any, **kwargs: Any) -> Any:
        on_launch()
        return run(self, *args, **kwargs)

    InterpretedFunction.run = recorded
    try:
        yield
    finally:
        InterpretedFunction.run = run


def check_interpreted(case: Case, seed: int, only: Sequence[str] | None = None) -> CaseResult:
    """Checks the kernels of a case that `interpreted_case` made. What interprets no kernel is unsupported.

    Gluon has no interpreter, and some back-ends compute a CPU's tensors by their reference. The result has no times.
    """
    launches: Counter[str] = Counter()
    name = ""

    def begin(backend: str) -> None:
        nonlocal name
        name = backend

    with interpreted_launches(lambda: launches.update([name])):
        result = check_case(case, CPU, seed, only, begin)
    return replace(result, measurements=tuple(_without_times(m, launches[m.backend]) for m in result.measurements))


def _without_times(measurement: Measurement, launches: int) -> Measurement:
    if measurement.status != ERROR and not launches:
        return Measurement(measurement.backend, UNSUPPORTED, measurement.ours, "no kernel that can be interpreted")
    return replace(measurement, first_call=None)


def interpret_command(options: BenchOptions) -> int:
    """Implements `python -m profiling bench --interpret`; returns 1 if a kernel of ours is wrong or raised."""
    if options.device == "cuda":
        raise UserError("bench --interpret runs on the CPU: leave out --device cuda")
    if options.out or options.plot or options.as_csv:
        raise UserError("bench --interpret measures nothing: leave out --out, --plot and --csv")
    seed = secrets.randbits(31)
    requested = chosen_cases(options, CPU)
    cases = {c.name: c for case in requested if (c := interpreted_case(case)).backends}
    if not cases:
        raise UserError("bench --interpret: none of these cases has a back-end with a launcher, so no kernel to check")
    require_known_backends([*cases.values()], options.backends)
    console = Console(stderr=True)
    console.print(f"seed {seed}", highlight=False)
    results = []
    with console.status("") as status:
        for case in cases.values():
            status.update(f"interpreting {case.name}")
            results.append(check_interpreted(case, seed, options.backends or None))
    run = Run("bench --interpret", now(), describe_machine(CPU), cases=tuple(results), notes=(f"seed {seed}",))
    if options.as_json:
        print(as_json_text(to_json(run)))
    else:
        terminal().print(_table(run.cases, cases))
    return int(any(m.ours and m.status in (WRONG, ERROR) for c in run.cases for m in c.measurements))


def _table(results: Sequence[CaseResult], cases: Mapping[str, Case]) -> Table:
    """Each case's name, then its kernels below it: right or what is wrong, and how far from the reference."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("case, kernel", overflow="fold")
    out.add_column("verdict", overflow="fold")
    for heading in ("relative error", "allowed"):
        out.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        out.add_section()
        out.add_row(escape(result.case))
        for m in result.measurements:
            verdict = "right" if m.status == OK else f"[{STATUS_COLOURS[m.status]}]{m.status}[/]: {escape(m.detail)}"
            error = f"{m.error:.1e}" if m.error is not None else ""
            out.add_row(f"  {escape(m.backend)}", verdict, error, f"{cases[result.case].tolerance:.0e}")
    return out
