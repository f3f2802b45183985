"""Attention to text and image: on the CPU, as a torch operator, on a model of Hopper, and on a GPU.

`interpreted/text_image_attention.py` runs the Triton kernel in Triton's interpreter.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import text_image_attention_sm90
from kernels.chunk_attention import reference as attention_reference
from kernels.common import FP8, FP8_MAX
from kernels.layer_norm import quantize_rows
from kernels.text_image_attention import (
    text_image_attention,
    text_image_attention_op,
    text_image_attention_quantized,
    text_image_attention_quantized_op,
    text_image_bound,
    text_image_bounded_reference,
    text_image_reference,
)
from kernels.text_image_attention_sm90 import image_tiles, launch_sm90, supports
from kernels.tuning import GPU, TunedConfig
from profiling.measure.check import poisoned_memory
from tests.fake_gluon import fake_hopper
from tests.tensors import draw, error

module = importlib.import_module("kernels.text_image_attention")


def text_image(
    tokens: int, num_text_tokens: int, text: int, image: int, heads: int = 2, head_dim: int = 64, **options: Any
) -> tuple[list[Tensor], Tensor]:
    """Operands whose text keys are equal from `num_text_tokens` on, and that number as a tensor."""
    lengths = (tokens, num_text_tokens + 1, num_text_tokens + 1, image, image)
    q, k, v, image_k, image_v = draw(*[(n, heads, head_dim) for n in lengths], **options)
    padding = text - num_text_tokens
    k, v = (torch.cat((x[:num_text_tokens], x[num_text_tokens:].expand(padding, -1, -1))) for x in (k, v))
    return [q, k, v, image_k, image_v], torch.tensor([num_text_tokens], dtype=torch.int32, device=q.device)


# --- On the CPU -----------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 20), st.integers(1, 40))
def test_text_image(tokens, num_text_tokens, padding, image):
    operands, count = text_image(tokens, num_text_tokens, num_text_tokens + padding, image)
    expected = text_image_reference(*(x.double() for x in operands))
    assert error(text_image_attention(*operands, count), expected) < 1e-5
    assert error(text_image_attention(*operands), expected) < 1e-5


def test_two_softmaxes_are_not_one():
    operands, _ = text_image(5, 4, 6, 7)
    q, k, v, image_k, image_v = operands
    one = attention_reference(q, torch.cat((k, image_k)), torch.cat((v, image_v)))[0]
    assert error(text_image_attention(*operands), one) > 0.1


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_a_norm_in_two_parts(tokens, text, image, seed):
    """1 / rms of the rows of q as a factor of the logits, the norm's weight in the keys: as if q were normalised."""
    q, k, v, image_k, image_v = draw(*[(n, 3, 16) for n in (tokens, text, text, image, image)], seed=seed)
    (weight,) = draw((3, 16), seed=seed + 1)
    q_scale = (5 * q.flatten(1)).square().mean(1).rsqrt()
    normed = 5 * q.double() * q_scale.double()[:, None, None] * weight.double()
    expected = text_image_reference(normed, *(x.double() for x in (k, v, image_k, image_v)))
    assert error(text_image_attention(5 * q, k * weight, v, image_k * weight, image_v, None, q_scale), expected) < 1e-5


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_no_output_exceeds_the_bound(tokens, text, image, seed):
    """Not even where each softmax has all its weight on one key, which the largest logits come near to."""
    q, k, v, image_k, image_v = draw(*[(n, 2, 16) for n in (tokens, text, text, image, image)], seed=seed)
    o = text_image_reference(*(x.double() for x in (100 * q, k, v, image_k, image_v)))
    bound = text_image_bound(v, image_v)
    assert o.abs().max() <= bound.double() * (1 + 1e-6)
    one = text_image_reference(*(x.double() for x in (q, k[:1], v[:1].abs(), image_k[:1], image_v[:1].abs())))
    torch.testing.assert_close(one.max(), text_image_bound(v[:1], image_v[:1]).double())


def test_the_quantised_operation_is_attention_and_quantisation():
    operands, count = text_image(9, 4, 6, 20)
    q_scale = torch.rand(9)
    bound = text_image_bound(operands[2], operands[4])
    o8, o_scale = text_image_attention_quantized(*operands, bound, count, q_scale)
    expected8, expected_scale = quantize_rows(text_image_attention(*operands, count, q_scale).flatten(1))
    assert torch.equal(o8.flatten(1).float(), expected8.float())
    assert torch.equal(o_scale, expected_scale)


