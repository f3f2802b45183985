"""Other tools' files: a real one of pytest-benchmark's, and the first GPU probe's as it writes them."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from profiling.compare import rows
from profiling.results import ERROR, OK, SKIPPED, WRONG, CaseResult, Run, from_json, load

BENCHMARKS = """
import pytest

@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_case(benchmark, backend):
    about = dict(case="norm/tiny/fp32", operation="norm", shape="tiny", dtype="fp32", flops=8e3, bytes=4e3)
    benchmark.extra_info.update(about, backend=backend, ours=backend == "eager", world=2, calls=3.5, dims={"rows": 4})
    benchmark.pedantic(sum, args=(range(100),), rounds=7)

def test_plain(benchmark):
    benchmark.pedantic(sum, args=(range(100),), rounds=6)
"""


@pytest.fixture(scope="module")
def benchmark_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pytest-benchmark itself writes."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "test_it.py").write_text(BENCHMARKS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-json=out.json",
        "test_it.py",
    ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "out.json"


def test_a_pytest_benchmark_file_keeps_every_round(benchmark_file: Path) -> None:
    values, run = json.loads(benchmark_file.read_text()), load(benchmark_file)
    case = run.case("norm/tiny/fp32")
    assert case is not None
    assert (case.operation, case.shape, case.dtype, case.flops, case.bytes) == ("norm", "tiny", "fp32", 8e3, 4e3)
    assert (case.world, case.calls, case.dims) == (2, 3.5, {"rows": 4})
    assert [(m.backend, m.ours, m.status, len(m.samples)) for m in case.measurements] == [
        ("eager", True, OK, 7),
        ("compiled", False, OK, 7),
    ]
    assert case.measurements[0].samples == tuple(values["benchmarks"][0]["stats"]["data"])
    plain = run.case("test_it.py::test_plain")
    assert plain is not None
    assert [(m.backend, m.ours) for m in plain.measurements] == [("pytest", False)]
    assert run.machine.kind == "cpu"
    assert run.machine.versions["python"].startswith("3.")
    assert run.machine.device == values["machine_info"]["cpu"]["brand_raw"]


def test_a_pytest_benchmark_file_compares_with_itself(benchmark_file: Path) -> None:
    run = load(benchmark_file)
    assert {row.change.verdict for row in rows(run, run)} == {"same"}


def test_a_pytest_benchmark_file_without_rounds_has_its_quartiles(benchmark_file: Path) -> None:
    values = json.loads(benchmark_file.read_text())
    values["commit_info"] = {"id": "abc", "dirty": True}
    for benchmark in values["benchmarks"]:
        del benchmark["stats"]["data"]
    stats, run = values["benchmarks"][0]["stats"], from_json(values, "file")
    assert run.cases[0].measurements[0].samples == (stats["q1"], stats["median"], stats["q3"])
    assert run.machine.revision == "abc-dirty"


@pytest.mark.parametrize("spoil", ["stats", "fullname"])
def test_a_damaged_pytest_benchmark_file_is_refused(benchmark_file: Path, spoil: str) -> None:
    values = json.loads(benchmark_file.read_text())
    del values["benchmarks"][2][spoil]
    with pytest.raises(UserError, match=f"file is damaged: KeyError '{spoil}'"):
        from_json(values, "file")


def timed(ms: float, **more: Any) -> dict[str, Any]:
    """A result as the probe has it, with a graph one twentieth faster."""
    values = {"n": 40, "ms": ms, "p20": 0.99 * ms, "p80": 1.02 * ms, "wall_s": 2.5}
    graph = {"graph_n": 40, "graph_ms": 0.95 * ms, "graph_p20": 0.94 * ms, "graph_p80": 0.97 * ms}
    return values | graph | {"throttle": "0", "tflops": 600.0, "gbs": 1000.0} | more


PROBE: dict[str, Any] = {
    "argv": ["--out", "results"],
    "started": 1_780_000_000.0,
    "deadline": 1_780_000_540.0,
    "workers": 1,
    "last": "kernels of block bf16",
    "summary": [],
    "results": {
        "env": {
            "python": "3.12.3", "torch": "2.11.0+cu130", "cuda": "13.0", "triton": "3.6.0", "cudnn": 91900, "cpus": 16,
            "device": "NVIDIA H100 80GB HBM3", "capability": "9.0", "sms": 132, "l2_mb": 50.0, "gb": 79.25,
            "driver": "580.65", "cublas": ["13.1"], "sm_mhz": 345,
        },
        "copy eager 32768x32768": timed(1.4, tflops=0, gbs=3000.0),
        "ceiling matmul bf16": timed(1.5, tflops=700.0),
        "ceiling matmul bf16, 2.5 s long": timed(1.6, tflops=650.0),
        "ceiling matmul fp8 row": timed(0.9, tflops=1200.0, throttle="4"),
        "attn H40 CUDNN": timed(4.4, err=2e-3),
        "attn H40 CUDNN token-major": timed(4.5, err=2e-3),
        "attn H40/8 FLASH": timed(0.9, err=2e-3),
        "triton attn bf16 ws 128x128 s2": timed(4.2, err=2e-3, bad=False, moved=True, ws=True, spills=0),
        "linear 12096x5120->15360 bf16": timed(2.7, err=2e-3),
        "linear 1512x13824->5120 fp8 row": timed(0.3, err=1e-3),
        "triton gemm ws 128x256 s3 12096x5120->13824": timed(1.4, err=1e-3, bad=False, moved=False, ws=False, spills=8),
        "triton gemm w8 128x256 s4 12096x5120->13824": timed(1.4, err=0.3, bad=True, moved=False, ws=False),
        "triton gemm ws 128x128 s4 12096x5120->13824": {"error": "hung, crashed or out of time"},
        "quantise rows eager 12096x5120": timed(0.4),
        "quantise rows compiled 12096x13824": timed(0.3),
        "layernorm+modulate compiled 12096x5120": timed(0.1),
        "rms+silu compiled 1x96x4x768x448 channels_last": timed(0.2),
        "rms+silu compiled 1x96x4x768x448": timed(0.2),
        "triton conv ws 128x128 C384 4x192x112": timed(1.0, err="NaN", bad=False, moved=False),
        "cudnn conv C384 4x192x112 channels_last": timed(2.0, err=1e-3),
        "block bf16": timed(20.0, step_ms=800.0, first_call_s=31.0, bad=False),
        "block fp8": {"skipped": "10 s left, may need 60"},
        "kernels of block bf16": {"some_kernel": [3, 1.5], "wall_s": 1.0},
    },
}  # fmt: skip


def places(run: Run) -> dict[str, dict[str, str]]:
    return {c.case: {m.backend: m.status for m in c.measurements} for c in run.cases}


def test_the_probe_is_mapped_to_cases_that_measure_the_same() -> None:
    found = places(from_json(PROBE, "file"))
    assert found["chunk_attention/14b-w1/bf16"] == {"sdpa-cudnn head-major": OK, "sdpa-cudnn": OK}
    assert found["chunk_attention/14b-w8/bf16"] == {"sdpa-flash head-major": OK}
    assert found["linear/14b-w1-qkv/bf16"] == {"eager": OK}
    assert found["linear/14b-w8-down/fp8"] == {"scaled-mm-row": OK}
    assert found["quantize_rows/14b-w1-narrow/fp8"] == {"eager": OK}
    assert found["quantize_rows/14b-w1-wide/fp8"] == {"compiled": OK}
    assert found["layer_norm_modulate/14b-w1/bf16"] == {"compiled": OK}
    assert found["rms_norm_silu/14b-w1-level3/bf16"] == {"compiled": OK}
    assert found["gpu_first/rms+silu compiled 1x96x4x768x448"] == {"gpu_first": OK}
    assert found["causal_conv3d/gpu_first-C384-4x192x112/bf16"] == {
        "triton ws 128x128": WRONG,
        "cudnn channels_last": OK,
    }
    assert found["gpu_first/block fp8"] == {"gpu_first": SKIPPED}
    assert not any("kernels of" in name or name.endswith("env") for name in found)


def test_what_the_probe_found_wrong_is_wrong() -> None:
    run = from_json(PROBE, "file")
    gemm, attention = run.case("linear/14b-w1-up/fp8"), run.case("chunk_attention/gpu_first/bf16")
    assert gemm is not None
    assert attention is not None
    assert [(m.backend, m.status, m.ours) for m in gemm.measurements] == [
        ("triton ws 128x256 s3", OK, True),
        ("triton w8 128x256 s4", WRONG, True),
        ("triton ws 128x128 s4", ERROR, True),
    ]
    fine, wrong, lost = gemm.measurements
    assert fine.detail == "not warp-specialised; 8 registers spilled"
    assert wrong.samples == ()
    assert "relative error 0.3, allowed 4e-02" in wrong.detail
    assert "unwritten" in wrong.detail
    assert lost.detail == "hung, crashed or out of time"
    assert attention.measurements[0].status == WRONG
    assert attention.measurements[0].detail == "a repeated launch gave other bits"


def test_the_probe_has_percentiles_for_rounds_and_says_so() -> None:
    run = from_json(PROBE, "file")
    case = run.case("linear/14b-w1-qkv/bf16")
    assert case is not None
    (measurement,) = case.measurements
    assert measurement.graph
    assert measurement.samples == pytest.approx((0.94 * 2.7e-3, 0.95 * 2.7e-3, 0.97 * 2.7e-3))
    assert case.flops == 2 * 12096 * 5120 * 15360
    assert case.calls == 160
    assert any("20th, 50th and 80th percentile" in note for note in run.notes)
    own = run.case("gpu_first/rms+silu compiled 1x96x4x768x448")
    assert own is not None
    assert own.bytes == pytest.approx(1000e9 * 0.95 * 0.2e-3)  # got back from its GB/s
    block = run.case("gpu_first/block bf16")
    assert block is not None
    assert block.measurements[0].first_call == 31.0


def test_the_probe_tells_machine_ceilings_and_throttling() -> None:
    run = from_json(PROBE, "file")
    assert (run.machine.device, run.machine.units, run.machine.driver) == ("NVIDIA H100 80GB HBM3", 132, "580.65")
    assert run.machine.versions["cudnn"] == "91900"
    assert run.ceilings.copy_bytes_s == 3e12
    assert run.ceilings.matmul_flop_s == {"bf16": 7e14, "fp8": 1.2e15}
    assert run.gauges.throttled == {"power cap": 1 / 20}
    assert run.started == "2026-05-28T20:26:40+00:00"


def test_the_probe_at_other_shapes_is_no_case_of_ours() -> None:
    for argv, half in ((["--tiny"], "bf16"), (["--tiny", "--device", "cpu"], "fp16")):
        values: dict[str, Any] = copy.deepcopy(PROBE) | {"argv": argv}
        if "cpu" in argv:
            del values["results"]["env"]["device"]
        run = from_json(values, "file")
        assert all(name.startswith("gpu_first/") for name in places(run))
        case: CaseResult | None = run.case("gpu_first/block bf16" if half == "bf16" else "gpu_first/attn H40 CUDNN")
        assert case is not None
        assert case.dtype == half
        assert run.machine.kind == ("cpu" if half == "fp16" else "cuda")


def test_a_damaged_probe_file_is_refused() -> None:
    values = copy.deepcopy(PROBE)
    del values["results"]["copy eager 32768x32768"]["graph_p20"]
    with pytest.raises(UserError, match="file is damaged: KeyError 'graph_p20'"):
        from_json(values, "file")
    with pytest.raises(UserError, match="file is damaged"):
        from_json(PROBE | {"results": [1]}, "file")
    with pytest.raises(UserError, match="holds no results"):
        from_json({key: value for key, value in PROBE.items() if key != "deadline"}, "file")
