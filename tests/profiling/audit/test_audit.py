"""The audit's faults, budgets and command, on kernels compiled here for GPUs that are not."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from profiling import formats
from profiling.__main__ import main
from profiling.audit.audit import BUDGETS, Budgets, budget_faults
from profiling.audit.ttgir import Tile
from profiling.cases import registry
from profiling.fake_gpu import FakeCudaMode, record_launches
from profiling.results import AuditResult
from tests.profiling import toy
from tests.profiling.attention_kernel import CASES, TINY, attention
from tests.profiling.audit.audited import H100, KERNELS, audited, scale_rows, scaled


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "audit", *map(str, arguments)])
    return main()


# --- What is wrong --------------------------------------------------------------------------------------------------

SPILLING = """
from dataclasses import replace
from functools import partial
from profiling.cases import Backend, Case
from tests.profiling.attention_kernel import OPERATION, TINY, attention, prepare

launch = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "maxnreg": 80}
starved = Backend("starved", prepare, ours=True, launcher=partial(attention, config=launch))
CASES = [Case(replace(OPERATION, backends={"bf16": (starved,)}), TINY, "bf16", 5e-3)]
"""


def test_a_kernel_that_spills_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accumulator and scores of a 64 x 64 tile are 64 registers in each of 128 threads; with addresses, 80 are few."""
    (tmp_path / "cases.py").write_text(SPILLING)
    out = tmp_path / "audit.json"
    assert call(monkeypatch, "--cases", tmp_path / "cases.py", "--out", out) == 1
    shown = capsys.readouterr().out
    (result,) = formats.load(out).audit
    assert result.registers <= 80
    assert result.spills > 0
    assert result.local > 0
    assert {"LDL", "STL"} <= set(result.instructions)
    for fault in (f"{result.spills} bytes spilled, allowed 0", f"{result.local} bytes of local memory a thread"):
        assert fault in " ".join(shown.split())


