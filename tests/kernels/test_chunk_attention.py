"""The chunk attention operations: on the CPU, as torch operators, on a model of Hopper, and on a GPU by every back-end.

`interpreted/chunk_attention.py` runs the Triton kernel in Triton's interpreter.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import chunk_attention_sm90
from kernels.chunk_attention import (
    chunk_attention,
    chunk_attention_with_lse,
    dispatch,
    merge_attention,
    reference,
    split_head_dim,
)
from kernels.chunk_attention_fp8 import (
    bounded_reference,
    chunk_attention_fp8,
    chunk_attention_fp8_quantized,
    chunk_attention_fp8_quantized_op,
    chunk_attention_fp8_with_lse,
    chunk_attention_fp8_with_lse_op,
    dequantize,
    interleave,
)
from kernels.chunk_attention_sm90 import launch_sm90, supports
from kernels.common import FP8
from kernels.layer_norm import quantize_rows
from kernels.scheduler import KVRanges, kv_ranges
from kernels.tuning import GPU, TunedConfig
from profiling.measure.check import poisoned_memory
from tests.fake_gluon import fake_hopper
from tests.tensors import draw, error

attention_fp8 = importlib.import_module("kernels.chunk_attention_fp8")
attention = importlib.import_module("kernels.chunk_attention")  # the module; `kernels.chunk_attention` is its function

TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3, FP8: 4e-2}


def quantize(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operands of chunk_attention_fp8 of float32 [tokens, heads, head_dim] each, scaled by their largest values."""
    q_scale, k_scale, v_scale = q.abs().amax(2) / 448, k.abs().amax((0, 2)) / 448, v.abs().amax(0) / 448
    order = torch.from_numpy(interleave(len(v))).to(v.device)
    padded = torch.cat((v / v_scale, v.new_zeros(len(order) - len(v), *v.shape[1:])))[order]
    return (
        (q / q_scale[..., None]).to(FP8), q_scale, (k / k_scale[:, None]).to(FP8), k_scale,
        padded.permute(1, 2, 0).to(FP8).contiguous(), v_scale,
    )  # fmt: skip


# --- On the CPU -----------------------------------------------------------------------------------------------------


def by_hand(q: Tensor, k: Tensor, v: Tensor, visible: Callable[[int, int], bool], scale: float) -> Tensor:
    """One query at a time, from the formula."""
    o = torch.zeros_like(q)
    for h in range(q.shape[1]):
        for i in range(len(q)):
            keys = [j for j in range(len(k)) if visible(i, j)]
            weights = torch.tensor([math.exp(scale * (q[i, h] @ k[j, h]).item()) for j in keys], dtype=q.dtype)
            o[i, h] = (weights / weights.sum()) @ v[keys, h]
    return o


@pytest.mark.parametrize(("past", "back"), [(0, 0), (1, 1), (2, 2), (-1, 9)])
def test_reference_is_the_formula(past, back):
    q, k, v = draw(*[(9, 2, 4)] * 3, dtype=torch.float64)
    chunk = [0, 0, 1, 1, 1, 2, 3, 3, 3]
    expected = by_hand(q, k, v, lambda i, j: chunk[i] - back <= chunk[j] <= chunk[i], 0.5)
    torch.testing.assert_close(reference(q, k, v, kv_ranges(9, 9, (2, 3, 1, 3), past))[0], expected)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5), st.sampled_from([None, 0, 1, 3, "all"]), st.booleans(),
    st.booleans(), st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_cpu_equals_reference(chunks, past, chunked, with_lse, heads, dtype):
    n = sum(chunks)
    q, k, v = draw(*[(2, n, heads, 64)] * 3, dtype=dtype)
    lengths, past = (chunks, past) if chunked else (None, None)
    if with_lse:
        o, lse = chunk_attention_with_lse(q, k, v, lengths, past)
    else:
        o, lse = chunk_attention(q, k, v, lengths, past), None
    assert o.dtype == dtype
    for i in range(2):
        ranges = kv_ranges(n, n, lengths and tuple(lengths), -1 if past == "all" else past or 0)
        expected = reference(q[i].double(), k[i].double(), v[i].double(), ranges)
        assert error(o[i], expected[0]) < TOLERANCES[dtype]
        if lse is not None:
            torch.testing.assert_close(lse[i].double(), expected[1], rtol=1e-5, atol=1e-5)


