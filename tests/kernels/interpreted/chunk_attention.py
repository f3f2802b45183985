"""The Triton kernels of chunk attention against the reference in float64."""

# pyright: reportArgumentType=false

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention_partials import combine_partials
from kernels.chunk_attention import launch_triton, merge_attention, reference
from kernels.chunk_attention_fp8 import dequantize, interleave
from kernels.scheduler import KVRanges, kv_ranges
from tests.tensors import draw, error

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
EXAMPLES = settings(max_examples=25)


def check(q: Tensor, k: Tensor, v: Tensor, ranges: KVRanges, scale: float, bound: float = 1e-5) -> None:
    """Of operands [batch, tokens, heads, head_dim]."""
    o, lse = launch_triton(q, k, v, None, ranges, scale, q.dtype, SMALL)
    for i in range(len(q)):
        expected = reference(q[i].double(), k[i].double(), v[i].double(), ranges, scale)
        assert error(o[i], expected[0]) < bound
        torch.testing.assert_close(lse[i].double(), expected[1], rtol=bound, atol=bound)


@EXAMPLES
@given(st.integers(1, 33), st.integers(1, 49), st.integers(1, 2), st.sampled_from([16, 48, 64]), st.integers(0, 99))
def test_full(queries, keys, heads, head_dim, seed):
    """Up to two whole tiles of queries and three of keys, and a part of one."""
    q, k, v = draw(*[(2, n, heads, head_dim) for n in (queries, keys, keys)], seed=seed)
    check(q, k, v, kv_ranges(queries, keys), 0.3)


@EXAMPLES
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.sampled_from([0, 1, 2, -1]), st.integers(0, 99))
def test_chunks(chunks, past, seed):
    """Of one tile or two; of four chunks the last has more before it than two."""
    n = sum(chunks)
    q, k, v = draw(*[(1, n, 1, 16)] * 3, seed=seed)
    check(q, k, v, kv_ranges(n, n, tuple(chunks), past), 0.25)


@pytest.mark.parametrize("n", [15, 16, 17, 12096 % 128])
def test_around_a_tile(n):
    q, k, v = draw(*[(1, n, 1, 64)] * 3, seed=0)
    check(q, k, v, kv_ranges(n, n), 0.125)


def test_half_precision():
    q, k, v = draw(*[(1, 50, 2, 64)] * 3, seed=0, dtype=torch.float16)
    check(q, k, v, kv_ranges(50, 50), 0.125, bound=2e-3)


def test_views_are_read_where_they_are():
    qkv, heads_first = draw((1, 37, 3, 2, 16), (2, 37, 16), seed=0)
    heads_first = heads_first.transpose(0, 1)[None]
    check(qkv[:, :, 0], qkv[:, :, 1], heads_first, kv_ranges(37, 37), 0.25)


def test_a_later_chunk_is_not_even_read():
    q, k, v = draw(*[(1, 48, 1, 16)] * 3, seed=0)
    k[:, 16:] = v[:, 16:] = math.nan
    o, lse = launch_triton(q, k, v, None, kv_ranges(48, 48, (16, 32), 0), 0.25, q.dtype, SMALL)
    assert o[:, :16].isfinite().all()
    assert lse[:, :16].isfinite().all()


@pytest.mark.parametrize("size", [1e2, 1e-3])
def test_extreme_logits_stay_finite(size):
    """Logits up to +-1e4 and more."""
    q, k, v = draw(*[(1, 33, 1, 16)] * 3, seed=0)
    check(q * size, k * size, v, kv_ranges(33, 33), 0.25, bound=2e-4)


def test_equal_keys_give_the_mean():
    (v,) = draw((1, 20, 1, 16), seed=0)
    o, lse = launch_triton(torch.zeros(1, 3, 1, 16), torch.ones(1, 20, 1, 16), v, None, kv_ranges(3, 20), 1.0,
                           torch.float32, SMALL)  # fmt: skip
    torch.testing.assert_close(o[0, 0], v[0].mean(0))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(20)))


