"""The kernels of RMSNorm, rotation and quantisation against their definition in float64."""

# pyright: reportCallIssue=false

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import norm
from kernels.chunk_attention import interleave
from kernels.norm import (
    FP8_MAX,
    HEADROOM,
    key_scale,
    launch_fp8,
    launch_rms_norm_rope,
    launch_rows,
    layer_norm_reference,
    reference,
    sample,
)
from profiling.measure.check import poisoned_memory

EXAMPLES = settings(deadline=None, max_examples=15)
EPS = 1e-6


@pytest.fixture(autouse=True)
def _poisoned():
    """What is not written is NaN."""
    with poisoned_memory():
        yield


def error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm()).item()


def inputs(tokens: int, heads: int, d: int, fused: bool, seed: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """q, k, v as slices of a projection or on their own; weights; rotations."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, 3, heads, d, generator=generator)
    rows = list(qkv.unbind(1)) if fused else [x.contiguous() for x in qkv.unbind(1)]
    weights = list(1 + torch.randn(2, heads * d, generator=generator) / 4)
    angles = torch.randn(tokens, d // 2, generator=generator) * 3
    return rows, weights, torch.stack((angles.cos(), angles.sin()), -1)


SHAPES = st.integers(1, 9), st.sampled_from([1, 2, 5, 9]), st.sampled_from([16, 64]), st.booleans(), st.integers(0, 99)


@EXAMPLES
@given(*SHAPES)
def test_norm_and_rotation(tokens, heads, d, fused, seed):
    (q, k, _), weights, rope = inputs(tokens, heads, d, fused, seed)
    turned = launch_rms_norm_rope(q, k, *weights, rope, EPS)
    wide = reference(q.double(), k.double(), *(w.double() for w in weights), rope.double(), EPS)
    assert error(turned[0], wide[0]) < 1e-6
    assert error(turned[1], wide[1]) < 1e-6


def test_half_precision_is_rounded_once():
    (q, k, _), weights, rope = inputs(5, 2, 64, True, 0)
    q, k = q.half(), k.half()
    turned = launch_rms_norm_rope(q, k, *weights, rope, EPS)
    wide = reference(q.double(), k.double(), *(w.double() for w in weights), rope.double(), EPS)
    for x, expected in zip(turned, wide, strict=True):
        torch.testing.assert_close(x, expected.half(), rtol=1e-3, atol=1e-3)


@EXAMPLES
@given(*SHAPES)
def test_quantised(tokens, heads, d, fused, seed):
    """Before rounding, which the interpreter cannot do."""
    (q, k, v), weights, rope = inputs(tokens, heads, d, fused, seed)
    k_scale = key_scale(weights[1], heads)
    q8, q_scale, k8, v8, v_scale = launch_fp8(q, k, v, *weights, k_scale, rope, EPS)
    turned = reference(q.double(), k.double(), *(w.double() for w in weights), rope.double(), EPS)
    assert q8.abs().amax() <= FP8_MAX
    assert error(q8.double() * q_scale.double()[..., None], turned[0]) < 1e-6
    torch.testing.assert_close(q8.abs().amax(2), torch.full_like(q_scale, FP8_MAX))
    centre = turned[1][sample(tokens)].mean(0)
    torch.testing.assert_close(k8.double() * k_scale.double()[:, None] + centre, turned[1], rtol=1e-5, atol=1e-5)
    largest = v[sample(tokens)].abs().amax(0)
    torch.testing.assert_close(v_scale, largest * HEADROOM / FP8_MAX)
    assert v8.shape == (heads, d, -(-tokens // 16) * 16)
    order = torch.from_numpy(interleave(tokens))
    assert (v8[..., order >= tokens] == 0).all()
    inside = order < tokens
    torch.testing.assert_close(v8[..., inside].permute(2, 0, 1) * v_scale, v[order[inside]], rtol=1e-5, atol=1e-6)


def test_a_sample_of_many_tokens(monkeypatch):
    monkeypatch.setattr(norm, "SAMPLE", 4)
    (q, k, v), weights, rope = inputs(11, 2, 16, True, 3)
    v[2] *= 1000  # not of the sample
    assert 2 not in sample(11)
    k_scale = key_scale(weights[1], 2)
    _, _, k8, v8, v_scale = launch_fp8(q, k, v, *weights, k_scale, rope, EPS)
    turned = reference(q.double(), k.double(), *(w.double() for w in weights), rope.double(), EPS)[1]
    centre = turned[sample(11)].mean(0)
    torch.testing.assert_close(k8.double() * k_scale.double()[:, None] + centre, turned, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v_scale, v[sample(11)].abs().amax(0) * HEADROOM / FP8_MAX)
    assert v8.abs().amax() == FP8_MAX  # saturated


def test_zeros_stay_zeros():
    zeros = torch.zeros(3, 1, 16)
    ones = torch.ones(16)
    rope = torch.stack((torch.ones(3, 8), torch.zeros(3, 8)), -1)
    outputs = launch_fp8(zeros, zeros, zeros, ones, ones, key_scale(ones, 1), rope, EPS)
    assert all(x.isfinite().all() for x in outputs)
    assert (outputs[0] == 0).all()
    assert (outputs[3] == 0).all()


@EXAMPLES
@given(st.integers(1, 9), st.sampled_from([1, 3, 16, 65, 96]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_layer_norm(rows, columns, modulated, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(rows, 2 * columns, generator=generator)
    x = x[:, :columns] if strided else x[:, :columns].contiguous()
    weight, bias = torch.randn(2, columns, generator=generator)
    one = float(modulated)
    expected = layer_norm_reference(x.double(), weight.double(), bias.double(), EPS, one)
    out, none = launch_rows(x, (weight, bias, EPS, one), fp8=False)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)  # 3 less 3 in one column
    assert len(none) == 0
    out, scale = launch_rows(x, (weight, bias, EPS, one), fp8=True)
    torch.testing.assert_close(out.double() * scale.double()[:, None], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.abs().amax(1), torch.full((rows,), FP8_MAX))


def test_layer_norm_of_rows_without_variance():
    """What is left is the bias, or nothing at all; an outlier is normalised like any value."""
    x = torch.full((3, 32), 5.0)
    x[1, 7] = 1e6
    zeros = torch.zeros(32)
    out, scale = launch_rows(x, (zeros, zeros, EPS, 1.0), fp8=True)
    assert out.isfinite().all()
    assert (out[0] == 0).all()
    assert scale[0] == pytest.approx(1e-12)
    expected = layer_norm_reference(x.double(), zeros.double(), zeros.double(), EPS, 1.0)
    assert error(out * scale[:, None], expected) < 1e-5


def test_half_precision_layer_norm():
    x = torch.randn(5, 48).half()
    weight, bias = torch.randn(2, 48)
    out, _ = launch_rows(x, (weight, bias, EPS, 0.0), fp8=False)
    expected = layer_norm_reference(x.double(), weight.double(), bias.double(), EPS)
    torch.testing.assert_close(out, expected.half(), rtol=1e-3, atol=1e-3)