def test_cpu_with_another_number_of_keys_and_another_scale():
    q, k, v = draw((5, 2, 64), (11, 2, 64), (11, 2, 64))
    expected = reference(q.double(), k.double(), v.double(), scale=0.3)[0]
    assert error(chunk_attention(q, k, v, scale=0.3), expected) < 1e-5


def test_chunks_without_a_past_are_independent():
    q, k, v = draw(*[(30, 2, 64)] * 3)
    whole = chunk_attention(q, k, v, [12, 18], 0)
    parts = [chunk_attention(q[rows], k[rows], v[rows]) for rows in (slice(12), slice(12, 30))]
    torch.testing.assert_close(whole, torch.cat(parts))


@settings(max_examples=20)
@given(st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_merged_parts_are_the_whole(queries, parts):
    q, k, v = draw((queries, 2, 64), (sum(parts), 2, 64), (sum(parts), 2, 64), dtype=torch.float64)
    parts_of_keys = [reference(q, a, b) for a, b in zip(k.split(parts), v.split(parts), strict=True)]
    o, lse = merge_attention([o for o, _ in parts_of_keys], [lse for _, lse in parts_of_keys])
    expected = reference(q, k, v)
    assert error(o, expected[0]) < 1e-6  # it adds in float32
    torch.testing.assert_close(lse, expected[1])


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 70))
def test_fp8_on_the_cpu_is_the_attention_of_its_operands(queries, keys):
    q, k, v = draw((queries, 2, 64), (keys, 2, 64), (keys, 2, 64))
    operands = quantize(q, k, v)
    o, lse = chunk_attention_fp8_with_lse(*operands)
    expected = reference(*dequantize(*operands, torch.float64))
    assert o.dtype == torch.bfloat16
    assert torch.equal(chunk_attention_fp8(*operands), o)
    assert error(o, expected[0]) < TOLERANCES[torch.bfloat16]
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)


def test_dequantized_operands_are_the_originals_up_to_rounding():
    q, k, v = draw((37, 3, 64), (21, 3, 64), (21, 3, 64))
    for x, original in zip(dequantize(*quantize(q, k, v), torch.float64), (q, k, v), strict=True):
        assert x.shape == original.shape
        assert error(x, original.double()) < 4e-2


def test_a_quantised_output_on_the_cpu_is_attention_and_quantisation():
    operands = quantize(*draw((9, 2, 64), (40, 2, 64), (40, 2, 64)))
    o8, o_scale = chunk_attention_fp8_quantized(*operands)
    expected8, expected_scale = quantize_rows(chunk_attention_fp8(*operands, dtype=torch.float32).flatten(1))
    assert torch.equal(o8.flatten(1).float(), expected8.float())
    assert torch.equal(o_scale, expected_scale)


@pytest.mark.parametrize(("channel", "key"), [(1.0, 1.0), (20.0, 1.0), (1.0, 50.0)])
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_a_scale_from_the_values_costs_no_precision(channel, key, sharpness):
    """An error of 2.6 %, also with channels 20 times as large, or a key 50 times, as trained networks may have them.

    Scales by row have less where few values are large, because the largest one of a row is then exact.
    """
    q, k, v = draw((200, 4, 64), (900, 4, 64), (900, 4, 64), seed=0)
    v[:, 0, :2] *= channel
    v[7] *= key
    operands = quantize(sharpness * q, k, v)
    o = reference(*dequantize(*operands, torch.float64))[0]
    bounded8, bounded_scale = bounded_reference(*operands)
    rows8, rows_scale = quantize_rows(o.float().flatten(1))
    by_row = error(rows8.float() * rows_scale[:, None], o.flatten(1))
    assert 0.01 < by_row < 0.0275
    assert 0.02 < error(bounded8.float() * bounded_scale[:, None, None], o) < 0.0275
    assert (o.abs() <= 448 * bounded_scale.double()[:, None, None]).all()


