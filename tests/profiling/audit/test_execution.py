"""Masks, branches and trip counts of TTGIR's text, against what they are by hand."""

import pytest

from profiling.audit.execution import Execution, executions

HEAD = "  tt.func public @kernel(%x: !tt.ptr<f32>, %n: i32) attributes {noinline = false} {"
SETUP = """
    %c0 = arith.constant 0 : i32
    %c1 = arith.constant 1 : i32
    %c64 = arith.constant 64 : i32
    %id = tt.get_program_id x : i32 loc(#loc3)
    %start = arith.muli %id, %c64 : i32 loc("start"(#loc4))
    %range = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32, #blocked>
    %all = tt.splat %start : i32 -> tensor<64xi32, #blocked>
    %offsets = arith.addi %all, %range : tensor<64xi32, #blocked>
    %limit = tt.splat %n : i32 -> tensor<64xi32, #blocked>
    %mask = arith.cmpi slt, %offsets, %limit : tensor<64xi32, #blocked>
"""
LOAD = "%v = tt.load %p, %mask : tensor<64x!tt.ptr<f32>, #blocked>"


def loads(body: str, n: int, grid: tuple[int, ...] = (1,)) -> list[Execution]:
    text = f"module {{\n{HEAD}{SETUP}{body}\n    tt.return\n  }}\n}}\n"
    return [op for op in executions(text, {"n": n}, grid) if op.name == "tt.load"]


@pytest.mark.parametrize(
    ("n", "grid", "share"), [(64, (1,), 1.0), (48, (1,), 0.75), (240, (4,), 240 / 256), (10, (1,), 10 / 64)]
)
def test_a_mask_lets_a_share_through(n: int, grid: tuple[int, ...], share: float) -> None:
    assert loads(LOAD, n, grid) == [Execution("tt.load", 1.0, share)]


def test_the_first_and_the_last_program_stand_for_all() -> None:
    """Of four programs three have whole tiles, and the last one 48 of 64 elements."""
    assert loads(LOAD, 3 * 64 + 48, (4,))[0].share == pytest.approx((3 + 0.75) / 4)


@pytest.mark.parametrize(("n", "then", "otherwise"), [(5, 1.0, 0.0), (0, 0.0, 1.0)])
def test_a_branch_is_taken_or_not(n: int, then: float, otherwise: float) -> None:
    branch = f"""
    %some = arith.cmpi sgt, %n, %c0 : i32
    scf.if %some {{
      {LOAD}
    }} else {{
      {LOAD}
    }}
    {LOAD}"""
    assert [op.times for op in loads(branch, n)] == [then, otherwise, 1.0]


def test_a_loop_is_executed_as_often_as_it_counts() -> None:
    loop = f"""
    scf.for %i = %c0 to %n step %c64 iter_args(%a = %c0) -> (i32) : i32 {{
      {LOAD}
      scf.for %j = %c0 to %c64 step %c1 : i32 {{
        {LOAD}
      }} {{tt.num_stages = 2 : i32}} loc(#loc9)
    }}"""
    assert [op.times for op in loads(loop, 130)] == [3.0, 192.0]


def test_what_depends_on_loaded_values_is_unknown() -> None:
    body = f"""
    %loaded = tt.load %x : !tt.ptr<i32>
    scf.for %i = %c0 to %loaded step %c1 : i32 {{
      {LOAD}
    }}
    %some = arith.cmpi sgt, %loaded, %c0 : i32
    scf.if %some {{
      {LOAD}
    }}"""
    assert [op.times for op in loads(body, 64)] == [1.0, None, None]


@pytest.mark.parametrize(
    ("definition", "shape", "share"),
    [
        ("%m = arith.andi %mask, %even : tensor<64xi1, #blocked>", "64", 24 / 64),  # 48 of 64, every second one
        ("%m = arith.xori %mask, %true : tensor<64xi1, #blocked>", "64", 16 / 64),
        ("%m = arith.select %even, %mask, %false : tensor<64xi1, #blocked>, tensor<64xi1, #blocked>", "64", 24 / 64),
        ("%m = tt.reshape %mask allow_reorder : tensor<64xi1, #blocked> -> tensor<8x8xi1, #b>", "8x8", 48 / 64),
        ("%m = tt.expand_dims %mask {axis = 1 : i32} : tensor<64xi1, #s> -> tensor<64x1xi1, #b>", "64x1", 48 / 64),
        ("%m = arith.cmpf olt, %f, %f : tensor<64xf32, #blocked>", "64", 1.0),  # not known: all of it
    ],
)
def test_masks_are_made_in_many_ways(definition: str, shape: str, share: float) -> None:
    body = f"""
    %true = arith.constant dense<true> : tensor<64xi1, #blocked>
    %false = arith.constant dense<false> : tensor<64xi1, #blocked>
    %two = arith.constant dense<2> : tensor<64xi32, #blocked>
    %zero = arith.constant dense<0> : tensor<64xi32, #blocked>
    %rest = arith.remsi %offsets, %two : tensor<64xi32, #blocked>
    %even = arith.cmpi eq, %rest, %zero : tensor<64xi32, #blocked>
    {definition}
    %v = tt.load %p, %m : tensor<{shape}x!tt.ptr<f32>, #b>"""
    assert loads(body, 48)[0].share == pytest.approx(share)