@EXAMPLES
@given(st.integers(1, 30), st.integers(1, 50), st.integers(0, 99))
def test_scaled_operands(queries, keys, seed):
    """The FP8 path with scales and transposed values, in float32 because the interpreter cannot round to e4m3."""
    heads, head_dim = 2, 16
    q, k, v = draw(*[(n, heads, head_dim) for n in (queries, keys, keys)], seed=seed)
    scales = draw((queries, heads), (heads,), (heads, head_dim), seed=seed + 1)
    q_scale, k_scale, v_scale = (scale.exp() for scale in scales)
    order = torch.from_numpy(interleave(keys))
    padded = torch.cat((v, torch.zeros(len(order) - keys, heads, head_dim)))
    values = padded[order].permute(1, 2, 0).contiguous()
    ranges = kv_ranges(queries, keys)
    o, lse = launch_triton(q[None], k[None], values[None], (q_scale, k_scale, v_scale), ranges, 0.25, q.dtype, SMALL)
    wide = dequantize(q, q_scale, k, k_scale, values, v_scale, torch.float64)
    torch.testing.assert_close(wide[2], v.double() * v_scale.double())
    expected = reference(*wide, scale=0.25)
    assert error(o[0], expected[0]) < 1e-5
    torch.testing.assert_close(lse[0].double(), expected[1], rtol=1e-5, atol=1e-5)


def test_scaled_operands_in_chunks_of_any_length():
    q, k, v = draw(*[(41, 1, 16)] * 3, seed=0)
    values = torch.cat((v, torch.zeros(7, 1, 16)))[torch.from_numpy(interleave(41))].permute(1, 2, 0).contiguous()
    ones = torch.ones(41, 1), torch.ones(1), torch.ones(1, 16)
    ranges = kv_ranges(41, 41, (5, 18, 18), 1)
    o, _ = launch_triton(q[None], k[None], values[None], ones, ranges, 0.25, q.dtype, SMALL)
    assert error(o[0], reference(q.double(), k.double(), v.double(), ranges, 0.25)[0]) < 1e-5


@pytest.mark.parametrize("scale", [None, 0.25])
def test_combine_partials(scale):
    """Partial results as a program of the Hopper kernel leaves them, of two tiles. The second one ends at row 40.

    With a scale, o is to be e4m3, for which float32 stands here: the interpreter cannot round to it.
    """
    heads, head_dim, block_m, rows = 2, 16, 32, 16
    partial_o, partial_lse = draw((5, block_m, head_dim), (5, block_m), seed=0)
    partial_lse *= 3
    o, lse, o_scale = (torch.full((1, 40, *axes), math.nan) for axes in ((heads, head_dim), (heads,), ()))
    combines = torch.tensor([[0, 0, 32, 0, 2], [1, 32, 40, 2, 3]], dtype=torch.int32)
    combine_partials[(2, block_m // rows)](
        o, lse, o_scale, partial_o, partial_lse, torch.tensor(scale or 1.0), combines, heads, 40, *o.stride()[:3],
        QUANTIZE=scale is not None, D=head_dim, BLOCK_M=block_m, ROWS=rows,
    )  # fmt: skip
    first = merge_attention([partial_o[i][:, None] for i in (0, 1)], [partial_lse[i][:, None] for i in (0, 1)])
    second = merge_attention([partial_o[i, :8, None] for i in (2, 3, 4)], [partial_lse[i, :8, None] for i in (2, 3, 4)])
    for tile, head, (expected, expected_lse) in ((slice(0, 32), 0, first), (slice(32, 40), 1, second)):
        torch.testing.assert_close(o[0, tile, head], expected[:, 0] / (scale or 1.0))
        torch.testing.assert_close(lse[0, tile, head], expected_lse[:, 0])
    assert o[0, :32, 1].isnan().all()
    assert o[0, 32:, 0].isnan().all()
    written = 32 if scale else 0  # rows of the first head alone
    assert (o_scale[0, :written] == (scale or 0)).all()
    assert o_scale[0, written:].isnan().all()
