"""Attention to text, image and audio: on the CPU, as torch sees it, and on a GPU.

The kernels also run in Triton's interpreter: `interpreted/cross_attention.py`.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cross_attention
from kernels.chunk_attention import reference as attention
from kernels.cross_attention import (
    absorb_audio_projections,
    absorbed_audio_attention,
    frame_attention,
    frame_kv_ranges,
    frame_reference,
    launch_absorb,
    text_image_attention,
    text_image_reference,
)
from kernels.linear import dequantize, quantize_rows
from profiling.measure.check import poisoned_memory


def error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def text_image(
    tokens: int, real: int, text: int, image: int, heads: int = 2, d: int = 64, **kind: Any
) -> tuple[list[Tensor], Tensor]:
    """Operands whose text keys are equal from `real` on, and `real` as a tensor."""
    q, k, v, image_k, image_v = draw(*[(n, heads, d) for n in (tokens, real + 1, real + 1, image, image)], **kind)
    k, v = (torch.cat((x[:real], x[real:].expand(text - real, -1, -1))) for x in (k, v))
    return [q, k, v, image_k, image_v], torch.tensor([real], dtype=torch.int32, device=q.device)


# --- On the CPU -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 20), st.integers(1, 40))
def test_text_image(tokens, real, padding, image):
    operands, count = text_image(tokens, real, real + padding, image)
    expected = text_image_reference(*(x.double() for x in operands))
    assert error(text_image_attention(*operands, count), expected) < 1e-5
    assert error(text_image_attention(*operands), expected) < 1e-5


def test_two_softmaxes_are_not_one():
    operands, _ = text_image(5, 4, 6, 7)
    q, k, v, image_k, image_v = operands
    one = attention(q, torch.cat((k, image_k)), torch.cat((v, image_v)))[0]
    assert error(text_image_attention(*operands), one) > 0.1


def test_frame_spans():
    assert frame_kv_ranges(10, 32, 4, 0) == ((0, 4, 0, 32), (4, 8, 32, 64), (8, 10, 64, 96))
    assert frame_kv_ranges(5, 32, 4, 6) == ((0, 2, 32, 64), (2, 5, 64, 96))
    assert frame_kv_ranges(2, 32, 4, 5) == ((0, 2, 32, 64),)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 45), st.sampled_from([1, 32]))
def test_frames(tokens, per_frame, first, keys):
    frames = -(-(first + tokens) // per_frame)
    q, k, v = draw((tokens, 2, 64), (frames, keys, 2, 64), (frames, keys, 2, 64))
    expected = torch.cat(
        [
            attention(q[i, None].double(), *(x[(first + i) // per_frame].double() for x in (k, v)))[0]
            for i in range(tokens)
        ]
    )
    assert error(frame_attention(q, k, v, per_frame, first), expected) < 1e-5


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 45), st.sampled_from([16, 32]))
def test_folded_is_the_layer(tokens, per_frame, first, keys):
    """Projection, attention, projection."""
    heads, d, width = 2, 16, 24
    frames = -(-(first + tokens) // per_frame)
    z, k, v = draw((tokens, width), (frames, keys, heads, d), (frames, keys, heads, d))
    q_weight, q_bias, weight = draw((heads * d, width), (heads * d,), (width, heads * d))
    q = (z.double() @ q_weight.double().T + q_bias.double()).unflatten(1, (heads, d))
    expected = frame_reference(q, k.double(), v.double(), per_frame, first).flatten(1) @ weight.double().T
    folded = absorb_audio_projections(k, v, q_weight, q_bias, weight)
    assert error(absorbed_audio_attention(z, *folded, keys, per_frame, first), expected) < 1e-5


def test_folds_quantised_weights():
    layer = audio_layer()
    k, v, q_weight, q_bias, weight = (layer[name] for name in ("k", "v", "q_weight", "q_bias", "weight"))
    (q8, q_scale), (w8, scale) = quantize_rows(q_weight), quantize_rows(weight)
    folded = absorb_audio_projections(k, v, q8, q_bias, w8, q_scale, scale)
    expected = absorb_audio_projections(k, v, dequantize(q8, q_scale), q_bias, dequantize(w8, scale))
    for x, y in zip(folded, expected, strict=True):
        torch.testing.assert_close(x, y)


# --- As torch sees them ---------------------------------------------------------------------------------------------


def audio_layer() -> dict[str, Tensor]:
    names = ("z", "k", "v", "q_weight", "q_bias", "weight")
    shapes = (12, 24), (3, 16, 2, 16), (3, 16, 2, 16), (32, 24), (32,), (24, 32)
    return dict(zip(names, draw(*shapes), strict=True))


def test_opcheck():
    operands, real = text_image(5, 4, 6, 7)
    torch.library.opcheck(cross_attention._text_image_attention, (*operands, real))
    torch.library.opcheck(cross_attention._text_image_attention, (*operands, None))
    torch.library.opcheck(cross_attention._frame_attention, (*draw((7, 2, 16), (2, 16, 2, 16), (2, 16, 2, 16)), 4, 1))
    layer = audio_layer()
    weights = [layer[name] for name in ("k", "v", "q_weight", "q_bias", "weight")]
    torch.library.opcheck(cross_attention._fold_audio, (*weights, None, None))
    folded = absorb_audio_projections(*weights)
    torch.library.opcheck(cross_attention._folded_attention, (layer["z"], *folded, 16, 4, 0))


def test_compiles_without_a_break():
    operands, real = text_image(5, 4, 6, 7)
    whole = torch.compile(text_image_attention, fullgraph=True)
    torch.testing.assert_close(whole(*operands, real), text_image_attention(*operands, real))
    layer = audio_layer()

    def run(z: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, weight: Tensor) -> Tensor:
        q = (z @ q_weight.T + q_bias).view(len(z), 2, 16)
        folded = absorbed_audio_attention(z, *absorb_audio_projections(k, v, q_weight, q_bias, weight), 16, 4)
        return folded + frame_attention(q, k, v, 4).flatten(1) @ weight.T

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(**layer), run(**layer), rtol=1e-4, atol=1e-4)


Q, K, Z = torch.zeros(6, 2, 16), torch.zeros(4, 2, 16), torch.zeros(6, 5)
KF, APART = torch.zeros(3, 16, 2, 16), torch.zeros(3, 20, 2, 16)[:, :16]
ONE = torch.tensor([1])


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (text_image_attention, (Q, K, K[:3], K, K), "text_v: shape [3, 2, 16], wanted [4, 2, 16]"),
        (text_image_attention, (Q, K, K, K[:, :1], K[:, :1]), "image_k: shape [4, 1, 16], wanted [at least 1, 2, 16]"),
        (text_image_attention, (Q, K[:0], K[:0], K, K), "text_k: shape [0, 2, 16], wanted [at least 1, 2, 16]"),
        (text_image_attention, (Q[:0], K, K, K, K), "q: shape [0, 2, 16], wanted [tokens, heads, channels]"),
        (text_image_attention, (Q.double(), K, K, K, K), "q: torch.float64, wanted float32"),
        (text_image_attention, (Q, K.half(), K, K, K), "text_k: torch.float16 on cpu, wanted torch.float32 on cpu"),
        (text_image_attention, (Q, K, K, K.to("meta"), K), "image_k: torch.float32 on meta"),
        (text_image_attention, (Q, K, K, K, K, ONE), "real: torch.int64 [1] on cpu, wanted one torch.int32"),
        (text_image_attention, (Q.clone().requires_grad_(), K, K, K, K), "q: requires a gradient"),
        (text_image_attention, (Q.transpose(1, 2).contiguous().transpose(1, 2), K, K, K, K), "q: stride 2 along"),
        (frame_attention, (Q, K, K, 2), "k: shape [4, 2, 16], wanted [frames, keys, heads, channels]"),
        (frame_attention, (Q, KF, KF[:2], 2), "v: shape [2, 16, 2, 16], wanted [3, 16, 2, 16]"),
        (frame_attention, (Q, KF, KF, 1), "k: 3 frames, tokens up to 6 need 6"),
        (frame_attention, (Q, KF, KF, 2, 1), "k: 3 frames, tokens up to 7 need 4"),
        (frame_attention, (Q, KF, KF, 0), "per_frame: 0"),
        (frame_attention, (Q, KF, KF, 2, -1), "first: -1"),
        (frame_attention, (Q, APART, KF, 2), "k: strides (640, 32, 16, 1), wanted frames 512"),
        (absorb_audio_projections, (K, K, Q[0], Q, Q), "k: shape [4, 2, 16], wanted [frames, keys, heads, channels]"),
        (launch_absorb, (KF[:, :3], KF[:, :3], Q[0], Q, Q), "k: 3 keys a frame, wanted a power of two from 16 on"),
        (absorb_audio_projections, (KF, KF, torch.zeros(30, 5), torch.zeros(32), Q), "q_weight: shape [30, 5], wanted [32, 5]"),
        (
            absorb_audio_projections,
            (KF, KF, torch.zeros(32, 5), torch.zeros(32), torch.zeros(5, 32), torch.zeros(32)),
            "q_weight: torch.float32 on cpu, wanted torch.float8_e4m3fn on cpu",
        ),
        (absorbed_audio_attention, (Z, torch.zeros(3, 32, 4), Q, Q, 16, 2), "keys: shape [3, 32, 4], wanted [3, 32, 5]"),
        (absorbed_audio_attention, (Z, torch.zeros(3, 30, 5), Q, Q, 16, 2), "keys: shape [3, 30, 5], wanted"),
    ],
)  # fmt: skip
def test_bad_arguments(function: Any, arguments: Any, words: str):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        function(*arguments)
    assert words in str(raised.value)


# --- On a GPU -------------------------------------------------------------------------------------------------------

KINDS = [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)]


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "real", "text", "image"), [(1, 1, 1, 1), (300, 20, 512, 257), (129, 512, 512, 64)])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(("dtype", "bound"), KINDS)
def test_gpu_text_image(tokens, real, text, image, d, dtype, bound):
    operands, count = text_image(tokens, min(real, text - 1), text, image, 3, d, dtype=dtype, device="cuda")
    expected = text_image_reference(*(x.double() for x in operands))
    with poisoned_memory():
        assert error(text_image_attention(*operands, count), expected) < bound
        assert error(text_image_attention(*operands), expected) < bound


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "per_frame", "first"), [(1, 1, 0), (700, 336, 100), (1512, 1344, 3024)])
@pytest.mark.parametrize(("dtype", "bound"), KINDS)
def test_gpu_audio(tokens, per_frame, first, dtype, bound):
    heads, d, keys, width = 3, 128, 32, 384
    frames = -(-(first + tokens) // per_frame)
    kind: Any = {"dtype": dtype, "device": "cuda"}
    z, k, v = draw((tokens, width), (frames, keys, heads, d), (frames, keys, heads, d), **kind)
    q_weight, q_bias, weight = draw((heads * d, width), (heads * d,), (width, heads * d), **kind)
    q_weight, weight = q_weight / width**0.5, weight / (heads * d) ** 0.5
    q = z.double() @ q_weight.double().T + q_bias.double()
    rounded = q.to(dtype).unflatten(1, (heads, d))
    with poisoned_memory():
        direct = frame_attention(rounded, k, v, per_frame, first)
        folded = absorbed_audio_attention(
            z, *absorb_audio_projections(k, v, q_weight, q_bias, weight), keys, per_frame, first
        )
    assert error(direct, frame_reference(rounded.double(), k.double(), v.double(), per_frame, first)) < bound
    exact = frame_reference(q.unflatten(1, (heads, d)), k.double(), v.double(), per_frame, first).flatten(1)
    assert error(folded, exact @ weight.double().T) < 2 * bound
