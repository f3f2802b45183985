"""Benchmarks the back-ends of cases: checks each against the reference, then times the correct ones.

A back-end that is wrong (`profiling.measure.check`) gets an error instead of a time.

The rounds of a case are spread over several passes through all cases, each with fresh inputs. Slow drift of the machine
and the placement of operands in memory therefore show up as variance within a run.
"""

import gc
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from model.compile import raise_recompile_limit
from model.errors import UserError
from profiling.cases import TORCH_DTYPES, Call, Case, requested_cases
from profiling.cases.linear import prepare_scaled_mm
from profiling.machine import NvmlMonitor, describe_machine, resolve_device
from profiling.measure.check import check_case, one_line, raise_if_gpu_lost
from profiling.measure.hot import HotBench, hot_bench, hot_table
from profiling.measure.sweep import check_plot, parse_sweep, swept_cases, write_plot
from profiling.measure.timing import CallTimer, interleave, num_input_sets
from profiling.results import ERROR, OK, UNSUPPORTED, WRONG, CaseResult, Ceilings, Run, as_json_text, now, save, to_json
from profiling.tables import measurement_csv, measurement_rows, measurement_table, terminal

PASSES = {"cuda": 2, "cpu": 4}  # through all cases; they share the rounds
PLACEMENTS = 2  # sets of inputs per case, where there are no passes


@dataclass(frozen=True)
class CeilingSizes:
    """Sizes of the operations that the machine's ceilings are measured with."""

    copy: int  # bytes that the copy reads
    matmul: int  # rows, columns and depth of the product
    rounds: int


CEILING_SIZES = {"cuda": CeilingSizes(2**31, 8192, 10), "cpu": CeilingSizes(2**27, 1024, 10)}


def measure_ceilings(device: torch.device, dtypes: Iterable[str]) -> Ceilings:
    """Measures what this machine can reach: bandwidth of a large copy, rate of a large matrix product by dtype."""
    sizes = CEILING_SIZES[device.type]
    source = torch.randn(sizes.copy // 4, device=device)
    # In a CUDA graph a copy is a memcpy node, which is a fifth slower than what kernels reach.
    copy = _fastest_seconds(partial(torch.empty_like(source).copy_, source), device, sizes.rounds, capture=False)
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(sizes.matmul, sizes.matmul, device=device, dtype=TORCH_DTYPES[dtype]) for _ in range(2))
        try:
            product = prepare_scaled_mm(a, b, torch.zeros_like(a[0])) if dtype == "fp8" else partial(torch.mm, a, b)
            rates[dtype] = 2 * sizes.matmul**3 / _fastest_seconds(product, device, sizes.rounds)
        except RuntimeError:  # this GPU has no such product, so no such ceiling
            continue
    return Ceilings(2 * sizes.copy / copy, rates, copy_launched=True)


def _fastest_seconds(call: Call, device: torch.device, rounds: int, *, capture: bool = True) -> float:
    """Seconds of the fastest sample: a ceiling is what can be reached, even on a machine that is busy at times."""
    (samples,) = interleave([CallTimer([call], device, capture=capture)], rounds, 0)
    return min(samples)


def set_benchmark_state() -> None:
    """Puts torch into the state that all cases are measured in; called once per process."""
    raise_recompile_limit()
    torch.backends.cudnn.allow_tf32 = False  # float32 is the reference here
    torch.backends.cudnn.benchmark = True  # lets cuDNN choose its fastest algorithm for the peers


def bench_case(
    case: Case,
    device: torch.device,
    rounds: int,
    seed: int,
    only: Sequence[str] | None = None,
    on_backend: Callable[[str], None] = lambda _: None,
) -> CaseResult:
    """Runs `check_case`, then `time_case` on `PLACEMENTS` sets of inputs, which share the rounds."""
    result = check_case(case, device, seed, only, on_backend)
    for i, part in enumerate(split_rounds(rounds, PLACEMENTS)):
        result = time_case(case, result, device, part, seed + i + 1, on_backend)
    return result


def time_case(
    case: Case,
    result: CaseResult,
    device: torch.device,
    rounds: int,
    seed: int,
    on_backend: Callable[[str], None] = lambda _: None,
    hot: HotBench | None = None,
) -> CaseResult:
    """Adds up to `rounds` rounds of the correct back-ends to a result, on fresh inputs made from `seed`.

    A round is one sample of each back-end. With `hot` the samples are those of a hot GPU instead, of one back-end after
    the other, and clock, power and energy are added. `on_backend` and exceptions are as in `check_case`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    found = {m.backend: m for m in result.measurements}
    ready: dict[str, CallTimer] = {}
    with torch.inference_mode():
        sets = input_sets(case, device, generator)
        for backend in case.backends:
            if (m := found.get(backend.name)) is not None and m.status == OK:
                on_backend(m.backend)
                try:
                    ready[m.backend] = CallTimer([backend.prepare(*inputs) for inputs in sets], device)
                    found[m.backend] = replace(m, graph=ready[m.backend].graph)
                except Exception as error:
                    raise_if_gpu_lost(device)
                    found[m.backend] = replace(m, status=ERROR, detail=one_line(error), samples=())
        on_backend("")
        if hot is None:
            for name, samples in zip(ready, interleave([*ready.values()], rounds, seed), strict=True):
                found[name] = replace(found[name], samples=(*found[name].samples, *samples))
        else:
            for name, one in hot.measure(case.name, ready).items():
                found[name] = replace(found[name], samples=one.samples, hot=one.reading)
    del sets, ready
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return replace(result, measurements=tuple(found.values()))


def input_sets(case: Case, device: torch.device, generator: torch.Generator) -> list[tuple[Any, ...]]:
    """Makes enough sets of random inputs that repeated calls cannot find theirs in the cache."""
    first = case.inputs(device, generator)
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, Tensor))
    return [first, *(case.inputs(device, generator) for _ in range(num_input_sets(size, device) - 1))]


def split_rounds(rounds: int, passes: int) -> list[int]:
    """Splits rounds as evenly as possible over at most `passes` passes."""
    passes = min(rounds, passes)
    return [rounds * (i + 1) // passes - rounds * i // passes for i in range(passes)]


def require_known_backends(cases: Sequence[Case], names: Sequence[str]) -> None:
    """Raises `UserError` for a back-end that none of the cases has."""
    known = list(dict.fromkeys(b.name for case in cases for b in case.backends))
    for name in names:
        if name not in known:
            raise UserError(f"--backend {name}: none of these cases has it; they have {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What the command line of `bench` asks for."""

    patterns: Sequence[str] = ()
    device: str = "auto"
    backends: Sequence[str] = ()  # none means all
    rounds: int = 20
    out: Path | None = None
    list_only: bool = False
    sweep: str | None = None
    plot: Path | None = None
    extra: Path | None = None  # file of cases
    hot: bool = False
    profiler: str = ""  # "once", "ncu" or "proton" of `profiling.measure.profilers`; "" measures
    as_json: bool = False
    as_csv: bool = False


