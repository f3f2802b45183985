"""Back-ends that are wrong get no time, correct ones are timed beside their peers; the command line of bench."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from profiling.__main__ import main
from profiling.cases import (
    TOLERANCES,
    Backend,
    Call,
    Case,
    Shape,
    no_setup,
    registry,
    requested_cases,
)
from profiling.cases.linear import prepare_norm_scaled_mm, prepare_residual_scaled_mm, prepare_scaled_mm
from profiling.formats import load
from profiling.measure.bench import (
    CEILING_SIZES,
    CeilingSizes,
    bench_case,
    measure_ceilings,
    split_rounds,
)
from profiling.measure.check import check_case, compare_outputs, poisoned_memory
from profiling.measure.timing import CallTimer
from profiling.results import ERROR, NOT_INSTALLED, OK, UNSUPPORTED, WRONG, CaseResult
from tests.processes import Interpreter
from tests.profiling import toy

CPU = torch.device("cpu")


def library_scales_rows() -> bool:
    """Whether this PyTorch multiplies e4m3 matrices with a scale for each row on a CPU, as it does on GPUs."""
    x = torch.ones(16, 16, dtype=torch.bfloat16)
    try:
        prepare_scaled_mm(x, x, x[0])()
    except RuntimeError:
        return False
    return True


LIBRARY_SCALES_ROWS = library_scales_rows()
TOY = Path(toy.__file__)


def bench(*backends: Backend, rounds: int = 3) -> CaseResult:
    return bench_case(toy.case("toy", *backends), CPU, rounds, seed=7)


def test_right_back_ends_are_timed_round_by_round() -> None:
    result = bench(toy.ours(toy.slower), toy.PEER)
    mine, peer = result.measurements
    assert (mine.status, mine.ours, len(mine.samples)) == (OK, True, 3)
    assert (peer.status, peer.ours, len(peer.samples)) == (OK, False, 3)
    assert mine.error == 0
    assert all(0.002 < s < 0.1 for s in mine.samples)
    assert result.best() is peer
    assert (result.flops, result.bytes, result.calls) == (1000, 8000, 1)


@pytest.mark.parametrize(
    ("backend", "status", "detail"),
    [
        (toy.ours(toy.double_but_the_tail), WRONG, "1 of 1000 elements are NaN"),
        (toy.ours(lambda x: x * 2.001), WRONG, "relative error 5.0e-04, allowed 1e-05"),
        (toy.ours(lambda x: (x * 2)[1:]), WRONG, "shapes [[999]], wanted [[1000]]"),
        (toy.ours(toy.raises), ERROR, "RuntimeError: no such kernel"),
        (Backend("far", no_setup(toy.double), needs="no_such_package.at_all"), NOT_INSTALLED, "no_such_package.at_all"),
        (Backend("gpu", no_setup(toy.double), devices=("cuda",)), UNSUPPORTED, "not for cpu"),
    ],
)
def test_whatever_is_not_right_has_a_reason_and_no_time(backend: Backend, status: str, detail: str) -> None:
    result = bench(backend, toy.PEER)
    bad, peer = result.measurements
    assert bad.status == status
    assert detail in bad.detail
    assert "\n" not in bad.detail
    assert not bad.samples
    assert peer.status == OK, "the run goes on"
    assert len(peer.samples) == 3


def test_poison_fills_new_tensors_and_is_switched_off_again() -> None:
    with poisoned_memory():
        assert torch.empty(100).isnan().all()
        assert torch.empty_like(torch.ones(3, 4)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_output_is_compared() -> None:
    good, bad = torch.ones(4, dtype=torch.float64), torch.full((4,), 1.5, dtype=torch.float64)
    assert compare_outputs([good.float(), good], [good, good], 1e-5) == (0, "")
    error, fault = compare_outputs([good, bad], [good, good], 1e-5)
    assert error == 0.5
    assert "relative error" in fault


CPU_CASES = [
    case for case in requested_cases([], CPU, None) if any(not case.lacks(b, "cpu", None) for b in case.backends)
]


# torch.compile takes seconds a case. An operation's cases differ in sizes only, so the first of them is compiled.
COMPILED_CASES = {(case.operation.name, case.dtype): case.name for case in reversed(CPU_CASES)}.values()


@pytest.mark.parametrize("case", CPU_CASES, ids=lambda c: c.name)
def test_every_cpu_case_is_right_without_a_compiler(case: Case) -> None:
    plain = [b.name for b in case.backends if b.name != "compiled"]
    with torch._dynamo.config.patch(disable=case.name not in COMPILED_CASES):
        result = check_case(case, CPU, seed=3, only=plain)
    statuses = {m.status for m in result.measurements}
    assert OK in statuses
    assert statuses <= {OK, UNSUPPORTED, NOT_INSTALLED}, result.measurements


@pytest.mark.skipif(not LIBRARY_SCALES_ROWS, reason="this PyTorch scales the rows of e4m3 matrices on GPUs only")
@pytest.mark.parametrize(
    ("name", "prepare"),
    [
        ("linear/14b-w1-up", prepare_scaled_mm),
        ("norm_linear/14b-w1-up", prepare_norm_scaled_mm),
        ("linear_residual/14b-w1-down", prepare_residual_scaled_mm),
    ],
)
def test_quantised_layers_are_right_on_the_cpu_too(name: str, prepare: Callable[..., Call]) -> None:
    """They are measured on a GPU, but their arithmetic is the same everywhere."""
    operation = registry()[f"{name}/fp8"].operation
    here = replace(operation, backends={"fp8": (Backend("scaled-mm-row", prepare),)})
    shape = Shape("small", {"rows": 64, "inputs": 256, "outputs": 192, "gelu": 1, "quantised": 0})
    with torch._dynamo.config.patch(disable=True):
        result = check_case(Case(here, shape, "fp8", TOLERANCES["fp8"]), CPU, seed=5)
    assert result.measurements[0].status == OK, result.measurements


@pytest.mark.parametrize("gelu", [0, 1])
@pytest.mark.parametrize("name", ["norm_linear/14b-w1-up", "linear_residual/14b-w1-down"])
def test_16_bit_layers_are_those_of_the_model_with_pytorch_as_a_peer(name: str, gelu: int) -> None:
    operation = registry()[f"{name}/bf16"].operation
    shape = Shape("small", {"rows": 64, "inputs": 256, "outputs": 192, "gelu": gelu, "quantised": 0})
    result = check_case(Case(operation, shape, "bf16", TOLERANCES["bf16"]), CPU, seed=5, only=("ours", "torch"))
    assert [(m.backend, m.ours, m.status) for m in result.measurements] == [("ours", True, OK), ("torch", False, OK)]


@pytest.mark.parametrize(("rounds", "passes", "parts"), [(20, 4, [5] * 4), (7, 4, [1, 2, 2, 2]), (2, 4, [1, 1])])
def test_rounds_are_spread_over_passes(rounds: int, passes: int, parts: list[int]) -> None:
    assert split_rounds(rounds, passes) == parts


def test_the_copy_is_launched_and_products_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a CUDA graph a copy is a memcpy node, which is slower than the kernels that it is the ceiling of."""
    captured: list[bool] = []

    class Timer(CallTimer):
        def __init__(self, calls: Any, device: torch.device, *, capture: bool = True) -> None:
            captured.append(capture)
            super().__init__(calls, device, capture=capture)

    monkeypatch.setattr("profiling.measure.bench.CallTimer", Timer)
    monkeypatch.setitem(CEILING_SIZES, "cpu", CeilingSizes(2**22, 64, 2))
    assert measure_ceilings(CPU, ["fp32"]).copy_launched
    assert captured == [False, True]


