"""Correctness first, then time: every back-end of a case against the reference, then against each other.

What is wrong gets an error instead of a time. Right means: every element written (outputs are poisoned with NaN before
ours run), finite, and within the dtype's bound of the reference, computed from the same fresh random inputs in float64
on the CPU, and on a GPU in float32 for matrix products and in float64 for the rest, as relative Frobenius error
||out - ref|| / ||ref||.

A case's rounds are spread over several sweeps through all cases, each on fresh inputs: what the machine's mood of the
minute and the place of the operands in memory do to a time is then within the run, where it can be seen as noise.
"""

import gc
import json
import math
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from model.compiled import keep_all_forms
from model.errors import UserError
from profiling.cases import TORCH_DTYPES, Backend, Call, Case, Output, chosen
from profiling.cases.linear import prepare_scaled_mm
from profiling.machine import Monitor, describe, pick
from profiling.results import (
    ERROR,
    NOT_INSTALLED,
    OK,
    UNSUPPORTED,
    WRONG,
    CaseResult,
    Ceilings,
    Measurement,
    Run,
    now,
    save,
    to_json,
)
from profiling.tables import rows, table, terminal
from profiling.timing import Timed, interleave, set_count

SWEEPS = {"cuda": 2, "cpu": 4}  # over all cases, each with its part of the rounds
PLACEMENTS = 2  # where there are no sweeps


@dataclass(frozen=True)
class Sizes:
    """What the ceilings are measured with."""

    copy: int  # bytes read
    matmul: int  # rows, columns and depth of a product
    rounds: int


CEILINGS = {"cuda": Sizes(2**31, 8192, 10), "cpu": Sizes(2**27, 1024, 10)}


def measure_ceilings(device: torch.device, dtypes: Iterable[str]) -> Ceilings:
    """What this machine reaches now: a copy of one large tensor, and square products of random matrices by dtype."""
    sizes = CEILINGS[device.type]
    source = torch.randn(sizes.copy // 4, device=device)
    copy = _fastest(partial(torch.empty_like(source).copy_, source), device, sizes.rounds)
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(sizes.matmul, sizes.matmul, device=device, dtype=TORCH_DTYPES[dtype]) for _ in range(2))
        try:
            product = prepare_scaled_mm(a, b, torch.zeros_like(a[0])) if dtype == "fp8" else partial(torch.mm, a, b)
            rates[dtype] = 2 * sizes.matmul**3 / _fastest(product, device, sizes.rounds)
        except RuntimeError:  # a GPU without that kind of product has no such ceiling
            continue
    return Ceilings(2 * sizes.copy / copy, rates)


def _fastest(call: Call, device: torch.device, rounds: int) -> float:
    """Seconds of the fastest sample: a ceiling is what can be reached, however busy the machine is now and then."""
    (samples,) = interleave([Timed([call], device)], rounds, 0)
    return min(samples)


def settle() -> None:
    """Puts torch into the state that all cases are measured in; once a process."""
    keep_all_forms()
    torch.backends.cudnn.allow_tf32 = False  # float32 is the reference here
    torch.backends.cudnn.benchmark = True  # a peer's best


def bench_case(
    case: Case,
    device: torch.device,
    rounds: int,
    seed: int,
    only: Sequence[str] | None = None,
    entering: Callable[[str], None] = lambda _: None,
) -> CaseResult:
    """`check_case`, then `time_case` on `PLACEMENTS` sets of inputs, each with its part of the rounds."""
    result = check_case(case, device, seed, only, entering)
    for i, part in enumerate(shares(rounds, PLACEMENTS)):
        result = time_case(case, result, device, part, seed + i + 1, entering)
    return result


def check_case(
    case: Case,
    device: torch.device,
    seed: int,
    only: Sequence[str] | None = None,
    entering: Callable[[str], None] = lambda _: None,
) -> CaseResult:
    """Holds all back-ends of a case, or those named in `only`, to its reference on inputs made from `seed`.

    `entering` is told the back-end that runs next, and "" at the end, for whoever must know what a process died of.
    What a back-end raises becomes its measurement's detail, unless it costs the process its GPU, see `survive`.
    """
    wanted = [backend for backend in case.backends if only is None or backend.name in only]
    with torch.inference_mode():
        try:
            inputs = case.inputs(device, torch.Generator(device).manual_seed(seed))
            expected = reference(case, inputs, device)
        except Exception as raised:  # of the case itself: it costs no other
            survive(device)
            why = f"inputs or reference: {reason(raised)}"
            return case_result(case, tuple(Measurement(b.name, ERROR, b.ours, why) for b in wanted))
        found = []
        for backend in wanted:
            entering(backend.name)
            found.append(_undisturbed(case, backend, inputs, expected, device))
    entering("")
    return case_result(case, tuple(found))