@pytest.mark.parametrize("outlier", [1.0, 20.0])
def test_a_scale_from_the_bound_costs_no_precision(outlier):
    """An error of 2.6 %, also with channels 20 times as large, as trained networks have them.

    Scales by row have less where few values are large, because the largest one of a row is then exact.
    """
    operands, count = text_image(300, 20, 64, 257, 4, 32, seed=0)
    for v in (operands[2], operands[4]):
        v[:, 0, :2] *= outlier
    o = text_image_reference(*(x.double() for x in operands))
    bounded8, bounded_scale = text_image_bounded_reference(*operands, text_image_bound(operands[2], operands[4]), count)
    rows8, rows_scale = quantize_rows(o.float().flatten(1))
    bounded = error(bounded8.float() * bounded_scale[:, None, None], o)
    by_row = error(rows8.float() * rows_scale[:, None], o.flatten(1))
    assert 0.01 < by_row < 0.027
    assert 0.02 < bounded < 0.027


# --- As a torch operator --------------------------------------------------------------------------------------------


def test_opcheck():
    operands, count = text_image(5, 4, 6, 7)
    q_scale, bound = torch.rand(5), torch.tensor(3.0)
    torch.library.opcheck(text_image_attention_op.library_op, (*operands, count, q_scale))
    torch.library.opcheck(text_image_attention_op.library_op, (*operands, None, None))
    torch.library.opcheck(text_image_attention_quantized_op.library_op, (*operands, bound, count, q_scale))


def test_compiles_without_a_graph_break():
    operands, count = text_image(5, 4, 6, 7)
    whole = torch.compile(text_image_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*operands, count), text_image_attention(*operands, count))
    quantised = torch.compile(text_image_attention_quantized, fullgraph=True, backend="aot_eager")
    arguments = *operands, torch.tensor(9.0), count, torch.rand(5)
    for x, y in zip(quantised(*arguments), text_image_attention_quantized(*arguments), strict=True):
        assert torch.equal(x.float(), y.float())


Q, K = torch.zeros(6, 2, 16), torch.zeros(4, 2, 16)
STRIDED_HEADS = torch.zeros(4, 4, 16)[:, ::2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((Q, K, K[:3], K, K), "text_v: shape [3, 2, 16], wanted [4, 2, 16]"),
        ((Q, K, K, K[:, :1], K[:, :1]), "image_k: shape [4, 1, 16], wanted [image keys, 2, 16]"),
        ((Q, K[:0], K[:0], K, K), "text_k: shape [0, 2, 16], wanted [text keys, 2, 16]"),
        ((Q[:0], K, K, K, K), "q: shape [0, 2, 16], wanted [tokens, heads, head_dim]"),
        ((Q.double(), K, K, K, K), "q: torch.float64, wanted torch.float32"),
        ((Q, K.half(), K, K, K), "text_k: torch.float16, wanted torch.float32"),
        ((Q, K, K, K.to("meta"), K), "image_k: on meta, wanted cpu"),
        ((Q, K, STRIDED_HEADS, K, K), "text_v: heads 32 apart, wanted 16 as in text_k"),
        ((Q, K, K, K, K, torch.tensor([1])), "num_text_tokens: torch.int64, wanted torch.int32"),
        ((Q, K, K, K, K, torch.zeros(2).int()), "num_text_tokens: shape [2], wanted [1]"),
        ((Q, K, K, K, K, None, torch.zeros(5)), "q_scale: shape [5], wanted [6]"),
        ((Q, K, K, K, K, None, torch.zeros(6).double()), "q_scale: torch.float64, wanted torch.float32"),
        ((Q.clone().requires_grad_(), K, K, K, K), "q: requires a gradient"),
        ((Q.transpose(1, 2).contiguous().transpose(1, 2), K, K, K, K), "q: strides (32, 1, 2) for shape [6, 2, 16]"),
    ],
)
def test_bad_arguments(arguments: Any, words: str):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        text_image_attention(*arguments)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        (torch.zeros(1), "o_bound: shape [1], wanted []"),
        (torch.zeros(()).double(), "o_bound: torch.float64, wanted torch.float32"),
    ],
)
def test_bad_bounds(bound: Tensor, words: str):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        text_image_attention_quantized(Q, K, K, K, K, bound)
    assert words in str(raised.value)