def test_ceilings_are_measured_by_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CEILING_SIZES, "cpu", CeilingSizes(2**22, 64, 2))
    ceilings = measure_ceilings(CPU, ["fp32", "fp8"])
    assert set(ceilings.matmul_flop_s) == ({"fp32", "fp8"} if LIBRARY_SCALES_ROWS else {"fp32"})
    assert 1e8 < (ceilings.copy_bytes_s or 0) < 1e13
    assert all(1e6 < rate < 1e14 for rate in ceilings.matmul_flop_s.values())


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "bench", "--device", "cpu", *map(str, arguments)])
    return main()


def test_the_command_writes_a_results_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "run.json"
    assert call(monkeypatch, "toy_good", "--cases", TOY, "--rounds", 2, "--out", out) == 0
    run = load(out)
    assert [c.case for c in run.cases] == ["toy_good/toy/fp32"]
    assert run.machine.kind == "cpu"
    assert run.notes[0].startswith("seed ")
    assert run.ceilings.copy_bytes_s
    assert "toy_good/toy/fp32" in capsys.readouterr().out


def test_json_is_the_results_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.json"
    assert call(monkeypatch, "toy_good", "--cases", TOY, "--rounds", 2, "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())


def test_a_wrong_kernel_of_ours_ends_in_1_and_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "run.json"
    assert call(monkeypatch, "toy_wrong", "toy_good", "--cases", TOY, "--rounds", 2, "--out", out) == 1
    assert [c.measurements[0].status for c in load(out).cases] == [WRONG, OK]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["toy_god"], "nearest: toy_good/toy/fp32"),
        (["toy_good", "--backend", "peers"], "none of these cases has it; they have ours, peer"),
        (["toy_good", "--rounds", 0], "--rounds 0"),
        (["toy_good", "--device", "tpu"], "use auto, cpu or cuda"),
        (["toy_good", "--out", "/proc/none/run.json"], "cannot be written"),
        (["toy_good", "--no-such-option"], "No such option"),
    ],
)
def test_mistakes_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[object], said: str
) -> None:
    assert call(monkeypatch, *arguments, "--cases", TOY) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert lines[-1].startswith("error: ")