def test_interleave_is_what_the_docstring_says():
    """A thread holds the scores of keys 2c, 2c + 1, 8 + 2c, 9 + 2c, which must lie in places 4c to 4c + 3."""
    order = interleave(20)
    assert sorted(order) == list(range(32))
    for c in range(4):
        assert list(order[4 * c : 4 * c + 4]) == [2 * c, 2 * c + 1, 8 + 2 * c, 9 + 2 * c]
        assert list(order[16 + 4 * c : 20 + 4 * c]) == [16 + 2 * c, 17 + 2 * c, 24 + 2 * c, 25 + 2 * c]


@pytest.mark.parametrize("size", [1e3, 1e-3])
def test_extreme_logits_stay_finite(size):
    q, k, v = draw(*[(16, 1, 64)] * 3)
    assert chunk_attention(q * size, k * size, v).isfinite().all()


@pytest.mark.parametrize(
    ("capability", "tuned", "head_dim", "backend", "config"),
    [
        ("9.0", None, 128, "gluon", None),
        ("8.0", None, 128, "triton", None),
        ("9.0", None, 32, "triton", None),
        ("9.0", TunedConfig("gluon", {"STAGES": 3}), 128, "gluon", {"STAGES": 3}),
        ("8.0", TunedConfig("gluon", {"STAGES": 3}), 128, "triton", None),
        ("9.0", TunedConfig("triton", {"BLOCK_M": 64}), 128, "triton", {"BLOCK_M": 64}),
        ("9.0", TunedConfig("sdpa-cudnn", {}), 128, "gluon", None),
    ],
)
def test_dispatch_takes_the_tuned_backend_or_the_default_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    tuned: TunedConfig | None,
    head_dim: int,
    backend: str,
    config: Any,
) -> None:
    monkeypatch.setattr(attention, "gpu_of", lambda _: GPU("any", capability, 132))
    monkeypatch.setattr(attention, "tuned_config", lambda *_, **__: tuned)
    monkeypatch.setattr(
        attention, "BACKENDS", {name: lambda *a, name=name: (name, a[-1]) for name in attention.BACKENDS}
    )
    x = torch.zeros(1, 20, 2, head_dim, dtype=torch.bfloat16)
    assert dispatch(x, x, x, None, kv_ranges(20, 20), 0.1, x.dtype) == (backend, config)


@pytest.mark.parametrize(
    ("capability", "tuned", "backend"),
    [
        ("9.0", None, "separate"),
        ("9.0", TunedConfig("separate", {}), "separate"),
        ("9.0", TunedConfig("fused", {"STAGES": 3}), "fused"),
        ("8.9", TunedConfig("fused", {"STAGES": 3}), "separate"),
    ],
)
def test_dispatch_of_a_quantised_output(monkeypatch, capability, tuned, backend):
    monkeypatch.setattr(attention_fp8, "gpu_of", lambda _: GPU("any", capability, 132))
    monkeypatch.setattr(attention_fp8, "tuned_config", lambda *_: tuned)
    monkeypatch.setattr(attention_fp8, "launch_sm90", lambda *a: (["fused"], None, [a[-1]]))
    monkeypatch.setattr(attention_fp8, "dispatch", lambda q, *_: (q, None))
    monkeypatch.setattr(attention_fp8, "launch_quantize_rows", lambda o: (o, "separate"))
    operands = quantize(*draw(*[(20, 2, 64)] * 3))
    results = attention_fp8.dispatch_quantized(*operands)
    assert results == ("fused", tuned.config) if backend == "fused" else results[1] == "separate"