# --- Which back-end runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "tuned", "image", "backend", "config"),
    [
        ("9.0", None, 257, "triton", None),
        ("9.0", TunedConfig("triton", {"BLOCK_M": 64}), 257, "triton", {"BLOCK_M": 64}),
        ("9.0", TunedConfig("gluon", {"STAGES": 1}), 257, "gluon", {"STAGES": 1}),
        ("9.0", TunedConfig("gluon", {"STAGES": 1}), 512, "triton", None),
        ("8.0", TunedConfig("gluon", {"STAGES": 1}), 257, "triton", None),
    ],
)
def test_dispatch(monkeypatch, capability, tuned, image, backend, config):
    """The Hopper kernel runs where a table names it and the keys fit in shared memory."""
    monkeypatch.setattr(module, "gpu_of", lambda _: GPU("any", capability, 132))
    monkeypatch.setattr(module, "tuned_config", lambda *_, **__: tuned)
    monkeypatch.setattr(module, "launch_sm90", lambda *a: (("gluon", a[-1]), None))
    monkeypatch.setattr(module, "launch_text_image", lambda *a: ("triton", a[-1]))
    operands, count = text_image(20, 3, 9, image, 2, 128, dtype=torch.bfloat16)
    assert module.dispatch(*operands, count, None) == (backend, config)


@pytest.mark.parametrize(
    ("capability", "tuned", "backend"),
    [
        ("9.0", None, "separate"),
        ("9.0", TunedConfig("separate", {}), "separate"),
        ("9.0", TunedConfig("fused", {"STAGES": 1}), "fused"),
        ("8.9", TunedConfig("fused", {"STAGES": 1}), "separate"),
    ],
)
def test_dispatch_of_a_quantised_output(monkeypatch, capability, tuned, backend):
    monkeypatch.setattr(module, "gpu_of", lambda _: GPU("any", capability, 132))
    monkeypatch.setattr(module, "tuned_config", lambda operation, *_: tuned if "quantized" in operation else None)
    monkeypatch.setattr(module, "launch_sm90", lambda *a: ("fused", a[-1]))
    monkeypatch.setattr(module, "launch_text_image", lambda q, *_: q)
    monkeypatch.setattr(module, "launch_quantize_rows", lambda o: (o, "separate"))
    operands, count = text_image(20, 3, 9, 257, 2, 128, dtype=torch.bfloat16)
    results = module.dispatch_quantized(*operands, torch.tensor(1.0), count, None)
    assert results == ("fused", tuned.config) if backend == "fused" else results[1] == "separate"


@given(st.integers(33, 2000))
def test_image_tiles_hold_all_keys(image):
    block_n, tail = image_tiles(image)
    assert 2 * block_n < image <= 2 * block_n + tail
    assert 16 <= block_n <= 128
    assert tail >= 16
    assert block_n & (block_n - 1) == tail & (tail - 1) == 0


def test_what_the_hopper_kernel_supports():
    """16 bits, a head_dim of 64 or 128, TMA's alignment, and keys of the image that fit in shared memory."""

    def fits(image: int = 257, head_dim: int = 128, dtype: Any = torch.bfloat16, **config: int) -> bool:
        (q, *kv), _ = text_image(20, 3, 9, image, 2, head_dim, dtype=dtype)
        return supports(q, (kv[0], kv[1]), (kv[2], kv[3]), config)

    assert fits()
    assert fits(dtype=torch.float16)
    assert fits(head_dim=64)
    assert not fits(head_dim=32)
    assert not fits(dtype=torch.float32)
    assert fits(33)
    assert not fits(32)
    assert fits(288)
    assert not fits(289)
    assert fits(289, head_dim=64)
    assert fits(BLOCK_T=16, STAGES=2)
    assert not fits(STAGES=2)
    (q, *kv), _ = text_image(20, 3, 9, 257, 3, 128, dtype=torch.bfloat16)
    for bad in (q[:1].expand(20, -1, -1), torch.zeros(20, 3, 132, dtype=q.dtype)[..., :128]):
        assert not supports(bad, (kv[0], kv[1]), (kv[2], kv[3]), {})


# --- On a model of Hopper -------------------------------------------------------------------------------------------


