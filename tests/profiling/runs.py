"""Synthetic runs that look like a GPU's: real case names, FLOPs and bytes, times by a seeded guess. None is true."""

import dataclasses
import fnmatch
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

import numpy as np

from profiling.analyse.trees import Source, Tree
from profiling.analyse.verdicts import Comparison, compare_trees, join
from profiling.cases import Case, registry
from profiling.results import (
    ERROR,
    NOT_INSTALLED,
    OK,
    WRONG,
    AuditResult,
    CaseResult,
    Ceilings,
    Machine,
    Measurement,
    NvmlTrace,
    Quality,
    Run,
    StageInterval,
    VariantResult,
)
from profiling.soak import SERVER_COUNTS, Latency, Soak, Spread, Visit

GPU = Machine(
    "cuda",
    "NVIDIA H100 80GB HBM3",
    132,
    85_017_624_576,
    "9.0",
    52_428_800,
    "570.86.15",
    {"python": "3.12.3", "torch": "2.11.0+cu130", "triton": "3.6.0", "cuda": "13.0", "cudnn": "91900"},
    "ae6bec9d0c0ffee1234567890abcdef123456789",
)
CPU = Machine("cpu", "AMD EPYC 9B14", 2, 8_000_000_000, versions={"python": "3.11.9", "torch": "2.13.0+cpu"})
CEILINGS = Ceilings(2.86e12, {"fp32": 4.9e13, "bf16": 6.9e14, "fp8": 1.27e15})
CPU_CEILINGS = Ceilings(2.1e10, {"fp32": 1.2e11, "fp8": 2.4e10})
LAUNCH = 4e-6  # seconds that any call takes at least
SOME = ("chunk_attention/14b-w1/*", "rms_norm_rope/14b-w1/*", "lab_transfer/14b-w1/*")
HOSTILE = "<script>alert('x')</script> & \"y\" {{ 7 * 7 }} $\\frac$ [red]z[/]"
TINY_CASE = CaseResult(
    "op/shape/bf16",
    "op",
    "shape",
    "bf16",
    flops=4e12,
    bytes=2e9,
    calls=10,
    measurements=(
        Measurement("ours", OK, True, error=1e-3, samples=(0.010, 0.011, 0.010, 0.009, 0.010)),
        Measurement("fast", OK, samples=(0.008,)),
        Measurement("slow", OK, samples=(0.020,)),
        Measurement("bad", WRONG, detail="relative error 1", error=1.0),
    ),
)
TINY_RUN = Run("bench", "2026-01-01T00:00:00+00:00", GPU, ceilings=Ceilings(1e12, {"bf16": 1e15}), cases=(TINY_CASE,))

# Share of the ceiling by back-end; where an operation is named, it goes before.
_EFFICIENCY = {
    "eager": 0.45,
    "compiled": 0.78,
    "torch-compiled": 0.78,
    "chunk_attention gluon": 0.71,
    "chunk_attention triton": 0.52,
    "chunk_attention sdpa-cudnn": 0.74,
    "chunk_attention sdpa-flash": 0.52,
    "chunk_attention sdpa-efficient": 0.34,
    "linear eager": 0.93,
    "norm_linear eager": 0.82,
    "causal_conv3d eager": 0.47,
    "conv3d-channels-last": 0.41,
    "conv3d-official": 0.19,
    "scaled-mm-row": 0.72,
    "bf16-compiled": 0.46,
    "lab_transfer eager": 0.06,
    "lab_transfer compiled": 0.42,
}


def samples(rng: np.random.Generator, median: float, rounds: int, noise: float = 0.008) -> tuple[float, ...]:
    """Seconds a call whose logarithm is normal, with a slow one now and then, as timings are."""
    values = median * np.exp(noise * rng.standard_normal(rounds))
    values[rng.random(rounds) < 0.04] *= 1.1
    return tuple(values.tolist())


