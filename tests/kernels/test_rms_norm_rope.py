"""RMSNorm, rotary embedding and their quantisation: on the CPU, as torch ops, and on a GPU.

The kernels also run in Triton's interpreter: `interpreted/rms_norm_rope.py`.
"""

# pyright: reportCallIssue=false, reportReturnType=false

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.chunk_attention import reference as attention_reference
from kernels.chunk_attention_fp8 import chunk_attention_fp8, dequantize
from kernels.common import FP8
from kernels.rms_norm_rope import (
    NUM_SAMPLES,
    key_scale,
    kv_statistics,
    reference,
    reference_fp8,
    rms_norm_rope,
    rms_norm_rope_fp8,
    sample_tokens,
)
from model.rope import rope_table, rotate
from profiling.measure.check import poisoned_memory
from tests.tensors import error

module = importlib.import_module("kernels.rms_norm_rope")  # the module; `kernels.rms_norm_rope` is its function

EPS = 1e-6


def inputs(
    grid: tuple[int, int, int], heads: int, d: int = 128, dtype: torch.dtype = torch.float32, outliers: float = 1.0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v as slices of a projection, every hundredth channel of it `outliers` times as large and off centre."""
    tokens = grid[0] * grid[1] * grid[2]
    qkv = torch.randn(tokens, 3, heads * d)
    wild = torch.randperm(heads * d)[: heads * d // 100 + 1]
    qkv[:, :, wild] = outliers * (qkv[:, :, wild] + 2 * (outliers > 1) * torch.randn(3, len(wild)))
    weights = (0.3 * torch.randn(2, heads * d)).exp()
    q, k, v = qkv.to(dtype).to(device).unflatten(2, (heads, d)).unbind(1)
    return q, k, v, *weights.to(dtype).to(device), rope_table(grid, d, device)


def wide(*x: Tensor) -> list[Tensor]:
    return [t.double() for t in x]


# --- On the CPU -----------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.sampled_from([16, 128]))
def test_equals_the_models_norm_and_rotation(frames, rows, columns, heads, d):
    q, k, _, *weights, rope = inputs((frames, rows, columns), heads, d)
    turned = rms_norm_rope(q, k, *weights, rope, EPS)
    for x, weight, y in zip((q, k), weights, turned, strict=True):
        normed = torch.nn.functional.rms_norm(x.flatten(1), (heads * d,), weight, EPS).unflatten(1, (heads, d))
        torch.testing.assert_close(y, rotate(normed, rope))


def test_bf16_is_rounded_once():
    q, k, _, *weights, rope = inputs((2, 3, 4), 2, dtype=torch.bfloat16)
    expected = reference(*wide(q, k, *weights, rope), EPS)
    for x, y in zip(rms_norm_rope(q, k, *weights, rope, EPS), expected, strict=True):
        torch.testing.assert_close(x, y.bfloat16(), rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize("outliers", [1.0, 5.0, 20.0])
def test_quantisation_keeps_four_bits(outliers):
    q, k, v, *weights, rope = inputs((4, 8, 8), 4, outliers=outliers)
    operands = rms_norm_rope_fp8(q, k, v, *weights, key_scale(weights[1], 4), rope, EPS)
    turned_q, turned_k = reference(*wide(q, k, *weights, rope), EPS)
    q8, k8, v8 = dequantize(*operands, torch.float64)
    assert error(q8, turned_q) < 3.5e-2
    assert error(v8, v) < 3.5e-2
    centre = turned_k[sample_tokens(len(k))].mean(0)
    assert error(k8 + centre, turned_k) < 3.5e-2


@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_parts_with_the_statistics_of_the_whole_are_quantised_as_the_whole(tokens, parts, dtype):
    """Parts begin at multiples of 16 tokens, where a group of `interleave` does."""
    q, k, v, *weights, rope = inputs((1, tokens, 8), 2, dtype=dtype)
    scale = key_scale(weights[1], 2)
    q8, q_scale, k8, _, v8, v_scale = rms_norm_rope_fp8(q, k, v, *weights, scale, rope, EPS)
    chosen = sample_tokens(len(k))
    statistics = kv_statistics(k[chosen].clone(), v[chosen].clone(), weights[1], rope[chosen], EPS)
    assert torch.equal(statistics[1], v_scale)
    size = -(-len(q) // (16 * parts)) * 16
    cut = [
        rms_norm_rope_fp8(*(x[i : i + size] for x in (q, k, v)), *weights, scale, rope[i : i + size], EPS, statistics)
        for i in range(0, len(q), size)
    ]
    assert torch.equal(torch.cat([part[0] for part in cut]).view(torch.uint8), q8.view(torch.uint8))
    assert torch.equal(torch.cat([part[1] for part in cut]), q_scale)
    assert torch.equal(torch.cat([part[2] for part in cut]).view(torch.uint8), k8.view(torch.uint8))
    assert torch.equal(torch.cat([part[4].view(torch.uint8) for part in cut], 2), v8.view(torch.uint8))


def test_attention_of_quantised_operands():
    """The error is what e4m3 causes: at most a sixteenth, relative, in every operand."""
    q, k, v, *weights, rope = inputs((4, 8, 8), 2, outliers=5.0)
    operands = rms_norm_rope_fp8(q, k, v, *weights, key_scale(weights[1], 2), rope, EPS)
    turned = reference(*wide(q, k, *weights, rope), EPS)
    expected = attention_reference(*turned, v.double())[0]
    assert error(chunk_attention_fp8(*operands), expected) < 0.15


def test_smoothing_removes_a_common_key():
    """The error of the logits where all keys share a channel that is much larger than their differences.

    An error that is the same for all keys of a query does not count: the softmax removes it.
    """
    q, k, v, *weights, rope = inputs((4, 8, 8), 2)
    weights = [torch.ones_like(w) for w in weights]
    k = k.clone()
    k[:, :, 2 * 40] += 60  # a pair that hardly rotates
    turned_q, turned_k = reference(*wide(q, k, *weights, rope), EPS)
    _, _, k8, k_scale, _, _ = rms_norm_rope_fp8(q, k, v, *weights, key_scale(weights[1], 2), rope, EPS)

    def lost(keys: Tensor) -> float:
        logits = torch.einsum("qhd,khd->hqk", turned_q, keys * k_scale.double()[:, None] - turned_k)
        return (logits - logits.mean(2, keepdim=True)).norm().item()

    assert lost(k8.double()) < 0.4 * lost((turned_k / k_scale.double()[:, None]).to(FP8).double())


def test_values_beyond_the_sampled_range_saturate():
    q, k, v, *weights, rope = inputs((3, 8, 8), 1)
    late = next(i for i in range(len(v)) if i not in sample_tokens(len(v)))
    v = v.clone()
    v[late] = 1e6
    *_, v8, _ = rms_norm_rope_fp8(q, k, v, *weights, key_scale(weights[1], 1), rope, EPS)
    assert v8.float().amax() == 448
    assert v8.float().isfinite().all()


@given(st.integers(1, 20000))
def test_sampled_tokens_are_distinct(tokens):
    chosen = sample_tokens(tokens)
    assert len(set(chosen)) == len(chosen) == min(tokens, NUM_SAMPLES)
    assert all(0 <= i < tokens for i in chosen)


def test_sampled_tokens_spread_over_rows_and_columns():
    chosen = torch.tensor(sample_tokens(9 * 48 * 28))
    for period, count in ((28, 28), (48 * 28, 100), (9 * 48 * 28, NUM_SAMPLES)):
        assert len((chosen % period).unique()) >= count


def test_keys_never_exceed_their_scale():
    weight = (torch.randn(256) * 2).exp()
    k = torch.zeros(1, 2, 128)
    k[0, int(weight.argmax()) // 128, int(weight.argmax()) % 128] = 1e3
    turned = reference(k, k, weight, weight, torch.tensor([[[1.0, 0.0]] * 64]), EPS)[1]
    assert (2 * turned.abs().amax(2) <= 448 * key_scale(weight, 2) * (1 + 1e-5)).all()


# --- As torch ops ---------------------------------------------------------------------------------------------------


def test_opcheck():
    q, k, v, *weights, rope = inputs((2, 3, 4), 2)
    torch.library.opcheck(module.rms_norm_rope_op.library_op, (q, k, *weights, rope, EPS))
    torch.library.opcheck(module.kv_statistics_op.library_op, (k, v, weights[1], rope, EPS))
    statistics = kv_statistics(k, v, weights[1], rope, EPS)
    for extra in ((None, None), statistics):
        torch.library.opcheck(
            module.rms_norm_rope_fp8_op.library_op, (q, k, v, *weights, key_scale(weights[1], 2), rope, EPS, *extra)
        )


def test_compiles_without_graph_breaks():
    q, k, v, *weights, rope = inputs((2, 3, 4), 2)
    scale = key_scale(weights[1], 2)
    for function, arguments in ((rms_norm_rope, (q, k)), (rms_norm_rope_fp8, (q, k, v))):
        extra = (scale,) if function is rms_norm_rope_fp8 else ()
        call: Any = (*arguments, *weights, *extra, rope)
        for x, y in zip(
            torch.compile(function, fullgraph=True, backend="aot_eager")(*call), function(*call), strict=True
        ):
            torch.testing.assert_close(x.float(), y.float())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("q", lambda x: x[0], "q: shape [2, 16], wanted [tokens, heads, head_dim]"),
        ("q", lambda x: x.double(), "q: torch.float64, wanted torch.float32 or torch.float16 or torch.bfloat16"),
        ("k", lambda x: x[:5], "k: shape [5, 2, 16], wanted [6, 2, 16]"),
        ("k", lambda x: x.half(), "k: torch.float16, wanted torch.float32"),
        ("k", lambda x: x.to("meta"), "k: on meta, wanted cpu"),
        (
            "k",
            lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            "k: strides (32, 1, 2) for shape [6, 2, 16], wanted contiguous memory of each token",
        ),
        ("v", lambda x: x[:, :1], "v: shape [6, 1, 16], wanted [6, 2, 16]"),
        ("q_weight", lambda x: x[:16], "q_weight: shape [16], wanted [32]"),
        ("rope", lambda x: x[:5], "rope: shape [5, 8, 2], wanted [6, 8, 2]"),
        ("rope", lambda x: x.double(), "rope: torch.float64, wanted torch.float32"),
        ("q", lambda x: x[..., :15].contiguous(), "q: head_dim 15, wanted an even number"),
        ("k_scale", lambda x: x[:1], "k_scale: shape [1], wanted [2]"),
        ("v", lambda x: x.clone().requires_grad_(), "v: requires a gradient"),
    ],
)
def test_bad_arguments(name, change, words):
    q, k, v, q_weight, k_weight, rope = inputs((1, 2, 3), 2, 16)
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "q_weight": q_weight, "k_weight": k_weight, "rope": rope}
    given["k_scale"] = key_scale(k_weight, 2)
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        rms_norm_rope_fp8(**given | {name: change(given[name])})
    assert words in str(raised.value)


# --- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("grid", "heads"), [((1, 1, 1), 1), ((2, 5, 7), 5), ((3, 9, 11), 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu(grid, heads, dtype):
    q, k, v, *weights, rope = inputs(grid, heads, dtype=dtype, outliers=5.0, device="cuda")
    scale = key_scale(weights[1], heads)
    with poisoned_memory():
        turned = rms_norm_rope(q, k, *weights, rope, EPS)
        operands = rms_norm_rope_fp8(q, k, v, *weights, scale, rope, EPS)
    expected = reference(*wide(q, k, *weights, rope), EPS)
    for x, y in zip(turned, expected, strict=True):
        assert error(x, y) < (1e-5 if dtype == torch.float32 else 5e-3)
    wanted = reference_fp8(q, k, v, *weights, scale, rope, EPS)
    names = ("q8", "q_scale", "k8", "v8", "v_scale")
    for name, x, y in zip(names, (*operands[:3], *operands[4:]), wanted, strict=True):
        # A value at the edge between two of e4m3's may fall either way.
        assert (x.float() - y.float()).norm() <= 1e-2 * y.float().norm(), name
    again = rms_norm_rope_fp8(q, k, v, *weights, scale, rope, EPS)
    assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(operands, again, strict=True))