def test_what_the_hopper_kernel_supports():
    """TMA's alignment, offsets of 31 bits, and whole groups of 16 FP8 keys."""
    whole = kv_ranges(32, 32)

    def fits(x: Tensor, ranges: KVRanges = whole) -> bool:
        return supports(x, x, x.transpose(1, 3).contiguous() if x.dtype == FP8 else x, ranges)

    x = torch.zeros(1, 32, 2, 128, dtype=torch.bfloat16)
    assert fits(x)
    assert fits(torch.zeros(1, 32, 3, 2, 64, dtype=torch.float16)[:, :, 1])
    assert fits(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert not fits(x.float())
    assert not fits(x[..., :96])
    assert not fits(x[:, :1].expand(-1, 32, -1, -1))  # rows no distance apart
    assert not fits(torch.zeros(1, 32, 257, dtype=torch.bfloat16)[..., :256].unflatten(2, (2, 128)))
    assert not fits(torch.zeros(2**13, dtype=torch.bfloat16)[1:].as_strided((1, 32, 1, 128), (0, 128, 0, 1)))
    far = torch.zeros(1, dtype=torch.bfloat16, device="meta").as_strided((2, 32, 1, 128), (2**31, 128, 128, 1))
    assert not fits(far)
    e4m3 = x.to(FP8)
    assert fits(e4m3)
    assert fits(e4m3, kv_ranges(32, 32, (16, 16)))
    assert not fits(e4m3, kv_ranges(32, 32, (8, 24)))
    assert fits(x, kv_ranges(32, 32, (8, 24)))


# --- As torch operators ---------------------------------------------------------------------------------------------


def test_opcheck():
    q, k, v = draw(*[(1, 20, 2, 64)] * 3)
    for op in (attention.chunk_attention_op, attention.chunk_attention_with_lse_op):
        torch.library.opcheck(op.library_op, (q, k, v, [8, 12], 1, 0.125))
    operands = quantize(q[0], k[0], v[0])
    # The check of the schema multiplies inputs, which torch cannot do in FP8.
    tests = [name for name in torch.library._OPCHECK_DEFAULT_UTILS if name != "test_schema"]
    arguments = (*operands, None, 0, 0.125, torch.bfloat16)
    torch.library.opcheck(chunk_attention_fp8_with_lse_op.library_op, arguments, test_utils=tests)
    torch.library.opcheck(chunk_attention_fp8_quantized_op.library_op, operands, test_utils=tests)


def test_compiles_without_a_graph_break():
    q, k, v = draw(*[(20, 2, 64)] * 3)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = chunk_attention_with_lse(q, k, v, [8, 12], "all")
        return o * lse[..., None]

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v))
    operands = quantize(q, k, v)
    whole = torch.compile(chunk_attention_fp8, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*operands), chunk_attention_fp8(*operands))
    quantised = torch.compile(chunk_attention_fp8_quantized, fullgraph=True, backend="aot_eager")(*operands)
    for x, y in zip(quantised, chunk_attention_fp8_quantized(*operands), strict=True):
        assert torch.equal(x.float(), y.float())