def _undisturbed(
    case: Case, backend: Backend, inputs: tuple[object, ...], expected: Sequence[Tensor], device: torch.device
) -> Measurement:
    """`check`; a back-end that changes its inputs, which the next ones get too, is wrong, and is made good."""
    before = [(x, x.clone()) for x in inputs if isinstance(x, Tensor)]
    measurement = check(case, backend, inputs, expected, device)
    changed = [(x, was) for x, was in before if not torch.equal(x, was)]
    for x, was in changed:
        x.copy_(was)
    return replace(measurement, status=WRONG, detail="changes its inputs") if changed else measurement


def reference(case: Case, inputs: tuple[object, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The expected outputs, in a precision far above that of the case, by library routines that take no short cuts."""
    wide = device.type == "cpu" or not case.operation.products
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        return flat(case.expected(inputs, torch.float64 if wide else torch.float32))


def input_sets(case: Case, device: torch.device, generator: torch.Generator) -> list[tuple[Any, ...]]:
    """As many sets of random inputs as calls must take turns over."""
    first = case.inputs(device, generator)
    size = sum(x.numel() * x.element_size() for x in first if isinstance(x, Tensor))
    return [first, *(case.inputs(device, generator) for _ in range(set_count(size, device) - 1))]


def survive(device: torch.device) -> None:
    """After something raised: raises RuntimeError if it has left the process without a working GPU.

    Whatever ran next would get the blame.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def time_case(
    case: Case,
    result: CaseResult,
    device: torch.device,
    rounds: int,
    seed: int,
    entering: Callable[[str], None] = lambda _: None,
) -> CaseResult:
    """The result with so many more rounds of those back-ends that are right, on fresh inputs made from `seed`.

    A round is one sample of each back-end. `entering` and what is raised are as in `check_case`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    found = {m.backend: m for m in result.measurements}
    ready: dict[str, Timed] = {}
    with torch.inference_mode():
        sets = input_sets(case, device, generator)
        for backend in case.backends:
            if (m := found.get(backend.name)) is not None and m.status == OK:
                entering(m.backend)
                try:
                    ready[m.backend] = Timed([backend.prepare(*inputs) for inputs in sets], device)
                    found[m.backend] = replace(m, graph=ready[m.backend].graph)
                except Exception as error:
                    survive(device)
                    found[m.backend] = replace(m, status=ERROR, detail=reason(error), samples=())
        entering("")
        for name, samples in zip(ready, interleave([*ready.values()], rounds, seed), strict=True):
            found[name] = replace(found[name], samples=(*found[name].samples, *samples))
    del sets, ready
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return replace(result, measurements=tuple(found.values()))


def case_result(case: Case, measurements: tuple[Measurement, ...]) -> CaseResult:
    """What a results file says of a case."""
    shape = case.shape
    return CaseResult(
        case.name,
        case.operation.name,
        shape.name,
        case.dtype,
        case.flops,
        case.bytes,
        shape.world,
        shape.calls,
        case.operation.products,
        dict(shape.dims),
        measurements,
    )


def check(
    case: Case, backend: Backend, inputs: tuple[object, ...], expected: Sequence[Tensor], device: torch.device
) -> Measurement:
    """Holds a back-end to the expected output of these inputs."""
    blank = Measurement(backend.name, OK, backend.ours)
    if device.type not in backend.devices:
        return replace(blank, status=UNSUPPORTED, detail=f"not for {device.type}")
    if not backend.installed:
        return replace(blank, status=NOT_INSTALLED, detail=f"{backend.needs} cannot be imported")
    try:
        begin = time.perf_counter()
        call = backend.prepare(*inputs)
        with poisoned_memory() if backend.ours else nullcontext():
            got = flat(case.operation.result(call()))
        if device.type == "cuda":
            torch.cuda.synchronize()
        blank = replace(blank, first_call=time.perf_counter() - begin)
        error, fault = judge(got, expected, case.tolerance)
        if backend.ours and not fault:  # once more: with poison torch may choose other algorithms than are timed
            again, fault = judge(flat(case.operation.result(call())), expected, case.tolerance)
            error = max(error or 0.0, again or 0.0)
    except Exception as raised:
        survive(device)
        return replace(blank, status=ERROR, detail=reason(raised))
    return replace(blank, status=WRONG if fault else OK, detail=fault, error=error)


def judge(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> tuple[float | None, str]:
    """The relative Frobenius error, the largest of all outputs, and in words what is wrong with it, if anything."""
    if [x.shape for x in got] != [x.shape for x in expected]:
        return None, f"shapes {[list(x.shape) for x in got]}, wanted {[list(x.shape) for x in expected]}"
    errors = []
    for x, want in zip(got, expected, strict=True):
        if bad := int((~x.isfinite()).sum()):
            return None, f"{bad} of {x.numel()} elements are NaN or infinite"
        errors.append(float((x.to(want.dtype) - want).norm() / want.norm()))
    worst = max(errors, key=lambda error: (math.isnan(error), error))
    return worst, "" if worst <= tolerance else f"relative error {worst:.1e}, allowed {tolerance:.0e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """While the body runs, torch hands out new tensors full of NaN, so that what is not written is seen."""
    switch: Any = torch.utils.deterministic
    fill, before = switch.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operations that are not deterministic, which is not asked for here
            torch.use_deterministic_algorithms(True, warn_only=True)  # without it nothing is filled
            switch.fill_uninitialized_memory = True
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        switch.fill_uninitialized_memory = fill


def flat(output: Output) -> tuple[Tensor, ...]:
    """An operation's outputs, however many."""
    return output if isinstance(output, tuple) else (output,)


def reason(error: BaseException) -> str:
    """An error in one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def shares(rounds: int, sweeps: int) -> list[int]:
    """So many rounds on at most so many sweeps, as evenly as can be."""
    sweeps = min(rounds, sweeps)
    return [rounds * (i + 1) // sweeps - rounds * i // sweeps for i in range(sweeps)]


def known_backends(cases: Sequence[Case], names: Sequence[str]) -> None:
    """Raises `UserError` for a back-end that none of the cases has."""
    known = list(dict.fromkeys(b.name for case in cases for b in case.backends))
    for name in names:
        if name not in known:
            raise UserError(f"--backend {name}: none of these cases has it; they have {', '.join(known)}")


def command(
    patterns: list[str],
    device_name: str,
    backends: list[str],
    rounds: int,
    out: Path | None,
    list_: bool,
    extra: Path | None,
    as_json: bool,
) -> int:
    """`python -m profiling bench`; 1 if a back-end of ours is wrong or raised."""
    device = pick(device_name)
    cases = chosen(patterns, device, extra)
    known_backends(cases, backends)
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: at least 1 is needed")
    if list_:
        return _list(cases, as_json)
    started, begin, seed = now(), time.monotonic(), secrets.randbits(31)
    run = Run("bench", started, describe(device), notes=(f"seed {seed}",))
    if out is not None:
        save(run, out)  # a place that cannot be written is said now, not after the work
    console = Console(stderr=True)
    console.print(f"seed {seed}", highlight=False)
    with Monitor(device) as monitor, console.status("measuring the machine's ceilings") as status:
        settle()
        run = replace(run, ceilings=measure_ceilings(device, {case.dtype for case in cases}))
        results: dict[str, CaseResult] = {}
        for sweep, share in enumerate(shares(rounds, SWEEPS[device.type])):
            for case in cases:
                status.update(f"sweep {sweep + 1}, {case.name}")
                try:
                    before = results.get(case.name) or check_case(case, device, seed, backends or None)
                    results[case.name] = time_case(case, before, device, share, seed + sweep + 1)
                except torch.AcceleratorError as error:
                    raise UserError(
                        f"{case.name} has cost the process its GPU ({reason(error)}); leave it out, or use"
                        " gpu --phase bench, which goes on behind it"
                    ) from error
                seconds = time.monotonic() - begin
                run = replace(run, cases=tuple(results.values()), nvml=monitor.nvml, seconds=seconds)
                if out is not None:
                    save(run, out)
    if as_json:
        print(json.dumps(to_json(run), indent=1))
    else:
        terminal().print(table(rows(run)))
        _remark(run)
    return int(any(m.ours and m.status in (WRONG, ERROR) for c in run.cases for m in c.measurements))


def _remark(run: Run) -> None:
    """What a reader of the table must know: the ceilings, and whether the machine held back."""
    ceilings, rates = run.ceilings, run.ceilings.matmul_flop_s.items()
    products = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates)
    print(f"{run.machine.device}: copy {(ceilings.copy_bytes_s or 0) / 1e9:.4g} GB/s, products {products}")
    if above := sum((row.ceiling or 0) > 1.1 for row in rows(run)):
        print(f"{above} results pass their ceiling: their operands stay in a cache, or other programs disturbed it")
    if run.nvml.throttled:
        reasons = ", ".join(f"{name} {share:.0%} of the time" for name, share in run.nvml.throttled.items())
        print(f"throttled: {reasons}", file=sys.stderr)


def _list(cases: Sequence[Case], as_json: bool) -> int:
    names = {case.name: [b.name for b in case.backends] for case in cases}
    if as_json:
        print(json.dumps(names, indent=1))
    else:
        for name, backends in names.items():
            print(f"{name:<44} {', '.join(backends)}")
    return 0
