"""One back-end of one case under a profiler of kernels: Nsight Compute (ncu), Proton, or any that a user starts.

`bench CASE --backend NAME --once` makes one call between cudaProfilerStart and cudaProfilerStop, after two that compile
and warm up. `--ncu` is the command line of Nsight Compute around that: it profiles the launches of this call and no
others. `--proton` makes calls under Triton's profiler, which learns the case's FLOPs and bytes and so shows TFLOP/s.
"""

import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from model.errors import UserError
from profiling.cases import Backend, Call, Case
from profiling.machine import resolve_device
from profiling.measure.bench import BenchOptions, chosen_cases, require_known_backends, set_benchmark_state

WARM_UP_CALLS = 2
PROTON_CALLS = 20
CUDA = torch.device("cuda")


def profile_command(options: BenchOptions) -> int:
    """Implements `bench --once`, `--ncu` and `--proton`; returns the exit code of the tool that ran."""
    if options.profiler == "once":
        device = resolve_device(options.device)
        case, backend = _one_backend(options, device)
        profile_once(case, backend, device)
        return 0
    case, backend = _one_backend(options, CUDA)
    stem = options.out or Path(f"{case.name.replace('/', '-')}-{backend.name}")
    return (_ncu if options.profiler == "ncu" else _proton)(options, case, backend, stem)


def _one_backend(options: BenchOptions, device: torch.device) -> tuple[Case, Backend]:
    """The only case and back-end that the command line names. Raises `UserError` if there are none or several."""
    flag = f"bench --{options.profiler}"
    cases = chosen_cases(options, device)
    if len(cases) > 1:
        raise UserError(
            f"{flag}: these are {len(cases)} cases, of which {cases[0].name} is the first; name one of them"
        )
    require_known_backends(cases, options.backends)
    able = [b for b in cases[0].backends if device.type in b.devices and b.installed]
    wanted = [b for b in able if not options.backends or b.name in options.backends]
    if len(wanted) != 1:
        names = ", ".join(b.name for b in able) or "none"
        raise UserError(f"{flag}: choose one back-end of {cases[0].name} by --backend; {device.type} has {names}")
    return cases[0], wanted[0]


def profile_once(case: Case, backend: Backend, device: torch.device) -> None:
    """One call of a back-end inside a profiler's range, called after the case and the back-end."""
    call = _warm_call(case, backend, device)
    cuda = device.type == "cuda"
    with torch.inference_mode(), torch.cuda.profiler.profile() if cuda else nullcontext():
        with torch.cuda.nvtx.range(f"{case.name} {backend.name}") if cuda else nullcontext():
            call()
        if cuda:
            torch.cuda.synchronize()


@torch.inference_mode()
def _warm_call(case: Case, backend: Backend, device: torch.device) -> Call:
    set_benchmark_state()
    call = backend.prepare(*case.inputs(device, torch.Generator(device).manual_seed(0)))
    for _ in range(WARM_UP_CALLS):
        call()
    return call


def bench_line(options: BenchOptions, backend: Backend, flag: str) -> list[str]:
    """The command line of `bench` for this back-end alone, with another flag."""
    line = [sys.executable, "-m", "profiling", "bench", *options.patterns, "--backend", backend.name, flag]
    line += ["--sweep", options.sweep] if options.sweep is not None else []
    return [*line, "--cases", str(options.extra)] if options.extra is not None else line


def _ncu(options: BenchOptions, _case: Case, backend: Backend, stem: Path) -> int:
    """Runs Nsight Compute if it is there, else prints the command."""
    command = ["ncu", "--set", "full", "--profile-from-start", "off", "--force-overwrite", "--export", str(stem)]
    command += bench_line(options, backend, "--once")
    if shutil.which("ncu") is None or not torch.cuda.is_available():
        print(shlex.join(command))
        print("not run: it needs ncu and an NVIDIA GPU", file=sys.stderr)
        return 0
    print(shlex.join(command), file=sys.stderr)
    return subprocess.run(command).returncode


def _proton(options: BenchOptions, case: Case, backend: Backend, stem: Path) -> int:
    """Runs Proton if there is a GPU, else prints the command; prints how to look at the result."""
    if torch.cuda.is_available():
        profile_with_proton(case, backend, CUDA, stem)
    else:
        print(shlex.join([*bench_line(options, backend, "--proton"), "--out", str(stem)]))
        print("not run: it needs an NVIDIA GPU", file=sys.stderr)
    print(shlex.join(["proton-viewer", "-m", "tflop/s,time/us", f"{stem}.hatchet"]))
    return 0


def profile_with_proton(case: Case, backend: Backend, device: torch.device, stem: Path) -> None:
    """Writes STEM.hatchet: calls of a back-end, each in a scope that has the case's FLOPs and bytes."""
    from triton import profiler as proton

    call = _warm_call(case, backend, device)
    stem.parent.mkdir(parents=True, exist_ok=True)
    proton.start(str(stem), hook="triton")
    try:
        with torch.inference_mode():
            for _ in range(PROTON_CALLS):
                with proton.scope(f"{case.name} {backend.name}", {"flops": case.flops, "bytes": case.bytes}):
                    call()
    finally:
        proton.finalize()
