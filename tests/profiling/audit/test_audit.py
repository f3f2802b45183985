"""The audit, on kernels compiled here for GPUs that are not: its numbers against arithmetic done by hand."""

import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from rich.console import Console
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from profiling import formats
from profiling.__main__ import main
from profiling.audit import sass
from profiling.audit.audit import BUDGETS, Budgets, audit_case, bounds, budget_faults
from profiling.audit.ttgir import Tile
from profiling.cases import Backend, Case, Shape, registry
from profiling.devices import devices, of_target
from profiling.fake_gpu import FakeCudaMode, record_launches
from profiling.results import AuditResult
from profiling.tables import AUDIT_UNITS, audit_table
from tests.profiling import attention_kernel, toy
from tests.profiling.attention_kernel import CASES, OPERATION, PRODUCTION, TINY, attention

H100 = of_target("sm_90")
PRODUCTION_FLOPS = 4 * 12096**2 * 40 * 128
KERNELS = Path(attention_kernel.__file__)


def no_call(*_: object) -> Any:
    raise AssertionError("an audit runs nothing")


def audited(
    *launchers: Callable[..., object],
    shape: Shape = PRODUCTION,
    dtype: str = "bf16",
    target: str = "sm_90",
    budget: Path = BUDGETS,
) -> list[AuditResult]:
    """What the audit says of the attention case with these launchers."""
    backends = [Backend(f"back-end {i}", no_call, ours=True, launcher=f) for i, f in enumerate(launchers)]
    case = Case(replace(OPERATION, backends={dtype: backends}), shape, dtype, 0.0)
    return audit_case(case, of_target(target), Budgets(budget))


@pytest.fixture(scope="module")
def production() -> AuditResult:
    """The attention kernel as it would run in the 14B student."""
    (result,) = audited(attention)
    return result


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "audit", *map(str, arguments)])
    return main()


# --- What is compiled, and what the model makes of it ---------------------------------------------------------------


def test_the_production_kernel_compiles_as_it_would_be_launched(production: AuditResult) -> None:
    assert (production.case, production.kernel) == ("test_attention/14b-w1/bf16", "attention_forward")
    assert (production.target, production.grid, production.warps, production.stages) == ("sm_90", (95, 40), 8, 2)
    assert production.faults == production.warnings == ()
    assert production.spills == production.local == 0
    # Two warp groups of 64 rows; each of the two products takes 128 / 16 steps of K.
    assert production.instructions["HGMMA"] == 2 * 128 // 16
    # 64 x 128 scores a warp group are 64 a thread, and two rows a thread fade.
    assert production.instructions["MUFU.EX2"] == 64 + 2
    # q, and twice k and v, 128 x 128 bf16 each, and barriers.
    assert 5 * 32768 <= production.shared < 5 * 32768 + 1024
    # Accumulator and scores are 64 registers each; two such blocks do not fit into 65536 registers or 228 KiB.
    assert 128 < production.registers <= 255
    assert (production.blocks, production.occupancy) == (1, 8 / 64)


def test_the_model_is_the_arithmetic_of_a_128_by_128_tile(production: AuditResult) -> None:
    tile = production.tile
    assert tile["flops_bf16"] == 2 * (2 * 128 * 128 * 128)
    assert tile["tensor_cycles"] == 2048  # 4096 FLOPs a cycle
    assert tile["load_bytes"] == 2 * (128 * 128 * 2)
    assert tile["store_bytes"] == tile["fma"] == 0
    assert tile["mufu_cycles"] == 1024 + 128 / 16  # 16 a cycle: the scores, and how far each row fades
    # Of each score: maximum, fused scale and difference, sum; the accumulator fades. Of each row: scale of the maximum,
    # maximum, difference, fused fade and sum.
    assert tile["fp32_cycles"] == (3 * 128 * 128 + 128 * 128 + 4 * 128) / 128
    assert tile["l2_cycles"] == pytest.approx(65536 / (5.5e12 / 132 / 1.83e9))
    assert tile["passes"] == 40 * (12096 / 128) ** 2


def test_bounds_are_seconds_of_the_whole_launch(production: AuditResult) -> None:
    busiest = math.ceil(95 * 40 / 132) / (95 * 40) * 40 * (12096 / 128) ** 2  # passes
    assert production.bounds == pytest.approx(
        {
            "tensor": busiest * 2048 / 1.83e9,
            "mufu": busiest * 1032 / 1.83e9,
            "fp32": busiest * 516 / 1.83e9,
            "l2": 40 * (12096 / 128) ** 2 * 65536 / 5.5e12,
            "hbm": 4 * 12096 * 40 * 128 * 2 / 3.35e12,
        }
    )
    # 65536 bytes a pass are too many.
    assert production.tflops == pytest.approx(PRODUCTION_FLOPS / production.bounds["l2"] / 1e12)
    # Of the data sheet's 989.4, as the last of 29 waves is not full.
    assert 989 * 0.98 < PRODUCTION_FLOPS / production.bounds["tensor"] / 1e12 < 989.4