Q = torch.zeros(6, 2, 64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((Q, Q, Q[:5]), "v: shape [5, 2, 64], wanted [6, 2, 64]"),
        ((Q, Q[:, :1], Q), "k: shape [6, 1, 64], wanted [keys, 2, 64]"),
        ((Q, Q[None], Q), "k: shape [1, 6, 2, 64], wanted"),
        ((Q[0, 0], Q, Q), "q: shape [64], wanted"),
        ((Q, Q.double(), Q), "k: torch.float64, wanted torch.float32"),
        ((Q.int(), Q.int(), Q.int()), "q: torch.int32, wanted torch.float32 or torch.float16 or torch.bfloat16"),
        ((Q, Q, Q.to("meta")), "v: on meta, wanted cpu"),
        ((Q.transpose(1, 2), Q, Q), "q: strides (128, 1, 64) for shape [6, 64, 2], wanted stride 1 along"),
        ((Q[:0], Q, Q), "q: shape [0, 2, 64], wanted [queries, heads, head_dim]"),
        ((Q, Q[:0], Q[:0]), "k: shape [0, 2, 64], wanted [keys, 2, 64]"),
        ((Q, Q, Q, [3, 0, 3]), "chunks: [3, 0, 3], wanted lengths >= 1"),
        ((Q, Q, Q, [3, 4]), "chunks: 7 tokens in all, wanted those of q and k, 6 and 6"),
        ((Q, Q[:5], Q[:5], [6]), "chunks: 6 tokens in all, wanted those of q and k, 6 and 5"),
        ((Q, Q, Q, None, 1), "past: 1 without chunks"),
        ((Q, Q, Q, [6], -1), "past: -1, wanted a number of chunks >= 0"),
        ((Q, Q, Q, [6], "some"), "past: 'some', wanted"),
        ((Q.clone().requires_grad_(), Q, Q), "q: requires a gradient"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: Any, words: str):
    for function in (chunk_attention, chunk_attention_with_lse):
        with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
            function(*arguments)
        assert words in str(raised.value)


def test_a_gradient_is_only_refused_where_one_would_be_kept():
    with torch.no_grad():
        assert chunk_attention(Q.clone().requires_grad_(), Q, Q).shape == Q.shape


@pytest.mark.parametrize(
    ("position", "change", "words"),
    [
        (0, lambda x: x.float(), "q: torch.float32, wanted torch.float8_e4m3fn"),
        (0, lambda x: x[None], "q: shape [1, 20, 2, 64], wanted [queries, heads, head_dim]"),
        (1, lambda x: x[:, :1], "q_scale: shape [20, 1], wanted [20, 2]"),
        (1, lambda x: torch.cat((x, x), 1)[:, :2], "q_scale: strides (4, 1) for shape [20, 2], wanted contiguous"),
        (3, lambda x: x.double(), "k_scale: torch.float64, wanted torch.float32"),
        (4, lambda x: x[..., :16].contiguous(), "v: shape [2, 64, 16], wanted [2, 64, 32]"),
        (5, lambda x: x[:1], "v_scale: shape [1, 64], wanted [2, 64]"),
    ],
)
def test_bad_fp8_arguments(position, change, words):
    operands: list[Any] = list(quantize(*draw(*[(20, 2, 64)] * 3)))
    operands[position] = change(operands[position])
    for function in (chunk_attention_fp8, chunk_attention_fp8_quantized):
        with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
            function(*operands)
        assert words in str(raised.value)


# --- On a model of Hopper -------------------------------------------------------------------------------------------


def on_fake_hopper(operands: tuple[Any, ...], ranges: KVRanges, dtype: torch.dtype, programs: int, seed: int) -> Any:
    """The results of the Hopper kernel for tensors without a batch, of which no tile is split."""
    batched = [x[None] for x in operands]
    scales = (batched[1], batched[3], batched[5]) if len(batched) == 6 else None
    q, k, v = batched if scales is None else batched[::2]
    fake = fake_hopper(chunk_attention_sm90, "attention_fwd_sm90", programs, seed)
    with poisoned_memory(), fake:
        return launch_sm90(q, k, v, scales, ranges, q.shape[3] ** -0.5, dtype, {"BLOCK_N": 64})


@settings(max_examples=6, deadline=None)
@given(
    st.integers(1, 200), st.integers(1, 200), st.integers(1, 2), st.integers(0, 99),
    st.sampled_from([torch.float16, FP8, "quantised"]),
)  # fmt: skip
def test_hopper(queries, keys, heads, seed, dtype):
    """With a tile for each program, so that none is split."""
    q, k, v = draw(*[(n, heads, 64) for n in (queries, keys, keys)], seed=seed)
    programs = heads * -(-queries // (128 if dtype == torch.float16 else 192))
    operands: Any = (q.half(), k.half(), v.half()) if dtype == torch.float16 else quantize(q, k, v)
    out_dtype = {torch.float16: torch.float16, FP8: torch.bfloat16, "quantised": FP8}[dtype]
    o, lse, o_scale = on_fake_hopper(operands, kv_ranges(queries, keys), out_dtype, programs, seed)
    wide: Any = [x.double() for x in operands] if len(operands) == 3 else dequantize(*operands, dtype=torch.float64)
    expected, expected_lse = reference(*wide)
    torch.testing.assert_close(lse[0].double(), expected_lse, rtol=1e-4, atol=1e-4)
    if out_dtype == FP8:
        assert torch.equal(o_scale, operands[5].amax().expand(1, queries))
        assert error(o[0].double() * o_scale[0, :, None, None].double(), expected) < 5e-2
    else:
        assert error(o[0], expected) < TOLERANCES[FP8 if len(operands) > 3 else dtype]


def test_fp8_wants_a_head_dim_that_its_kernels_have():
    operands = quantize(*draw(*[(20, 2, 96)] * 3))
    with pytest.raises(ValueError, match=r"^q: head_dim 96, wanted 16, 32, 64, 128$"):
        chunk_attention_fp8(*operands)


# --- On a GPU -------------------------------------------------------------------------------------------------------

# The tensor cores' own sums of FP8 products, 64 or 128 of them in a logit, have fewer bits than float32.
LSE_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-4, torch.bfloat16: 1e-4, FP8: 1e-3}
BACKENDS = [
    ("gluon", torch.bfloat16),
    ("gluon", torch.float16),
    ("gluon", FP8),
    ("triton", torch.float32),
    ("triton", torch.bfloat16),
    ("triton", FP8),
]


def on_gpu(backend: str, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, ranges: KVRanges):
    """o and lse by one back-end of float32 operands [batch, tokens, heads, head_dim], and both in float64."""
    if backend == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    tuned = TunedConfig(backend, {})
    scale = q.shape[3] ** -0.5
    with poisoned_memory():
        if dtype == FP8:
            operands = quantize(q[0], k[0], v[0])
            q8, q_scale, k8, k_scale, v8, v_scale = (x[None] for x in operands)
            o, lse = dispatch(q8, k8, v8, (q_scale, k_scale, v_scale), ranges, scale, torch.bfloat16, tuned)
            wide = [dequantize(*operands, torch.float64)]
        else:
            q, k, v = (x.to(dtype) for x in (q, k, v))
            o, lse = dispatch(q, k, v, None, ranges, scale, dtype, tuned)
            wide = zip(q.double(), k.double(), v.double(), strict=True)
    expected = [reference(a, b, c, ranges, scale) for a, b, c in wide]
    return o, lse, torch.stack([o for o, _ in expected]), torch.stack([lse for _, lse in expected])


def check_on_gpu(backend: str, dtype: torch.dtype, *arguments: Any) -> None:
    o, lse, expected, expected_lse = on_gpu(backend, dtype, *arguments)
    assert error(o, expected) < TOLERANCES[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=LSE_TOLERANCES[dtype], atol=LSE_TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (129, 65), (193, 640), (64, 129), (300, 1000), (1512, 3024)])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_gpu_sizes(backend, dtype, queries, keys, head_dim):
    batch = 1 if dtype == FP8 else 2
    q, k, v = draw(*((batch, n, 3, head_dim) for n in (queries, keys, keys)), device="cuda")
    check_on_gpu(backend, dtype, q, k, v + 0.5, kv_ranges(queries, keys))


