"""Made-up results on a GPU whose tables nobody has measured, with round times."""

from collections.abc import Mapping
from typing import Any

from profiling.results import OK, CaseResult, Ceilings, Machine, Measurement, Run, VariantResult

GPU = Machine("cuda", "NVIDIA B200", 148, 180, "10.0")
CEILINGS = Ceilings(4e12, {"bf16": 1e15, "fp8": 2e15, "fp32": 5e13}, copy_launched=True)


def case(name: str, dims: Mapping[str, int], seconds: float, backend: str = "triton") -> CaseResult:
    """A case that a back-end of ours computes in that time, and a peer in half of it."""
    times = Measurement(backend, OK, ours=True, samples=(seconds,)), Measurement("peer", OK, samples=(seconds / 2,))
    return CaseResult(name, *name.split("/"), flops=1.0, bytes=1.0, dims=dict(dims), measurements=times)


def run(*cases: CaseResult, started: str = "2026-02-01", **more: Any) -> Run:
    """A run of `bench` with these cases."""
    about = {"command": "bench", "machine": GPU, "ceilings": CEILINGS} | more
    return Run(started=started, cases=cases, **about)


def chunk(name: str = "fp8", seconds: float = 2.0, **stages: tuple[float, ...]) -> VariantResult:
    """A chunk with the seconds of each call of its stages; in a name, `_` is a slash."""
    named = {stage.replace("_", "/"): calls for stage, calls in stages.items()}
    return VariantResult(name, OK, stages=named, chunk=(seconds,), first_frame=(1.5,), frames=28)
