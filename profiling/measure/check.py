"""Checks back-ends: holds each output to the reference, on fresh random inputs.

An output is correct if every element is written, all elements are finite, and the relative Frobenius error
||out - ref|| / ||ref|| is within the case's tolerance. Unwritten elements are found because memory is filled with NaN
before a back-end of ours runs. The reference is computed from the same inputs: on a CPU in float64, on a GPU in float32
for matrix products and in float64 for everything else.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.tuning import gpu_of
from profiling.cases import Backend, Case, Output
from profiling.results import ERROR, NOT_INSTALLED, OK, UNSUPPORTED, WRONG, CaseResult, Measurement


def check_case(
    case: Case,
    device: torch.device,
    seed: int,
    only: Sequence[str] | None = None,
    on_backend: Callable[[str], None] = lambda _: None,
) -> CaseResult:
    """Checks all back-ends of a case, or those named in `only`, on inputs made from `seed`.

    `on_backend` is called with the name of the back-end that runs next, and with "" at the end, so that a supervisor
    knows what a process died of. An exception in a back-end becomes the detail of its measurement, unless it leaves the
    process without a working GPU (`raise_if_gpu_lost`).
    """
    wanted = [backend for backend in case.backends if only is None or backend.name in only]
    with torch.inference_mode():
        try:
            inputs = case.inputs(device, torch.Generator(device).manual_seed(seed))
            expected = reference_outputs(case, inputs, device)
        except Exception as raised:  # the case itself is broken; others go on
            raise_if_gpu_lost(device)
            why = f"inputs or reference: {one_line(raised)}"
            return case.result(tuple(Measurement(b.name, ERROR, b.ours, why) for b in wanted))
        found = []
        for backend in wanted:
            on_backend(backend.name)
            found.append(_check_preserving_inputs(case, backend, inputs, expected, device))
    on_backend("")
    return case.result(tuple(found))


def _check_preserving_inputs(
    case: Case, backend: Backend, inputs: tuple[object, ...], expected: Sequence[Tensor], device: torch.device
) -> Measurement:
    """`check_backend`; a back-end that changes its inputs is wrong, and they are restored."""
    before = [(x, x.clone()) for x in inputs if isinstance(x, Tensor)]
    measurement = check_backend(case, backend, inputs, expected, device)
    changed = [(x, was) for x, was in before if not torch.equal(x, was)]
    for x, was in changed:
        x.copy_(was)
    return replace(measurement, status=WRONG, detail="changes its inputs") if changed else measurement


def reference_outputs(case: Case, inputs: tuple[object, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The expected outputs, from library routines in a precision far above the case's dtype."""
    wide = device.type == "cpu" or not case.operation.is_matmul
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        return as_tuple(case.expected(inputs, torch.float64 if wide else torch.float32))


def raise_if_gpu_lost(device: torch.device) -> None:
    """Called after an exception: raises RuntimeError if the process no longer has a working GPU.

    Otherwise the back-end that runs next would be blamed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def check_backend(
    case: Case, backend: Backend, inputs: tuple[object, ...], expected: Sequence[Tensor], device: torch.device
) -> Measurement:
    """Checks one back-end against the expected outputs of these inputs."""
    blank = Measurement(backend.name, OK, backend.ours)
    if why := case.lacks(backend, device.type, capability_of(device)):
        return replace(blank, status=UNSUPPORTED, detail=why)
    if not backend.installed:
        return replace(blank, status=NOT_INSTALLED, detail=f"{backend.needs} cannot be imported")
    try:
        begin = time.perf_counter()
        call = backend.prepare(*inputs)
        with poisoned_memory() if backend.ours else nullcontext():
            got = as_tuple(case.operation.result(call()))
        if device.type == "cuda":
            torch.cuda.synchronize()
        blank = replace(blank, first_call=time.perf_counter() - begin)
        error, fault = compare_outputs(got, expected, case.tolerance)
        if backend.ours and not fault:  # again without poison: torch may choose other algorithms then
            again, fault = compare_outputs(as_tuple(case.operation.result(call())), expected, case.tolerance)
            error = max(error or 0.0, again or 0.0)
    except Exception as raised:
        raise_if_gpu_lost(device)
        return replace(blank, status=ERROR, detail=one_line(raised))
    return replace(blank, status=WRONG if fault else OK, detail=fault, error=error)


def capability_of(device: torch.device) -> str | None:
    """The compute capability of a GPU, such as "9.0"; None of a CPU."""
    return gpu_of(device).capability if device.type == "cuda" else None


def compare_outputs(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> tuple[float | None, str]:
    """The largest relative Frobenius error of all outputs, and a description of what is wrong, if anything."""
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
    """While the body runs, torch fills new tensors with NaN, so that unwritten elements show up."""
    switch: Any = torch.utils.deterministic
    fill, before = switch.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nondeterministic operations are fine here
            torch.use_deterministic_algorithms(True, warn_only=True)  # without it nothing is filled
            switch.fill_uninitialized_memory = True
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        switch.fill_uninitialized_memory = fill


def as_tuple(output: Output) -> tuple[Tensor, ...]:
    """An operation's outputs as a tuple, even if there is only one."""
    return output if isinstance(output, tuple) else (output,)


def one_line(error: BaseException) -> str:
    """The error's type and message in one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]