def measure(
    rng: np.random.Generator, case: Case, machine: Machine, ceilings: Ceilings, rounds: int, slower: float
) -> CaseResult:
    """All back-ends of a case: timed, or not installed where they need a module. `slower` multiplies our times."""
    result = CaseResult(
        case=case.name,
        operation=case.operation.name,
        shape=case.shape.name,
        dtype=case.dtype,
        flops=case.flops,
        bytes=case.bytes,
        world=case.shape.world,
        calls=case.shape.calls,
        is_matmul=case.operation.is_matmul,
        dims=dict(case.shape.dims),
    )
    bound = result.bound(ceilings)
    least = bound[1] if bound else 1e-3
    measurements = []
    for backend in case.backends:
        if machine.kind not in backend.devices:
            continue
        if backend.needs:
            detail = f"No module named '{backend.needs}'"
            measurements.append(Measurement(backend.name, NOT_INSTALLED, backend.ours, detail))
            continue
        name = case.operation.name
        share = _EFFICIENCY.get(f"{name} {backend.name}", _EFFICIENCY.get(backend.name, 0.5))
        share *= 0.9 + 0.15 * zlib.crc32(f"{case.name} {backend.name}".encode()) / 2**32  # the same in every run
        seconds = (least / share + LAUNCH) * (slower if backend.ours else 1)
        measurements.append(
            Measurement(
                backend.name,
                OK,
                backend.ours,
                error=case.tolerance * rng.uniform(0.2, 0.7),
                samples=samples(rng, seconds, rounds),
                first_call=seconds + rng.uniform(0.05, 4),
                graph=machine.kind == "cuda",
            )
        )
    return dataclasses.replace(result, measurements=tuple(measurements))


def spoil(result: CaseResult, backend: str, status: str, detail: str) -> CaseResult:
    """The result with that back-end wrong, or failed: no times, a reason."""
    spoilt = Measurement(backend, status, detail=detail, error=0.31 if status == WRONG else None)
    changed = tuple(
        dataclasses.replace(spoilt, ours=m.ours) if m.backend == backend else m for m in result.measurements
    )
    return dataclasses.replace(result, measurements=changed)


TIMELINE = (
    StageInterval("denoise/step", 0, 0.0, 2.0),
    StageInterval("decode", 1, 0.5, 0.75),
    StageInterval("decode", 0, 2.0, 2.3),
    StageInterval("motion", 0, 2.3, 2.4),
)


def variants(rng: np.random.Generator, chunks: int = 3) -> tuple[VariantResult, ...]:
    """Five ways to run a chunk of 28 new frames, the official one first, each faster than the last but for two."""

    def variant(name: str, audio: float, step: float, decode: float, motion: float, peak: float) -> VariantResult:
        calls = {
            "audio": (1, audio),
            "denoise/step": (4, step),
            "decode": (9, decode),
            "color": (8, 0.0021),
            "motion": (1, motion),
            "emit": (8, 0.0011),
        }
        stages = {span: samples(rng, seconds, n * chunks, 0.004) for span, (n, seconds) in calls.items()}
        whole = [
            sum(sum(stages[span][n * i : n * (i + 1)]) for span, (n, _) in calls.items()) * 1.012 for i in range(chunks)
        ]
        first = [seconds - 8 * (decode + 0.0032) - motion for seconds in whole]
        return VariantResult(
            name,
            OK,
            stages=stages,
            chunk=tuple(whole),
            first_frame=tuple(first),
            frames=28,
            first_call=whole[0] * 1.4,
            peak_bytes=int(peak * 1e9),
            weights_bytes=int(peak * 0.8e9),
            gaps=0.012 / 1.012,
        )

    return (
        variant("bf16-eager", 0.061, 0.985, 0.066, 0.31, 52.3),
        variant("bf16-compiled", 0.048, 0.861, 0.055, 0.27, 51.8),
        variant("bf16-kernels", 0.044, 0.803, 0.037, 0.18, 49.0),
        VariantResult("fp8-eager", ERROR, "OutOfMemoryError: tried to allocate 2.11 GiB", frames=28),
        dataclasses.replace(variant("fp8-kernels", 0.041, 0.498, 0.034, 0.17, 33.1), timeline=TIMELINE),
    )


