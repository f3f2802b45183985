"""The kernels of RMSNorm, rotary embedding and their quantisation, compared with the reference in float64."""

# pyright: reportCallIssue=false

import importlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.chunk_attention_fp8 import interleave
from kernels.common import FP8_MAX
from kernels.rms_norm_rope import (
    VALUE_HEADROOM,
    key_scale,
    launch_kv_statistics,
    launch_rms_norm_rope,
    launch_rms_norm_rope_fp8,
    reference,
    sample_tokens,
)
from tests.tensors import error

rms_norm_rope = importlib.import_module("kernels.rms_norm_rope")  # the module; `kernels.rms_norm_rope` is its function

EXAMPLES = settings(max_examples=15)
EPS = 1e-6


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
    """Without rounding to e4m3, which the interpreter cannot do."""
    (q, k, v), weights, rope = inputs(tokens, heads, d, fused, seed)
    k_scale = key_scale(weights[1], heads)
    q8, q_scale, k8, v8, v_scale = launch_rms_norm_rope_fp8(q, k, v, *weights, k_scale, rope, EPS)
    turned = reference(q.double(), k.double(), *(w.double() for w in weights), rope.double(), EPS)
    assert q8.abs().amax() <= FP8_MAX
    assert error(q8.double() * q_scale.double()[..., None], turned[0]) < 1e-6
    torch.testing.assert_close(q8.abs().amax(2), torch.full_like(q_scale, FP8_MAX))
    centre = turned[1][sample_tokens(tokens)].mean(0)
    torch.testing.assert_close(k8.double() * k_scale.double()[:, None] + centre, turned[1], rtol=1e-5, atol=1e-5)
    largest = v[sample_tokens(tokens)].abs().amax(0)
    torch.testing.assert_close(v_scale, largest * VALUE_HEADROOM / FP8_MAX)
    assert v8.shape == (heads, d, -(-tokens // 16) * 16)
    order = torch.from_numpy(interleave(tokens))
    assert (v8[..., order >= tokens] == 0).all()
    inside = order < tokens
    torch.testing.assert_close(v8[..., inside].permute(2, 0, 1) * v_scale, v[order[inside]], rtol=1e-5, atol=1e-6)


def test_a_sample_of_many_tokens(monkeypatch):
    monkeypatch.setattr(rms_norm_rope, "NUM_SAMPLES", 4)
    (q, k, v), weights, rope = inputs(11, 2, 16, True, 3)
    v[2] *= 1000  # not sampled
    assert 2 not in sample_tokens(11)
    k_scale = key_scale(weights[1], 2)
    _, _, k8, v8, v_scale = launch_rms_norm_rope_fp8(q, k, v, *weights, k_scale, rope, EPS)
    turned = reference(q.double(), k.double(), *(w.double() for w in weights), rope.double(), EPS)[1]
    centre = turned[sample_tokens(11)].mean(0)
    torch.testing.assert_close(k8.double() * k_scale.double()[:, None] + centre, turned, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v_scale, v[sample_tokens(11)].abs().amax(0) * VALUE_HEADROOM / FP8_MAX)
    assert v8.abs().amax() == FP8_MAX  # saturated


def test_parts_with_the_statistics_of_the_whole_are_quantised_as_the_whole(monkeypatch):
    monkeypatch.setattr(rms_norm_rope, "NUM_SAMPLES", 16)
    (q, k, v), weights, rope = inputs(40, 2, 16, True, 3)
    k_scale, chosen = key_scale(weights[1], 2), sample_tokens(40)
    q8, q_scale, k8, v8, v_scale = launch_rms_norm_rope_fp8(q, k, v, *weights, k_scale, rope, EPS)
    statistics = launch_kv_statistics(k[chosen], v[chosen], weights[1], rope[chosen], EPS)
    assert torch.equal(statistics[1], v_scale)
    parts = [
        launch_rms_norm_rope_fp8(q[i:j], k[i:j], v[i:j], *weights, k_scale, rope[i:j], EPS, *statistics)
        for i, j in ((0, 16), (16, 40))
    ]
    for whole, part, axis in zip((q8, q_scale, k8, v8), zip(*parts, strict=True), (0, 0, 0, 2), strict=False):
        assert torch.equal(whole, torch.cat(part, axis))


def test_zeros_stay_zeros():
    zeros = torch.zeros(3, 1, 16)
    ones = torch.ones(16)
    rope = torch.stack((torch.ones(3, 8), torch.zeros(3, 8)), -1)
    outputs = launch_rms_norm_rope_fp8(zeros, zeros, zeros, ones, ones, key_scale(ones, 1), rope, EPS)
    assert all(x.isfinite().all() for x in outputs)
    assert (outputs[0] == 0).all()
    assert (outputs[3] == 0).all()
