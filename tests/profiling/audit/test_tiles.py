"""What the audit makes of kernels that are compiled here for other GPUs, against arithmetic done by hand."""

import io
import math
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from rich.console import Console
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from profiling.audit import sass
from profiling.audit.audit import BUDGETS, Budgets, audit_case, bounds
from profiling.audit.ttgir import Tile
from profiling.cases import Shape, registry
from profiling.devices import devices, of_target
from profiling.results import AuditResult
from profiling.tables import audit_table
from tests.profiling.attention_kernel import PRODUCTION, TINY, attention
from tests.profiling.audit.audited import H100, PRODUCTION_FLOPS, audited, scale_rows


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
    targets = {80: "A100", 86: "RTX3090", 89: "L40S", 90: "H100", 100: "B200", 103: "B300", 120: "RTX5090"}
    assert {n: of_target(f"sm_{n}").name for n in targets} == targets
    sheet = {"H100": 989.4, "H800": 989.4, "H200": 989.4, "L40S": 362.05, "B200": 2250}
    sheet |= {"A100": 312, "RTX3090": 71, "RTX5090": 209.5}
    sheet |= {"H20": 148, "A100-40GB": 312, "RTX4090": 165.2, "B300": 2250, "RTXPRO6000": 503.8}
    for name, device in devices().items():
        rate = device.flop_cycle["bf16"] * device.multiprocessors * device.clock / 1e12
        assert rate == pytest.approx(sheet[name], rel=0.015)
        assert device.flop_cycle["bf16"] == 2 * device.flop_cycle["tf32"]
        if float(device.capability) >= 8.9:
            assert device.flop_cycle["fp8"] == 2 * device.flop_cycle["bf16"]
        else:
            assert "fp8" not in device.flop_cycle