@pytest.mark.gpu
@pytest.mark.parametrize("past", [0, 1, -1])
@pytest.mark.parametrize("chunks", [(200, 7, 500), (1,) * 9, (128, 192, 1344), (48, 16, 304)])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_gpu_chunks(backend, dtype, chunks, past):
    """In FP8 the Hopper kernel takes the last two, whose chunks begin at multiples of 16."""
    n = sum(chunks)
    q, k, v = draw(*[(1, n, 2, 128)] * 3, device="cuda")
    check_on_gpu(backend, dtype, q, k, v, kv_ranges(n, n, chunks, past))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["gluon", "triton"])
def test_gpu_views_are_read_where_they_are(backend):
    qkv = torch.randn(1, 333, 3, 2, 128, device="cuda")
    heads_first = torch.randn(1, 2, 333, 128, device="cuda").to(torch.bfloat16).transpose(1, 2)
    ranges, tuned = kv_ranges(333, 333), TunedConfig(backend, {})
    q, k, _ = qkv.to(torch.bfloat16).unbind(2)
    o, _ = dispatch(q, k, heads_first, None, ranges, 0.1, torch.bfloat16, tuned)
    expected = reference(q[0].double(), k[0].double(), heads_first[0].double(), scale=0.1)[0]
    assert error(o[0], expected) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("size", [30.0, 1e-3])