def chosen_cases(options: BenchOptions, device: torch.device) -> list[Case]:
    """The cases that the command line asks for, at every size of its sweep."""
    cases = requested_cases(options.patterns, device, options.extra)
    return list(swept_cases(cases, parse_sweep(options.sweep))) if options.sweep is not None else cases


def bench_command(options: BenchOptions) -> int:
    """Implements `python -m profiling bench`; returns 1 if a back-end of ours is wrong or raised."""
    device = resolve_device(options.device)
    cases = chosen_cases(options, device)
    require_known_backends(cases, options.backends)
    if options.rounds < 1:
        raise UserError(f"--rounds {options.rounds}: at least 1 is needed")
    if options.as_json and options.as_csv:
        raise UserError("--json and --csv: both go to standard output; leave one of them out")
    if options.plot is not None:
        check_plot(options.plot, options.sweep)
    if options.list_only:
        return _print_list(cases, options.as_json)
    hot = hot_bench(device) if options.hot else None
    run = _measure(cases, device, options, hot)
    if options.plot is not None and options.sweep is not None:
        write_plot(run, parse_sweep(options.sweep), options.plot)
    if options.as_json:
        print(as_json_text(to_json(run)))
    elif options.as_csv:
        print(measurement_csv(run), end="")
    else:
        terminal().print(measurement_table(measurement_rows(run)))
        if hot is not None:
            terminal().print(hot_table(hot))
        _print_notes(run)
    return int(any(m.ours and m.status in (WRONG, ERROR) for c in run.cases for m in c.measurements))


def _measure(cases: Sequence[Case], device: torch.device, options: BenchOptions, hot: HotBench | None) -> Run:
    """Measures the cases; the results file is written after each of them."""
    started, begin, seed = now(), time.monotonic(), secrets.randbits(31)
    notes = (f"seed {seed}",)
    run = Run("bench --hot" if hot else "bench", started, describe_machine(device), notes=notes)
    if options.out is not None:
        save(run, options.out)  # fails now, not after the work, if the place cannot be written
    console = Console(stderr=True)
    console.print(f"seed {seed}", highlight=False)
    with NvmlMonitor(device) as monitor, console.status("measuring the machine's ceilings") as status:
        set_benchmark_state()
        run = replace(run, ceilings=measure_ceilings(device, {case.dtype for case in cases}))
        results: dict[str, CaseResult] = {}
        for i, share in enumerate(split_rounds(options.rounds, 1 if hot else PASSES[device.type])):
            for case in cases:
                status.update(f"pass {i + 1}, {case.name}")
                try:
                    before = results.get(case.name) or check_case(case, device, seed, options.backends or None)
                    results[case.name] = time_case(case, before, device, share, seed + i + 1, hot=hot)
                except torch.AcceleratorError as error:
                    raise UserError(
                        f"{case.name} left the process without a working GPU ({one_line(error)}); leave it out, or"
                        " use gpu --phase bench, which continues after it"
                    ) from error
                seconds = time.monotonic() - begin
                run = replace(run, cases=tuple(results.values()), nvml=monitor.nvml, seconds=seconds)
                run = replace(run, notes=(*notes, *(hot.notes() if hot else ())))
                if options.out is not None:
                    save(run, options.out)
    return run


def _print_notes(run: Run) -> None:
    """Prints what a reader of the table must know: the ceilings, and whether the GPU was throttled."""
    ceilings, rates = run.ceilings, run.ceilings.matmul_flop_s.items()
    products = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates)
    print(f"{run.machine.device}: copy {(ceilings.copy_bytes_s or 0) / 1e9:.4g} GB/s, products {products}")
    if run.machine.kind == "cpu" and any(m.ours and m.status == UNSUPPORTED for c in run.cases for m in c.measurements):
        print("`bench --interpret` checks Triton kernels without a GPU")
    if run.nvml.throttled:
        reasons = ", ".join(f"{name} {share:.0%} of the time" for name, share in run.nvml.throttled.items())
        print(f"throttled: {reasons}", file=sys.stderr)


def _print_list(cases: Sequence[Case], as_json: bool) -> int:
    names = {case.name: [b.name for b in case.backends] for case in cases}
    if as_json:
        print(as_json_text(names))
    else:
        for name, backends in names.items():
            print(f"{name:<44} {', '.join(backends)}")
    return 0
