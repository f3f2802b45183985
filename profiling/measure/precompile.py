"""Compiles kernels in parallel on all CPU cores; Triton's disk cache keeps them for later processes.

Triton takes seconds per kernel, GPU time is short, and a benchmark compiles its kernels one after the other. Launches
are recorded on tensors without memory, as in the audit: of the GPU, only its name, capability and size are used.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from kernels.tuning import GPU, LaunchConfig, gpu_of
from model.errors import UserError
from profiling.cases import Case, registry, requested_cases
from profiling.fake_gpu import compiling_for
from profiling.machine import resolve_device

CUDA = torch.device("cuda")


@dataclass(frozen=True)
class CompileJob:
    """One launch to compile: a back-end of a case, as it is tuned or with the given launch parameters."""

    case: str
    backend: str
    config: tuple[tuple[str, int], ...] = ()


def compile_jobs(cases: Sequence[Case], whole_space: bool) -> Iterator[CompileJob]:
    """The jobs for what the cases launch and, with `whole_configs`, for everything that tuning would try."""
    for case in cases:
        for backend in case.backends:
            if backend.launcher is not None:
                yield CompileJob(case.name, backend.name)
                space = backend.configs(case.shape.dims) if whole_space and backend.configs else ()
                yield from (CompileJob(case.name, backend.name, tuple(config.items())) for config in space)


@cache
def _cases(extra: Path | None) -> dict[str, Case]:
    return registry(extra)


def compile_job(job: CompileJob, target: GPU, extra: Path | None) -> str:
    """Compiles one job; returns an error message, or "" if it went well. Tuning reports errors itself."""
    case = _cases(extra)[job.case]
    launcher = next(backend.launcher for backend in case.backends if backend.name == job.backend)
    assert launcher is not None
    config: dict[str, LaunchConfig] = {"config": dict(job.config)} if job.config else {}
    with compiling_for(target):
        try:
            launcher(*case.inputs(CUDA, None), **config)
        except Exception as error:
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1]}"
    return ""


def compile_all(todo: Sequence[CompileJob], target: GPU, extra: Path | None, seconds: float) -> tuple[int, list[str]]:
    """Compiles as many jobs as the time allows; returns how many finished, and the error messages."""
    deadline, done, failures = time.monotonic() + seconds, 0, []
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(compile_job, job, target, extra): job for job in todo}
        for future in as_completed(futures, timeout=max(0.0, deadline - time.monotonic())):
            done += 1
            if one_line := future.result():
                failures.append(f"{futures[future].case} {futures[future].backend}: {one_line}")
    except TimeoutError:
        for process in list((pool._processes or {}).values()):  # a compiler ignores cancellation
            process.kill()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return done, failures


def warm_command(patterns: Sequence[str], whole_space: bool, budget: float, extra: Path | None) -> int:
    """Implements `python -m profiling warm`; returns 1 if a kernel did not compile."""
    device = resolve_device("auto")
    if device.type != "cuda":
        raise UserError("warm: there is no GPU to compile for; `audit` compiles without one")
    todo, begin = list(compile_jobs(requested_cases(patterns, device, extra), whole_space)), time.monotonic()
    done, failures = compile_all(todo, gpu_of(device), extra, budget)
    for line in failures:
        print(line, file=sys.stderr)
    seconds = time.monotonic() - begin
    print(f"compiled {done - len(failures)} of {len(todo)} kernels in {seconds:.0f} s, {len(failures)} failed")
    return 1 if failures else 0