def test_lost_wgmma_is_a_fault_unless_the_budget_allows_it(tmp_path: Path) -> None:
    """Two warps are no warp group, so the products fall back to the instruction of the generation before."""
    launcher = partial(attention, config={"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 2})
    (result,) = audited(launcher, shape=TINY)
    assert result.instructions["HMMA"] > 0
    assert result.faults == ("matrix products by HMMA, wanted HGMMA or QGMMA or IGMMA",)
    (tmp_path / "budgets.toml").write_text('["test_attention/*"]\nmma = ["HMMA"]\n')
    (allowed,) = audited(launcher, shape=TINY, budget=tmp_path / "budgets.toml")
    assert allowed.faults == ()


def test_serialised_wgmma_and_a_block_that_cannot_run_are_faults(production: AuditResult) -> None:
    remark = (
        "(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x for the function 'f'"
    )
    broken = replace(production, warnings=("unused variable", remark), shared=232449, blocks=0)
    tile = Tile({"bf16": 1.0}, 0, 0, 0, 0, 0)
    assert list(budget_faults(broken, Budgets(BUDGETS).of("", "", "sm_90"), H100, tile)) == [
        "232449 bytes of shared memory, a block on sm_90 has 232448",
        "(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x",
    ]


def test_whether_work_is_modelled_is_a_matter_of_the_budget(production: AuditResult, tmp_path: Path) -> None:
    path = tmp_path / "budgets.toml"
    path.write_text("[attention_forward]\nmodelled = true\n[combine]\nmodelled = false\n")
    known, unknown = (Tile({}, 0, 0, 0, 0, 0, modelled=modelled) for modelled in (True, False))
    for kernel, right, wrong in (("attention_forward", known, unknown), ("combine", unknown, known)):
        budget = Budgets(path).of(kernel, "", "sm_90")
        assert not list(budget_faults(production, budget, H100, right))
        (fault,) = budget_faults(production, budget, H100, wrong)
        assert fault == f"its work is {'' if wrong.modelled else 'not '}modelled, and the budget says otherwise"
    for tile in (known, unknown):
        assert not list(budget_faults(production, Budgets(path).of("other", "", "sm_90"), H100, tile))


def test_budgets_limit_what_matches(production: AuditResult, tmp_path: Path) -> None:
    """Kernel and case names match; later tables win, key by key; a table may be for one target only."""
    path = tmp_path / "budgets.toml"
    path.write_text("""
        [attention_forward]
        registers = 100
        shared = 300000
        needs = ["HGMMA", "QGMMA"]
        ["test_attention/14b-*/bf16"]
        shared = 100000
        blocks = 2
        forbids = ["SHFL", "LDL"]
        [attention_forward2]
        registers = 1
        ["attention_*"]
        registers = 2
        target = "sm_89"
    """)
    budgets = Budgets(path)
    budget = budgets.of(production.kernel, production.case, "sm_90")
    assert list(budget_faults(production, budget, H100, Tile({"bf16": 1.0}, 0, 0, 0, 0, 0))) == [
        "room for 1 blocks on a multiprocessor, wanted 2",
        f"{production.registers} registers a thread, allowed 100",
        f"{production.shared} bytes of shared memory a block, allowed 100000",
        "no QGMMA in the SASS",
        "SHFL in the SASS",
    ]
    assert budgets.unused == {"attention_forward2", "attention_*"}
    assert budgets.of(production.kernel, "", "sm_89").registers == 2


@triton.jit
def split_rows(q, q_rows, k_rows, o, first, columns, BLOCK: tl.constexpr, CAREFUL: tl.constexpr):  # noqa: N803
    """o = q k^T of BLOCK channels from row `first` on, by two groups of warps that have half of the rows each."""
    row = tl.program_id(0) * BLOCK
    if CAREFUL:
        count = tl.num_programs(0) * BLOCK
        q_rows = tl.make_tensor_descriptor(q, [count, BLOCK], [BLOCK, 1], [BLOCK, BLOCK])  # type: ignore[arg-type]
    x = q_rows.load([first + row, 0])  # type: ignore[arg-type]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK, warp_specialize=True, num_stages=2):
        acc = tl.dot(x, k_rows.load([start, 0]).T, acc)
    rows = first + (row + tl.arange(0, BLOCK)) if CAREFUL else first + row + tl.arange(0, BLOCK)
    tl.store(o + rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], acc)


@pytest.mark.parametrize("careful", [True, False])
def test_what_triton_compiles_wrongly_when_it_specialises_warps(careful: bool) -> None:
    def launcher(q: Tensor, k: Tensor, v: Tensor) -> None:
        q, k = q[:, 0].contiguous(), k[:, 0].contiguous()
        q_rows, k_rows = (TensorDescriptor.from_tensor(x, [128, 128]) for x in (q, k))
        parameters: dict[str, Any] = {"BLOCK": 128, "CAREFUL": careful, "num_warps": 4}
        split_rows[(1,)](q, q_rows, k_rows, v, 16, len(k), **parameters)

    (result,) = audited(launcher)
    if not careful and not result.instructions:  # Triton 3.7 refuses to compile it
        assert result.faults == ("RuntimeError: PassManager::run failed",)
        return
    assert result.instructions["USETMAXREG"] > 0
    assert result.warps == 12  # 4 that load, 2 x 4 that multiply
    # Loads stand in one partition, products in two others: together they are one pass.
    assert (result.tile["flops_bf16"], result.tile["load_bytes"]) == (2 * 128 * 128 * 128, 2 * 128 * 128)
    wrong = (
        "a TMA load of [128, 128] overruns its buffer of [64, 128]: make its descriptor in the kernel",
        "rows of the second half are shifted by 64 twice: do not share a load's row with a store",
    )
    assert result.faults == (() if careful else wrong)


@triton.jit
def mistaken(x):
    tl.store(x, tl.load(x) + nowhere)  # type: ignore[name-defined]  # noqa: F821


def test_what_does_not_compile_is_a_result_with_a_fault_and_the_others_go_on(
    production: AuditResult, capfd: pytest.CaptureFixture[str]
) -> None:
    def raises(q: Tensor, *_: Tensor) -> None:
        scale_rows(q)
        raise ValueError("q: no good\nwanted better")

    starved, nothing = partial(attention, config={"maxnreg": 64}), lambda *_: None
    before = JITFunction.run, driver._active
    scale, raised, refused, undefined, empty, good = audited(
        raises, starved, lambda q, *_: mistaken[(1,)](q), nothing, attention
    )
    assert (JITFunction.run, driver._active) == before
    assert (scale.kernel, scale.faults) == ("scaled", ())  # launched before it raised
    assert (raised.kernel, raised.faults) == ("back-end 0", ("ValueError: q: no good",))
    assert refused.kernel == "attention_forward"
    assert refused.faults[0].startswith("PTXASError: ptxas fatal   : (C7602) Insufficient registers (64)")
    assert undefined.kernel == "mistaken"
    assert undefined.faults == ("CompilationError: NameError('nowhere is not defined')",)
    assert (empty.kernel, empty.faults) == ("back-end 3", ("launches no Triton kernel",))
    assert good == production
    assert ".entry" not in capfd.readouterr().out  # Triton prints PTX that ptxas refuses


def test_triton_is_restored_afterwards() -> None:
    before = JITFunction.run, driver._active
    caches = len(scaled.device_caches)
    x = torch.empty(1024, device="meta")
    with record_launches(90) as recorder:
        parameters: dict[str, Any] = {"BLOCK": 1024, "EVEN": False}
        scaled[(1,)](x, x, 1000, 2.0, **parameters)
    with pytest.raises(KeyError), record_launches(90):
        raise KeyError
    assert [(launch.kernel, launch.grid) for launch in recorder.launches] == [("scaled", (1,))]
    assert (JITFunction.run, driver._active, len(scaled.device_caches)) == (*before, caches)


# --- The command ----------------------------------------------------------------------------------------------------


def test_cases_without_kernels_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = Path(toy.__file__)
    assert call(monkeypatch, "--cases", without) == 0
    assert capsys.readouterr().out == "none of these cases has a Triton kernel\n"
    assert call(monkeypatch, "--cases", without, "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == ["none of these cases has a Triton kernel"]


def test_the_command_shows_and_writes_what_it_found(
    production: AuditResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, budget = tmp_path / "audit.json", tmp_path / "budgets.toml"
    budget.write_text("[a_kernel_that_is_gone]\nregisters = 100\n")
    assert call(monkeypatch, "--cases", KERNELS, "--out", out, "--budget", budget) == 0
    shown = capsys.readouterr().out
    run = formats.load(out)
    assert run.command == "audit"
    assert (run.machine.device, run.machine.kind, run.machine.capability) == ("H100 (sm_90)", "cuda", "9.0")
    assert "compiled for sm_90" in shown
    assert [result.case for result in run.audit] == [case.name for case in CASES]
    assert run.audit[1] == production
    for word in ("attention_forward sm_90", "HGMMA", "2048", "1032", "516", "2878", "l2", "704"):
        assert word in shown
    assert "budget [a_kernel_that_is_gone] matches no kernel and no case" in shown
    assert call(monkeypatch, "test_attention/14b-w1/bf16", "--cases", KERNELS, "--budget", budget, "--json") == 0
    again = formats.from_json(json.loads(capsys.readouterr().out), "output")
    assert (again.audit, again.notes) == ((production,), ())  # some cases only: the budget may be for others


def test_budgets_of_kernels_that_were_not_chosen_are_no_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--cases", KERNELS) == 0
    assert "matches no kernel" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "budget", "message"),
    [
        (["--target", "sm_75"], "", "there is no target sm_75; there are sm_100, sm_103, sm_120, sm_80, sm_86, sm_89"),
        ([], "[x]\nregisters = 1.5", "[x].registers is 1.5, wanted int"),
        ([], "[x]\nregister = 1", "[x] has the unknown field register"),
        ([], "registers = 1", "[registers] is int"),
        ([], "[x]\ntarget = 'sm90'", "there is no target sm90"),
        ([], "[x", "is not TOML"),
        (["nonsense"], "", "there is no case nonsense"),
        (["vae_decode/14b-w1/bf16"], "", "none of these cases has a Triton kernel"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str],
    budget: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "budgets.toml").write_text(budget)
    assert call(monkeypatch, *arguments, "--budget", tmp_path / "budgets.toml") == 2
    assert message in capsys.readouterr().err


def test_a_missing_budget_file_and_the_interpreter_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--budget", tmp_path / "none.toml") == 2
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert call(monkeypatch) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_inputs_of_every_operation_can_be_made_without_memory() -> None:
    """Kernels will come to all of them."""
    operations = {case.operation.name: case for case in registry().values()}
    with FakeCudaMode():
        for case in operations.values():
            inputs = case.inputs(torch.device("cuda"), None)
            assert all(x.is_cuda for x in inputs if isinstance(x, Tensor)), case.name