def test_fp8_takes_half_the_tensor_cycles_and_bytes_but_as_many_exponentials() -> None:
    def launcher(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(*(x.to(torch.float8_e4m3fn) for x in (q, k, v)), config=None)

    (result,) = audited(launcher)
    assert result.instructions["QGMMA"] == 2 * 128 // 32
    assert "HGMMA" not in result.instructions
    assert (result.tile["flops_fp8"], result.tile["tensor_cycles"]) == (2 * (2 * 128 * 128 * 128), 1024)
    assert (result.tile["load_bytes"], result.tile["mufu_cycles"]) == (2 * 128 * 128, 1032)
    assert result.faults == ()


def test_float32_products_run_on_the_ordinary_units() -> None:
    (result,) = audited(attention, shape=TINY, dtype="fp32")
    assert result.grid == (math.ceil(84 / 32), 2)
    assert result.tile["fma"] == 2 * 32 * 32 * 64
    assert result.tile["tensor_cycles"] == 0
    assert result.tile["fp32"] == 2 * 32 * 32 * 64 + (3 * 32 * 32 + 32 * 64 + 4 * 32)
    assert result.bounds["fp32"] == max(result.bounds.values())
    assert not any(name.endswith("MMA") for name in result.instructions)
    assert result.faults == ()  # float32 asks for no tensor cores


@pytest.mark.parametrize(("target", "instruction"), [("sm_89", "HMMA"), ("sm_100", "UTCHMMA")])
def test_other_targets_have_their_own_instructions_and_rates(target: str, instruction: str) -> None:
    launcher = partial(attention, config={"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4})
    (result,) = audited(launcher, shape=TINY, target=target)
    assert result.target == target
    assert instruction in result.instructions
    assert "HGMMA" not in result.instructions
    assert result.faults == ()
    flops = 2 * (2 * 64 * 32 * 64)
    assert result.tile["flops_bf16"] == flops
    assert result.tile["tensor_cycles"] == flops / {"sm_89": 1024, "sm_100": 8192}[target]


@triton.jit
def scaled(x, y, n, factor, BLOCK: tl.constexpr, EVEN: tl.constexpr):  # noqa: N803
    """y = exp(factor x) + 1."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(y + i, tl.exp(tl.load(x + i) * factor) + 1)
    else:
        tl.store(y + i, tl.exp(tl.load(x + i, mask=i < n) * factor) + 1, mask=i < n)


heuristic = triton.heuristics({"EVEN": lambda arguments: arguments["n"] % arguments["BLOCK"] == 0})(scaled)


def scale_rows(q: Tensor, *_: Tensor) -> None:
    x, y = q.float(), torch.empty_like(q, dtype=torch.float32)
    heuristic[lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)](x, y, x.numel(), 2.0, BLOCK=1024)


def test_a_kernel_without_products_is_one_pass_a_block() -> None:
    """The grid is a function of the launch parameters; one of them comes from a heuristic."""
    (result,) = audited(scale_rows)
    blocks = 12096 * 40 * 128 // 1024
    assert result.grid == (blocks,)
    tile = result.tile
    assert (tile["load_bytes"], tile["store_bytes"], tile["mufu"], tile["passes"]) == (4096, 4096, 1024, blocks)
    assert tile["fp32"] == 2 * 1024
    assert set(result.bounds) == {"mufu", "fp32", "l2", "hbm"}
    assert result.bounds["l2"] == pytest.approx(blocks * 8192 / 5.5e12)
    assert result.faults == ()


@triton.jit
def persistent(x_rows, w_rows, y, bias, rows, columns, depth, BLOCK: tl.constexpr):  # noqa: N803
    """y = exp(x w^T + exp(bias)), tile after tile. Bias and result come once a tile, in a branch and after the loop."""
    across = columns // BLOCK
    for t in range(tl.program_id(0), rows // BLOCK * across, tl.num_programs(0)):
        m, n = t // across * BLOCK, t % across * BLOCK
        inside = tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for k in range(0, depth, BLOCK):
            if k == 0:
                acc += tl.exp(tl.load(bias + n + inside))[None, :]
            acc = tl.dot(x_rows.load([m, k]), w_rows.load([n, k]).T, acc)
        tl.store(y + (m + inside)[:, None] * columns + (n + inside)[None, :], tl.exp(acc))


def test_the_main_loop_is_the_innermost_around_products_without_its_branches() -> None:
    def launcher(q: Tensor, k: Tensor, _v: Tensor) -> None:
        x_rows, w_rows = (TensorDescriptor.from_tensor(x[:, 0].contiguous(), [64, 64]) for x in (q, k))
        parameters: dict[str, Any] = {"BLOCK": 64}
        y, bias = q.new_empty(12096, 12096), q.new_empty(12096, dtype=torch.float32)
        persistent[(132,)](x_rows, w_rows, y, bias, 12096, 12096, 128, **parameters)

    (result,) = audited(launcher)
    assert result.faults == ()
    assert result.tile["flops_bf16"] == 2 * 64**3
    assert result.tile["load_bytes"] == 2 * (64 * 64 * 2)
    assert [result.tile[name] for name in ("store_bytes", "mufu", "fp32", "fma")] == [0, 0, 0, 0]
    passes = (12096 // 64) ** 2 * 2  # fewer than the case's FLOPs would need, and evenly shared out
    assert result.tile["passes"] == pytest.approx(passes, rel=0.002)
    assert result.bounds["tensor"] == pytest.approx(passes * 2 * 64**3 / (132 * 4096 * 1.83e9), rel=0.002)


@triton.jit
def masked_rows(x, y, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """y = exp(x), row by row. The body stands under a condition in a loop, and part of the block is masked."""
    offsets = tl.arange(0, BLOCK)
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        if row < rows:
            values = tl.load(x + row * columns + offsets, mask=offsets < columns)
            tl.store(y + row * columns + offsets, tl.exp(values.to(tl.float32)), mask=offsets < columns)


def launch_masked_rows(q: Tensor, *_: Tensor) -> None:
    rows, columns = len(q), q[0].numel()
    parameters: dict[str, Any] = {"ROWS": 4, "BLOCK": 8192}
    masked_rows[(triton.cdiv(rows, 4),)](q, torch.empty_like(q), rows, columns, **parameters)


def test_bytes_count_where_the_mask_lets_them_through() -> None:
    """The student's 5,120 channels in a block of 8,192: arithmetic is done on all of it, 5,120 are read and written."""
    (result,) = audited(launch_masked_rows)
    tile = result.tile
    assert (tile["load_bytes"], tile["store_bytes"]) == (4 * 5120 * 2, 4 * 5120 * 2)
    assert tile["mufu"] == 4 * 8192
    assert result.bounds["l2"] == pytest.approx(2 * 12096 * 5120 * 2 / 5.5e12)
    assert tile["passes"] == 12096 / 4


@triton.jit
def tiles_over_the_edge(x, y, rows, columns, BLOCK: tl.constexpr):  # noqa: N803
    """y = x in tiles, of which the last ones reach over both edges."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    tl.store(y + row * columns + column, tl.load(x + row * columns + column, mask=inside), mask=inside)


def test_loads_in_a_loop_of_another_kind_are_not_taken_for_none() -> None:
    """The loads of the Gluon kernel stand in a partition whose loops are nested otherwise than the products'."""
    results = audit_case(registry()["linear/14b-w1-up/fp8"], H100, Budgets(BUDGETS))
    (result,) = (result for result in results if result.kernel == "linear_fwd_sm90")
    assert result.tile["tensor_cycles"] == 1024
    assert not result.tile.keys() & {"l2_cycles", "load_bytes", "store_bytes"}
    assert "l2" not in result.bounds
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(audit_table([result]))
    assert console.export_text().splitlines()[-3].split()[-3:] == ["-", "tensor", "1979"]


def test_tiles_at_the_edges_count_what_they_have() -> None:
    def launcher(q: Tensor, *_: Tensor) -> None:
        parameters: dict[str, Any] = {"BLOCK": 64}
        tiles_over_the_edge[(3, 2)](q, torch.empty_like(q), 150, 100, **parameters)

    (result,) = audited(launcher)
    assert result.tile["load_bytes"] * result.tile["passes"] == pytest.approx(150 * 100 * 2)


@triton.jit
def until_zero(x, y):
    """A loop whose length depends on what it loads."""
    n = tl.load(x).to(tl.int32)
    for i in range(n):
        tl.store(y + i, tl.load(x + i))


def test_what_depends_on_loaded_values_is_not_modelled() -> None:
    def launcher(q: Tensor, *_: Tensor) -> None:
        until_zero[(1,)](q, torch.empty_like(q))

    (result,) = audited(launcher)
    assert (result.bounds, result.tile, result.tflops) == ({}, {}, None)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(audit_table([result]))
    text = console.export_text()
    assert "not modelled" in text
    assert "0.00" not in text


def test_an_algorithm_that_saves_flops_has_the_passes_that_it_makes() -> None:
    """The case's FLOPs are those of the whole attention; this launch has only 10 blocks of rows."""
    few = Shape(PRODUCTION.name, {**PRODUCTION.dims, "queries": 1280})
    (whole,) = audited(attention)

    def launcher(q: Tensor, k: Tensor, v: Tensor) -> None:
        attention(q[:1280], k, v)

    (part,) = audited(launcher)
    (alone,) = audited(attention, shape=few)
    assert part.grid == alone.grid == (10, 40)
    assert part.tile["passes"] == 10 * 40 * math.ceil(12096 / 128)
    assert part.tile["passes"] < whole.tile["passes"] / 9


def test_a_kernel_of_the_repository_has_work_or_no_model() -> None:
    """One case of every operation and dtype. Of partial results of attention, the schedule knows how many there are."""
    chosen = {(c.operation.name, c.dtype): c for c in registry().values() if c.shape.name.startswith("14b-w1")}
    for case in chosen.values():
        for result in audit_case(case, H100, Budgets(BUDGETS)):
            modelled = any(result.tile.get(f"{unit}_cycles") for unit in AUDIT_UNITS)
            assert modelled != (result.kernel == "combine_partials"), (result.case, result.kernel)
            assert modelled == bool(result.bounds)


def test_all_kernels_of_a_launcher_are_audited_and_equal_launches_are_one(production: AuditResult) -> None:
    def launcher(q: Tensor, k: Tensor, v: Tensor) -> None:
        scale_rows(q)
        attention(q, k, v)
        scale_rows(q)

    scale, attend = audited(launcher)
    assert (scale.kernel, attend.kernel) == ("scaled", "attention_forward")
    assert scale.tile["passes"] == 2 * 12096 * 40 * 128 // 1024
    assert scale.tflops is None  # the case's FLOPs are the matrix products
    assert attend == production


def test_blocks_go_to_multiprocessors_as_a_whole() -> None:
    tile = Tile({"bf16": 4096.0}, 0, 0, 0, 0, 0)
    full, more = (bounds(tile, float(n), n, 0, H100)["tensor"] for n in (132, 133))
    assert full == pytest.approx(1 / H100.clock)
    assert more == pytest.approx(2 / H100.clock)
    assert bounds(tile, 1000.0, 132, 0, H100)["tensor"] == pytest.approx(1000 / 132 / H100.clock)  # persistent: even


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "blocks"),
    [
        ("sm_90", 8, 32, 0, 8),  # all 64 warps
        ("sm_90", 1, 32, 0, 32),  # no more blocks than that
        ("sm_90", 4, 255, 0, 2),  # 8192 registers a warp
        ("sm_90", 2, 200, 0, 4),  # 10 warps would fit, but two to each of four register files
        ("sm_90", 12, 168, 0, 1),
        ("sm_90", 4, 32, 116224 - 1024, 2),  # 228 KiB less one each
        ("sm_90", 4, 32, 116224, 1),
        ("sm_90", 4, 32, 232448, 1),
        ("sm_90", 4, 32, 232449, 0),
        ("sm_89", 4, 32, 49152, 2),
        ("sm_89", 4, 32, 101376, 1),
        ("sm_89", 8, 32, 0, 6),  # 48 warps
    ],
)
def test_resident_blocks(target: str, warps: int, registers: int, shared: int, blocks: int) -> None:
    assert sass.resident_blocks(of_target(target), warps, registers, shared) == blocks


def test_instructions_are_counted_by_name() -> None:
    listing = """
.L_x_1:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 MUFU.EX2 R2, R3 ;
        /*0020*/             @!UP1 UTMALDG.2D [UR20], [UR10] ;
        /*0030*/                   MUFU.RCP R2, R3 ;
        /*0040*/              { @P1 MUFU.EX2 R2, R3 ;
       /*12340*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR48], RZ, !UPT ; }
"""
    count = {"MUFU.EX2": 2, "LDC": 1, "UTMALDG": 1, "MUFU.RCP": 1, "HGMMA": 1}
    assert sass.instructions(listing) == count


def test_devices_have_a_first_of_each_capability_and_the_data_sheets_rates() -> None:
    assert [of_target(f"sm_{n}").name for n in (90, 89, 100)] == ["H100", "L40S", "B200"]
    sheet = {"H100": 989.4, "H800": 989.4, "H200": 989.4, "L40S": 362.05, "B200": 2250}
    for name, device in devices().items():
        rate = device.flop_cycle["bf16"] * device.multiprocessors * device.clock / 1e12
        assert rate == pytest.approx(sheet[name], rel=0.015)
        assert device.flop_cycle["fp8"] == 2 * device.flop_cycle["bf16"] == 4 * device.flop_cycle["tf32"]


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
        (["--target", "sm_75"], "", "there is no target sm_75; there are sm_100, sm_89, sm_90"),
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