def test_gpu_extreme_logits_stay_finite(backend, dtype, size):
    """Logits up to about +-1e4."""
    q, k, v = draw(*[(1, 400, 2, 128)] * 3, device="cuda")
    o, lse, *_ = on_gpu(backend, dtype, q * size, k * size, v, kv_ranges(400, 400))
    assert o.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS[:3])
@pytest.mark.parametrize("heads", [2, 5])
def test_gpu_production_length(backend, dtype, heads):
    """Values of one sign would lose bits in the tensor cores' own FP8 sums. Results are the same bits every time."""
    q, k, v = draw(*[(1, 12096, heads, 128)] * 3, device="cuda")
    ranges = kv_ranges(12096, 12096)
    o, lse, expected, expected_lse = on_gpu(backend, dtype, q * 1.5, k, v + 0.5, ranges)
    assert error(o, expected) < (1e-2 if dtype == FP8 else 5e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=LSE_TOLERANCES[dtype], atol=LSE_TOLERANCES[dtype])
    for _ in range(3):
        again = on_gpu(backend, dtype, q * 1.5, k, v + 0.5, ranges)
        assert torch.equal(again[0], o)
        assert torch.equal(again[1], lse)


@pytest.mark.parametrize(
    ("head_dim", "split"),
    [(16, (16, 0)), (128, (128, 0)), (384, (256, 128)), (48, (32, 16)), (40, None), (8, None), (112, None)],
)
def test_split_head_dim(head_dim, split):
    assert split_head_dim(head_dim) == split


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [384, 192, 40])
def test_gpu_large_head_dim(head_dim, dtype):
    """By the Triton kernel where it takes head_dim, and by the operation, which may take PyTorch's attention."""
    q, k, v = (x.to(dtype) for x in draw(*[(2, 300, 1, head_dim)] * 3, device="cuda"))
    bound = 1e-5 if dtype == torch.float32 else 5e-3
    for i in range(2):
        expected, expected_lse = reference(q[i].double(), k[i].double(), v[i].double())
        assert error(chunk_attention(q, k, v)[i], expected) < bound
        if split_head_dim(head_dim) is not None:
            with poisoned_memory():
                o, lse = chunk_attention_with_lse(q, k, v)
            assert error(o[i], expected) < bound
            torch.testing.assert_close(lse[i].double(), expected_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_gpu_operation_in_a_graph():
    q, k, v = draw(*[(500, 2, 128)] * 3, dtype=torch.bfloat16, device="cuda")
    run = torch.compile(lambda q, k, v: chunk_attention(q, k, v, [200, 300], 1) * 2, fullgraph=True)
    run(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = run(q, k, v)
    q.normal_()
    graph.replay()
    expected = reference(q.double(), k.double(), v.double(), kv_ranges(500, 500, (200, 300), 1))[0] * 2
    assert error(o, expected) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (193, 640), (300, 1000), (12096, 12096)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gpu_quantised_output(queries, keys, head_dim):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    operands = quantize(*draw(*[(n, 3, head_dim) for n in (queries, keys, keys)], device="cuda"))
    with poisoned_memory():
        fused8, fused_scale = attention_fp8.dispatch_quantized(*operands, TunedConfig("fused", {}))
        rows8, rows_scale = chunk_attention_fp8_quantized(*operands)
    expected = reference(*dequantize(*operands, torch.float64))[0]
    assert torch.equal(fused_scale, operands[5].amax().expand(queries))
    for values, scale in ((fused8, fused_scale), (rows8, rows_scale)):
        assert error(values.double() * scale.double()[:, None, None], expected) < 5e-2