def audit() -> tuple[AuditResult, ...]:
    """Three kernels: one that fits its budget, one that spills, one that does not compile."""
    fine = AuditResult(
        case="chunk_attention/14b-w1/bf16",
        kernel="attention_kernel",
        target="sm_90",
        grid=(248, 40),
        warps=8,
        stages=2,
        registers=212,
        shared=163_968,
        occupancy=0.125,
        blocks=1,
        instructions={"HGMMA": 48, "MUFU.EX2": 66, "FADD": 130, "FFMA": 152},
        tile={
            "flops_bf16": 8.4e6,
            "tensor_cycles": 2048.0,
            "mufu_cycles": 1024.0,
            "fp32_cycles": 512.0,
            "l2_cycles": 640.0,
        },
        bounds={"tensor": 0.0147, "mufu": 0.0096, "hbm": 0.0002, "l2": 0.0051},
        tflops=671.0,
    )
    spilling = dataclasses.replace(
        fine,
        case="chunk_attention/14b-w1/fp8",
        registers=255,
        spills=312,
        local=344,
        instructions={"QGMMA": 24, "MUFU.EX2": 66, "FADD": 134},
        bounds={"tensor": 0.0081, "mufu": 0.0097},
        tflops=980.0,
        warnings=("Potential Performance Loss: wgmma.mma_async instructions are serialized",),
        faults=("spills 312 bytes, budget 0",),
    )
    broken = AuditResult(
        "quantize_rows/14b-w1-wide/fp8",
        "quantize_rows_kernel",
        "sm_90",
        faults=("did not compile: CompilationError at line 12: 'x' is not defined",),
    )
    return fine, spilling, broken


def nvml_trace(rng: np.random.Generator, seconds: float = 420.0, throttled: bool = True) -> NvmlTrace:
    """Two readings a second of a GPU that idles, works hard, and reaches its power limit in between."""
    t = np.arange(0, seconds, 0.5)
    busy = np.clip((t - 15) / 10, 0, 1) * np.where((t % 60) > 52, 0.35, 1.0)
    watts = 90 + 600 * busy + 12 * rng.standard_normal(len(t))
    limited = (t > 180) & (t < 260) & (busy > 0.9) if throttled else np.zeros(len(t), bool)
    watts = np.where(limited, 698 + 2 * rng.standard_normal(len(t)), np.minimum(watts, 700))
    sm = np.where(busy > 0.05, 1980 - 60 * busy, 345) - np.where(limited, 300, 0) + 8 * rng.standard_normal(len(t))
    warm = 34 + 33 * (1 - np.exp(-t / 70)) * (0.3 + 0.7 * busy.mean())
    used = np.where(t < 30, 2e9, np.where((t % 140) > 90, 52.3e9, 33.1e9))
    share = float(limited.mean())
    return NvmlTrace(
        tuple(t.tolist()),
        tuple(sm.round().tolist()),
        tuple(np.full(len(t), 2619.0).tolist()),
        tuple(watts.round(1).tolist()),
        tuple(warm.round().tolist()),
        tuple(used.tolist()),
        {"power cap": share} if share else {},
        700.0,
    )


def run(
    seed: int = 0,
    patterns: Sequence[str] = ("*/14b-w1*",),
    machine: Machine = GPU,
    ceilings: Ceilings | None = None,
    rounds: int = 20,
    slower: Mapping[str, float] | None = None,
    days: int = 0,
    spoilt: bool = True,
    throttled: bool = True,
) -> Run:
    """A whole run: cases with peers, variants, audit, NVML readings; on the CPU, cases alone.

    Args:
        seed: of all noise.
        patterns: shell patterns of the cases in it.
        machine: `GPU` or `CPU`.
        ceilings: those of the machine by default.
        rounds: samples of each back-end.
        slower: case name -> factor on the seconds of our back-ends.
        days: how long after the first of January 2026 it began.
        spoilt: whether one back-end is wrong and one fails.
        throttled: whether the GPU reached its power limit.
    """
    rng = np.random.default_rng(seed)  # of cases alone, so that another case changes nothing else
    if ceilings is None:
        ceilings = CEILINGS if machine.kind == "cuda" else CPU_CEILINGS
    chosen = [c for name, c in registry().items() if any(fnmatch.fnmatch(name, p) for p in patterns)]
    cases = [measure(rng, c, machine, ceilings, rounds, (slower or {}).get(c.name, 1.0)) for c in chosen]
    if spoilt:
        for i, case in enumerate(cases):
            if case.operation == "rms_norm_rope":
                cases[i] = spoil(case, "torch-compiled", WRONG, "relative error 3.1e-01, bound 5.0e-03")
            if case.operation == "causal_conv3d" and case.shape.endswith("level3"):
                cases[i] = spoil(case, "conv3d-official", ERROR, "OutOfMemoryError: tried to allocate 9.70 GiB")
    gpu = machine.kind == "cuda"
    return Run(
        command="gpu --phase bench,e2e --budget 540" if gpu else "bench",
        started=(datetime(2026, 1, 1, 9, 30, tzinfo=UTC) + timedelta(days=days)).isoformat(timespec="seconds"),
        machine=machine,
        seconds=431.0 if gpu else 38.0,
        ceilings=ceilings,
        cases=tuple(cases),
        variants=variants(np.random.default_rng([seed, 1])) if gpu else (),
        audit=audit() if gpu else (),
        nvml=nvml_trace(np.random.default_rng([seed, 2]), throttled=throttled)
        if gpu
        else NvmlTrace(note="this run was on a CPU, which NVML does not watch"),
        notes=("torchao was not installed",) if gpu else (),
    )