def test_the_list_measures_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "toy", "--cases", TOY, "--list", "--json") == 0
    assert json.loads(capsys.readouterr().out)["toy_hangs/toy/fp32"] == ["ours", "peer"]


BROKEN = """
from dataclasses import replace
import torch
from profiling.cases import Backend, no_setup
from tests.profiling.attention_kernel import CASES, OPERATION, TRITON, attention

def without_its_tail(q, k, v):
    out = torch.empty_like(q)
    out[:-4] = attention(q[:-4].contiguous(), k, v)
    return out

broken = Backend("broken", no_setup(without_its_tail), ours=True)
CASES = [replace(CASES[0], operation=replace(OPERATION, backends={"fp32": (TRITON, broken)}))]
"""


def test_a_triton_kernel_is_right_and_one_with_an_unwritten_tail_is_caught(
    interpreting_python: Interpreter, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    out = tmp_path / "run.json"
    command = ["-m", "profiling", "bench", "test_attention", "--device", "cpu", "--rounds", "1"]
    done = interpreting_python.run(*command, "--cases", tmp_path / "broken.py", "--out", out)
    assert done.returncode == 1, done.stderr
    good, bad = load(out).cases[0].measurements
    assert (good.status, len(good.samples)) == (OK, 1)
    assert (bad.status, bad.samples) == (WRONG, ())
    assert bad.detail == f"{4 * 2 * 64} of {84 * 2 * 64} elements are NaN or infinite"


def test_a_back_end_that_changes_its_inputs_is_wrong_and_spoils_no_other() -> None:
    def in_place(x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)

    broken = toy.case("toy_in_place", toy.ours(in_place), toy.PEER)
    result = check_case(broken, torch.device("cpu"), 0)
    assert [(m.status, m.detail) for m in result.measurements] == [(WRONG, "changes its inputs"), (OK, "")]


def test_a_case_without_inputs_costs_itself_only() -> None:
    def none(*_: object) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("out of memory")

    good = toy.case("toy_broken", toy.ours(toy.double), toy.PEER)
    broken = replace(good, operation=replace(good.operation, inputs=none))
    result = check_case(broken, torch.device("cpu"), 0)
    assert {m.status for m in result.measurements} == {ERROR}
    assert result.measurements[0].detail == "inputs or reference: RuntimeError: out of memory"