def on_fake_hopper(
    operands: list[Tensor], count: Tensor | None, q_scale: Tensor | None, bound: Tensor | None, multiprocessors: int,
    seed: int, **config: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, text_k, text_v, image_k, image_v = operands
    fake = fake_hopper(text_image_attention_sm90, "text_image_attention_fwd_sm90", multiprocessors, seed)
    with poisoned_memory(), fake as kernel:
        results = launch_sm90(q, (text_k, text_v), (image_k, image_v), count, q_scale, bound, config)
    assert kernel.launches == 1
    return results


@settings(max_examples=6, deadline=None)
@given(
    tokens=st.integers(1, 200), num_text_tokens=st.integers(1, 40), padding=st.integers(1, 40),
    image=st.integers(33, 70), heads=st.integers(1, 2), multiprocessors=st.integers(1, 4), stages=st.integers(1, 3),
    dedup=st.booleans(), scaled=st.booleans(), quantised=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_hopper(
    tokens, num_text_tokens, padding, image, heads, multiprocessors, stages, dedup, scaled, quantised, seed
):
    """Any number of text keys, resident or streamed; any share of tiles and heads for a program."""
    sizes = tokens, num_text_tokens, num_text_tokens + padding, image, heads, 64
    operands, count = text_image(*sizes, seed=seed, dtype=torch.float16)
    q_scale = 2 * torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) if scaled else None
    bound = text_image_bound(operands[2], operands[4]) if quantised else None
    o, o_scale = on_fake_hopper(
        operands, count if dedup else None, q_scale, bound, multiprocessors, seed, BLOCK_T=16, STAGES=stages
    )
    wide = [x.double() for x in operands]
    expected = text_image_reference(*wide, None, None if q_scale is None else q_scale.double())
    if bound is None:
        assert error(o, expected) < 2e-3
    else:
        assert torch.equal(o_scale, (bound / FP8_MAX).expand(tokens))
        assert error(o.double() * o_scale.double()[:, None, None], expected) < 3.5e-2


def test_hopper_at_the_shape_of_a_head():
    """257 keys of the image, a prompt of 20 tokens in 512; two tiles of queries of each of two heads."""
    operands, count = text_image(200, 20, 512, 257, 2, 128, seed=0, dtype=torch.bfloat16)
    o, _ = on_fake_hopper(operands, count, None, None, 3, 0)
    assert error(o, text_image_reference(*(x.double() for x in operands))) < 5e-3


def test_hopper_with_many_tiles_of_several_heads_for_a_program():
    """So that shared memory is used again, for queries and for the keys of another head, whoever is late."""
    operands, _ = text_image(390, 9, 9, 35, 3, 64, seed=0, dtype=torch.float16)
    expected = text_image_reference(*(x.double() for x in operands))
    for seed in range(4):
        o, _ = on_fake_hopper(operands, None, None, None, 1, seed, BLOCK_T=16)
        assert error(o, expected) < 2e-3


def test_hopper_reads_views_where_they_are():
    q = draw((2, 150, 64), seed=0, dtype=torch.float16)[0].transpose(0, 1)
    text, image = draw((9, 2, 2, 64), (35, 2, 2, 64), seed=1, dtype=torch.float16)
    operands = [q, text[:, 0], text[:, 1], image[:, 0], image[:, 1]]
    o, _ = on_fake_hopper(operands, None, None, None, 2, 0, BLOCK_T=16)
    assert error(o, text_image_reference(*(x.double() for x in operands))) < 2e-3


# --- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "num_text_tokens", "text", "image"), [(1, 1, 1, 1), (300, 20, 512, 257), (129, 512, 512, 64)]
)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)])
def test_gpu_text_image(tokens, num_text_tokens, text, image, head_dim, dtype, bound):
    count = min(num_text_tokens, text - 1)
    operands, count = text_image(tokens, count, text, image, 3, head_dim, dtype=dtype, device="cuda")
    expected = text_image_reference(*(x.double() for x in operands))
    with poisoned_memory():
        assert error(text_image_attention(*operands, count), expected) < bound
        assert error(text_image_attention(*operands), expected) < bound


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "num_text_tokens", "text", "image"),
    [(1, 1, 2, 33), (300, 20, 512, 257), (129, 511, 512, 64), (12096, 20, 512, 257), (1000, 60, 512, 257)],
)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantised", [False, True])
def test_gpu_hopper(tokens, num_text_tokens, text, image, head_dim, dtype, quantised):
    """Twice the same bits, and those of the operation by its other back-end within the tolerance."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    operands, count = text_image(tokens, num_text_tokens, text, image, 3, head_dim, dtype=dtype, device="cuda")
    q_scale = torch.rand(tokens, device="cuda") + 0.5
    q, text_k, text_v, image_k, image_v = operands
    bound = text_image_bound(text_v, image_v) if quantised else None
    arguments = q, (text_k, text_v), (image_k, image_v), count, q_scale, bound
    expected = text_image_reference(*(x.double() for x in operands), None, q_scale.double())
    with poisoned_memory():
        (o, o_scale), (again, _) = launch_sm90(*arguments), launch_sm90(*arguments)
    assert torch.equal(o.view(torch.uint8), again.view(torch.uint8))
    if quantised:
        assert o.dtype == FP8
        assert error(o.double() * o_scale.double()[:, None, None], expected) < 3.5e-2
    else:
        assert error(o, expected) < 5e-3