def compare_runs(before: Run, after: Run, again: Sequence[Run] = (), threshold: float = 0.02) -> list[Comparison]:
    """Compares two runs, each a tree by itself, whatever machines they were made on."""
    first, second = (Tree(name, (Source(name, run),)) for name, run in (("before", before), ("after", after)))
    further = [Tree(f"again {i}", (Source(f"again {i}", run),)) for i, run in enumerate(again)]
    return compare_trees(join(first, second, any_device=True), further, threshold, force=True)


def quality(settings: Sequence[str] = ("fp32, 4 steps, 33 frames", "bf16, 2 steps, 17 frames")) -> tuple[Quality, ...]:
    """Measures of generated video, those of long streams among them, and one that is not defined."""
    rng, rows = np.random.default_rng(0), []
    for setting in settings:
        for measure in ("r of open", "lag of open, frames", "seam ratio", "sharpness, of the portrait's"):
            value = float(rng.uniform(0.5, 1.5))
            rows.append(Quality(setting, measure, value, value - 0.1, value + 0.1))
        rows.append(Quality(setting, "blinks, of the data's", None, None, None))
        for measure in ("distance to the portrait", "sharpness"):
            track = tuple(float(x) for x in 5 + rng.normal(0, 0.2, 40).cumsum())
            rows.append(Quality(setting, f"{measure}, last over first 10 of 40 chunks", 1.1, 1.0, 1.2, track))
    return tuple(rows)


def soak() -> Soak:
    """A session of three readings, without a fault."""
    latencies = (
        Latency("silence_to_speech", 4, 0.6, 0.9, 0.9, 0.95, (0.5, 0.7, 0.9, 1.0), (0, 3, 0, 1, 0)),
        Latency("interrupt_to_speech", 0, None, None, None, 0.0, (0.5,), (0, 0)),
    )
    names = ("resident_bytes", "queued_frames", "made_frames", "descriptors", "threads", "distance_lab", "load")
    counts = (
        "interrupts",
        "cut",
        "abandoned",
        "stalls",
        "stalled_s",
        "consumer_late_s",
        "late_s",
        "most_queued_frames",
        "most_made_frames",
    )
    return Soak(
        "tiny, 64 x 64, 2 steps", 3.0, 75, 0, 0, 0, 0.0, 0.0, 1e6, {"queued_frames": 1501, "made_frames": 56},
        dict.fromkeys(counts, 3.0), latencies, {"whole chunks": 2.0}, {"whole chunks": 3.0},
        {"seconds": (1.0, 2.0, 3.0)} | dict.fromkeys(names, (30.0, 40.0, 35.0)),
    )  # fmt: skip


def visit() -> Visit:
    """A visit of three readings, without a fault."""
    names = ("told_offset", "shown_fps", "server_bytes", "browser_bytes", "descriptors", "threads", "load")
    return Visit(
        "tiny, 64 x 64, 2 steps, WebRTC", 3.0, 70, 5, 0, Spread(2, 0.03, 0.05, 0.055), Spread(30, 0.02, 0.04, 0.1),
        0, 0.2, 0.0, 0.1, 1, False, (), 1e6, 2e6, {f"flashtalk_{name}_total": 3.0 for name in SERVER_COUNTS},
        {"seconds": (1.0, 2.0, 3.0)} | dict.fromkeys(names, (30.0, -20.0, 35.0)),
    )  # fmt: skip
