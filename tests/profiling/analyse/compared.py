"""Made-up runs to compare, and the command that compares them."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profiling.__main__ import main
from profiling.analyse.verdicts import Comparison
from profiling.results import OK, CaseResult, Machine, Measurement, Run, VariantResult, save

VERSIONS = {"python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0", "flashtalk-triton": "0.1.0"}
MACHINE = Machine("cuda", "NVIDIA H100", 132, 80, "9.0", 50, "580.1", VERSIONS, "1" * 40)


def measured(backend: str, seconds: float, ours: bool = True, seed: int = 0) -> Measurement:
    rng = np.random.default_rng([seed, len(backend), ours])
    return Measurement(backend, OK, ours, samples=tuple((seconds * np.exp(0.005 * rng.standard_normal(20))).tolist()))


def case(name: str, *measurements: Measurement) -> CaseResult:
    return CaseResult(name, *name.split("/"), flops=1e9, bytes=1e6, measurements=measurements)


def run(*cases: CaseResult, machine: Machine = MACHINE, **more: Any) -> Run:
    return Run("bench", "2026-01-01T00:00:00+00:00", machine, cases=cases, **more)


def variant(chunk: float, peak: int = 2**30, status: str = OK) -> VariantResult:
    if status != OK:
        return VariantResult("bf16-eager", status, "OutOfMemoryError")
    chunks = tuple(chunk * f for f in (1.0, 1.01, 0.99, 1.005, 0.995, 1.0))
    stages = {"denoise/step": tuple(c / 8 for c in chunks for _ in range(4)), "decode": tuple(c / 4 for c in chunks)}
    first = tuple(c * 0.6 for c in chunks)
    return VariantResult("bf16-eager", OK, stages=stages, chunk=chunks, first_frame=first, frames=28, peak_bytes=peak)


def later(r: Run, day: int = 2) -> Run:
    """The same run on another day, on which every case takes a ten-thousandth longer for each day."""

    def anew(m: Measurement) -> Measurement:
        return dataclasses.replace(m, samples=tuple((1 + 1e-4 * day) * seconds for seconds in m.samples))

    cases = (dataclasses.replace(c, measurements=tuple(map(anew, c.measurements))) for c in r.cases)
    return dataclasses.replace(r, started=f"2026-01-{day:02}T00:00:00+00:00", cases=tuple(cases))


def verdicts(found: Sequence[Comparison]) -> dict[str, str]:
    return {f"{row.name}: {row.part}": row.change.verdict for row in found}


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "compare", *map(str, arguments)])
    return main()


def files(tmp_path: Path, *runs: Run) -> list[Path]:
    paths = [tmp_path / f"{name}.json" for name, _ in zip("abcdef", runs, strict=False)]
    for path, r in zip(paths, runs, strict=True):
        save(r, path)
    return paths
