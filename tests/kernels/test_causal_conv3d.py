"""The causal convolution, alone and with the norm after it, against its definition in float64."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.causal_conv3d import (
    causal_conv3d,
    causal_conv3d_norm,
    causal_conv3d_norm_op,
    causal_conv3d_norm_reference,
    causal_conv3d_op,
    causal_conv3d_reference,
    conv3d,
    quantize_conv_weight,
)
from kernels.common import FP8
from kernels.conv_sm90 import SMALL_TILE_CHANNELS, supports
from kernels.rms_norm_silu import fp8_out_scale
from kernels.rms_norm_silu import reference as rms_norm_silu_reference
from kernels.tuning import GPU, TunedConfig, assume_gpu
from profiling.measure.check import poisoned_memory

conv = importlib.import_module("kernels.causal_conv3d")  # the module; `kernels.causal_conv3d` is its function

KERNELS = [(3, 3), (3, 1), (1, 1)]
SIZES = st.integers(1, 6)
CHANNELS = st.integers(2, 6)  # the memory format of a single channel is both or neither
ODD_CHANNELS = st.sampled_from([1, 3, 5, 17, 33])


@pytest.fixture(params=["_conv3d_stacked", "_conv3d_library"], autouse=True, scope="module")
def library(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for the library's convolution of CPUs and, run on the CPU, for that of GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "_conv3d_stacked", getattr(conv, request.param))
        yield


def channels_last(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def parameters(inputs: int, outputs: int, kt: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.randn(outputs, inputs, kt, k, k, dtype=torch.float64), torch.randn(outputs, dtype=torch.float64)


def assert_like(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=60)
@given(st.sampled_from(KERNELS), SIZES, CHANNELS, SIZES, SIZES, SIZES, st.booleans(), st.integers(0, 2**31))
def test_equals_reference(kernel, frames, inputs, outputs, rows, columns, has_past, seed):
    torch.manual_seed(seed)
    weight, bias = parameters(inputs, outputs, *kernel)
    x = channels_last(frames, inputs, rows, columns)
    past = channels_last(kernel[0] - 1, inputs, rows, columns) if has_past and kernel[0] > 1 else None
    assert_like(causal_conv3d(x, weight, bias, past), causal_conv3d_reference(x, weight, bias, past))


@settings(max_examples=80)
@given(
    st.sampled_from([*KERNELS, (1, 3)]), st.integers(1, 4), ODD_CHANNELS, ODD_CHANNELS, SIZES, SIZES,
    st.sampled_from([0, 1, 2]), st.booleans(), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_any_number_of_past_frames(kernel, frames, inputs, outputs, rows, columns, past_frames, biased, added, seed):
    """The operation itself: single pixels, channels that no tile divides; what is not written is NaN."""
    torch.manual_seed(seed)
    kt, _ = kernel
    past_frames = min(past_frames, kt - 1)
    weight, bias = parameters(inputs, outputs, *kernel)
    x, past = channels_last(frames, inputs, rows, columns), channels_last(past_frames, inputs, rows, columns)
    residual = channels_last(frames, outputs, rows, columns)
    operands, others = (x, weight, bias if biased else None), (residual if added else None, None)
    zeros = x.new_zeros(kt - 1 - past_frames, *x.shape[1:])
    padded = torch.cat([zeros, past]).contiguous(memory_format=torch.channels_last)
    with poisoned_memory():
        y, from_zeros = causal_conv3d_op(*operands, past, *others), causal_conv3d_op(*operands, padded, *others)
    expected = causal_conv3d_reference(x, weight, bias * biased, padded) + residual * added
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-11)
    if past_frames:  # at a clip's start the taps on zero frames are skipped, and sums come in another order
        assert torch.equal(y, from_zeros)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_reference_is_the_sum_over_earlier_frames_only():
    torch.manual_seed(0)
    weight, bias = parameters(2, 3, 3, 3)
    x = channels_last(5, 2, 4, 6)
    for t in range(5):
        frame = bias[:, None, None] + sum(
            F.conv2d(x[t - lag], weight[:, :, 2 - lag], padding=1) for lag in range(3) if t >= lag
        )
        torch.testing.assert_close(causal_conv3d_reference(x, weight, bias)[t], frame, rtol=1e-12, atol=1e-12)


@settings(max_examples=30)
@given(st.sampled_from([(3, 3), (3, 1)]), st.lists(st.integers(2, 4), min_size=1, max_size=4), st.integers(0, 2**31))
def test_pieces_equal_the_whole(kernel, lengths, seed):
    torch.manual_seed(seed)
    weight, bias = parameters(3, 4, *kernel)
    pieces = [channels_last(length, 3, 5, 4) for length in lengths]
    past, outputs = None, []
    for piece in pieces:
        outputs.append(causal_conv3d(piece, weight, bias, past))
        past = piece[-2:]
    whole = causal_conv3d_reference(torch.cat(pieces), weight, bias)
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fp8", [False, True])
@settings(max_examples=20)
@given(
    st.sampled_from([(3, 3), (3, 1)]), st.lists(st.integers(1, 3), min_size=2, max_size=4), SIZES, SIZES,
    st.integers(0, 2**31),
)  # fmt: skip
def test_pieces_equal_the_whole_bit_for_bit(fp8, kernel, lengths, rows, columns, seed):
    """However a clip is cut, every sum is of the same products, also where a piece has only one frame before it.

    Operands are whole numbers that e4m3 holds exactly. Their sums are exact in any order, which libraries may choose.
    """
    torch.manual_seed(seed)
    weight, bias = (t.mul(4).round().clamp(-16, 16) for t in parameters(17, 5, *kernel))
    clip = channels_last(sum(lengths), 17, rows, columns).mul(4).round().clamp(-16, 16)
    whole = causal_conv3d_reference(clip, weight * 0.5 if fp8 else weight, bias)
    scale = torch.full((5,), 0.5) if fp8 else None
    if fp8:
        clip, weight = clip.to(FP8), weight.to(FP8)
    pieces, end = [], 0
    for length in lengths:
        past, x = clip[max(0, end - 2) : end], clip[end : end + length]  # of 0, 1 or 2 frames
        pieces.append(causal_conv3d_op(x, weight, bias, past, None, scale))
        end += length
    assert torch.equal(torch.cat(pieces), whole)


@settings(max_examples=30)
@given(st.sampled_from(KERNELS), st.integers(1, 3), SIZES, SIZES, SIZES, st.integers(0, 2**31))
def test_strided_equals_torch(kernel, stride, extra, rows, columns, seed):
    torch.manual_seed(seed)
    weight, bias = parameters(2, 5, *kernel)
    x = channels_last(kernel[0] - 1 + extra, 2, rows, columns)
    pad = kernel[1] // 2
    expected = F.conv3d(x.transpose(0, 1)[None], weight, bias, (stride, 1, 1), (0, pad, pad))[0].transpose(0, 1)
    assert_like(conv3d(x, weight, bias, stride), expected)


@pytest.mark.parametrize("channels", [3, 8, 10])
@pytest.mark.parametrize("has_past", [False, True])
def test_float32_is_accurate_and_channels_last(channels, has_past):
    torch.manual_seed(channels)
    weight, bias = parameters(channels, 8, 3, 3)
    x, past = channels_last(4, channels, 16, 12), channels_last(2, channels, 16, 12) if has_past else None
    expected = causal_conv3d_reference(x, weight, bias, past)
    y = causal_conv3d(x.float(), weight.float(), bias.float(), past.float() if past is not None else None)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.linalg.vector_norm(y - expected) <= 1e-5 * torch.linalg.vector_norm(expected)


def test_changes_no_argument():
    torch.manual_seed(0)
    arguments = (channels_last(4, 3, 5, 6), *parameters(3, 2, 3, 3), channels_last(2, 3, 5, 6))
    before = [argument.clone() for argument in arguments]
    causal_conv3d(*arguments)
    causal_conv3d(*arguments[:3])
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_says_what_is_wrong():
    weight, bias = parameters(3, 2, 3, 3)
    x, past = channels_last(4, 3, 5, 6), channels_last(2, 3, 5, 6)
    with pytest.raises(ValueError, match=r"past: shape \[1, 3, 5, 6\], wanted \[2, 3, 5, 6\]"):
        causal_conv3d(x, weight, bias, past[:1])
    with pytest.raises(ValueError, match=r"past: torch.float32, wanted torch.float64"):
        causal_conv3d(x, weight, bias, past.float())
    with pytest.raises(ValueError, match=r"x: shape \[4, 2, 5, 6\], wanted \[frames, 3, rows, columns\]"):
        causal_conv3d(channels_last(4, 2, 5, 6), weight, bias)
    with pytest.raises(ValueError, match=r"x: torch.float32, wanted torch.float64"):
        causal_conv3d(x.float(), weight, bias)
    with pytest.raises(ValueError, match=r"x: strides .* wanted channels-last memory"):
        causal_conv3d(x.contiguous(), weight, bias)
    with pytest.raises(ValueError, match=r"x: shape \[2, 3, 5, 6\], wanted 3 frames or more"):
        conv3d(x[:2], weight, bias)


def assert_one_line(words: str, function: Callable[..., Tensor], *arguments: Any, **more: Any) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        function(*arguments, **more)
    assert "\n" not in str(raised.value)


def test_says_in_one_line_what_else_is_wrong():
    weight, bias = parameters(3, 2, 3, 3)
    x, past = channels_last(4, 3, 5, 6), channels_last(2, 3, 5, 6)
    assert_one_line(r"past: strides .* wanted channels-last memory", causal_conv3d, x, weight, bias, past.contiguous())
    assert_one_line(r"weight: shape .* k odd", causal_conv3d, x, weight[..., :2, :2], bias)
    assert_one_line(r"weight: shape .* k odd", conv3d, x, weight[..., :1], bias)
    assert_one_line(r"bias: shape \[1\], wanted \[2\]", conv3d, x, weight, bias[:1])
    assert_one_line(r"stride: 0, wanted 1 or more", conv3d, x, weight, bias, 0)
    assert_one_line(r"past: shape \[2, 3, 5, 5\], wanted \[2, 3, 5, 6\]", causal_conv3d, x, weight, bias, past[..., :5])
    assert_one_line(r"x: shape \[0, 3, 5, 6\], wanted \[frames, 3,", causal_conv3d, x[:0], weight, bias)
    assert_one_line(r"x: shape \[4, 3, 5\], wanted \[frames, 3, rows", causal_conv3d, x[..., 0], weight, bias)
    assert_one_line(r"x: torch.float16, wanted torch.float64", conv3d, x.half(), weight, bias)
    assert_one_line(r"x: strides .* wanted channels-last memory", conv3d, x.contiguous(), weight, bias)
    residual = channels_last(4, 2, 5, 6)
    words = r"residual: torch.float32, wanted torch.float64"
    assert_one_line(words, causal_conv3d, x, weight, bias, None, residual.float())
    words = r"residual: shape \[4, 2, 5, 6\], wanted \[2, 2, 5, 6\]"
    assert_one_line(words, conv3d, x, weight, bias, residual=residual)
    weight8, scale = quantize_conv_weight(weight, 1.0)
    words = r"scale: torch.float64, wanted torch.float32"
    assert_one_line(words, causal_conv3d, x.to(FP8), weight8, bias, scale=scale.double())
    words = r"residual: torch.float64, wanted torch.float32"  # the bias's, not e4m3
    assert_one_line(words, causal_conv3d, x.to(FP8), weight8, bias.float(), None, residual, scale.float())
    words = r"past: torch.float64, wanted torch.float8_e4m3fn"
    assert_one_line(words, causal_conv3d, x.to(FP8), weight8, bias, past, None, scale.float())


@pytest.mark.parametrize("has_past", [False, True])
def test_a_residual_is_added(has_past):
    torch.manual_seed(0)
    weight, bias = parameters(3, 4, 3, 3)
    x, residual = channels_last(3, 3, 5, 6), channels_last(3, 4, 5, 6)
    past = channels_last(2, 3, 5, 6) if has_past else None
    before = residual.clone()
    expected = causal_conv3d_reference(x, weight, bias, past) + residual
    assert_like(causal_conv3d(x, weight, bias, past, residual), expected)
    assert torch.equal(residual, before)
    strided = conv3d(x, weight, None, 2, residual[:1])
    assert_like(strided, conv3d(x, weight, None, 2) + residual[:1])


def test_says_what_is_wrong_with_a_residual():
    weight, bias = parameters(3, 4, 3, 3)
    x = channels_last(3, 3, 5, 6)
    with pytest.raises(ValueError, match=r"residual: shape \[2, 4, 5, 6\], wanted \[3, 4, 5, 6\]"):
        causal_conv3d(x, weight, bias, None, channels_last(2, 4, 5, 6))
    with pytest.raises(ValueError, match=r"residual: strides .* wanted channels-last memory"):
        causal_conv3d(x, weight, bias, None, torch.zeros(3, 4, 5, 6, dtype=torch.float64))


@settings(max_examples=30)
@given(st.sampled_from(KERNELS), SIZES, CHANNELS, SIZES, SIZES, SIZES, st.booleans(), st.integers(0, 2**31))
def test_norm_and_activation_of_the_convolution(kernel, frames, inputs, outputs, rows, columns, has_past, seed):
    torch.manual_seed(seed)
    (weight, bias), gamma = parameters(inputs, outputs, *kernel), torch.randn(outputs, 1, 1, 1, dtype=torch.float64)
    x, past = (channels_last(n, inputs, rows, columns) for n in (frames, kernel[0] - 1))
    past = past if has_past else None
    y = causal_conv3d_reference(x, weight, bias, past)
    normed = y / y.square().sum(1, keepdim=True).sqrt() * outputs**0.5 * gamma.view(-1, 1, 1)
    expected = normed * normed.sigmoid()
    torch.testing.assert_close(causal_conv3d_norm_reference(x, weight, bias, gamma, past), expected)
    assert_like(causal_conv3d_norm(x, weight, bias, gamma, past), expected)
    out_scale = fp8_out_scale(gamma)
    z = causal_conv3d_norm(x, weight, bias, gamma, past, out_scale=out_scale)
    torch.testing.assert_close(z.double() / out_scale, expected, rtol=2**-4, atol=2**-9 / out_scale)
    assert z.dtype == FP8


@settings(max_examples=30)
@given(SIZES, SIZES, CHANNELS, SIZES, SIZES, st.booleans(), st.integers(0, 2**31))
def test_the_tail_has_the_last_frames_again(frames, kept, outputs, rows, columns, fp8, seed):
    """Bit for bit; memory before and after it stays as it was."""
    torch.manual_seed(seed)
    kept = min(kept, frames)
    (weight, bias), gamma = parameters(3, outputs, 3, 3), torch.randn(outputs, dtype=torch.float64)
    x, past, out_scale = channels_last(frames, 3, rows, columns), channels_last(2, 3, rows, columns), None
    memory = channels_last(kept + 2, outputs, rows, columns).fill_(torch.nan)
    if fp8:
        out_scale, memory = fp8_out_scale(gamma), memory.to(FP8)
    given = x, weight, bias, gamma, past, None, out_scale
    with poisoned_memory():
        y = causal_conv3d_norm(*given, tail=memory[1:-1])
    assert torch.equal(y.double(), causal_conv3d_norm(*given).double())
    assert torch.equal(memory[1:-1].double(), y[-kept:].double())
    assert memory.double()[[0, -1]].isnan().all()


def test_says_what_is_wrong_with_the_tail():
    x, (weight, bias), gamma = channels_last(2, 4, 3, 5), parameters(4, 3, 3, 3), torch.ones(3).double()
    for tail, words in (
        (channels_last(1, 4, 3, 5), r"tail: shape \[1, 4, 3, 5\], wanted \[frames, 3, 3, 5\]"),
        (channels_last(3, 3, 3, 5), r"tail: shape \[3, 3, 3, 5\], wanted 2 frames or fewer"),
        (channels_last(1, 3, 3, 5).float(), r"tail: torch.float32, wanted torch.float64"),
        (torch.zeros(1, 3, 3, 5).double(), r"tail: strides .* wanted channels-last memory"),
    ):
        with pytest.raises(ValueError, match=words) as raised:
            causal_conv3d_norm(x, weight, bias, gamma, tail=tail)
        assert "\n" not in str(raised.value)


def test_says_what_is_wrong_with_gamma():
    x, (weight, bias) = channels_last(1, 4, 3, 3), parameters(4, 2, 1, 1)
    with pytest.raises(ValueError, match=r"gamma: shape \[3\], wanted \[2\]"):
        causal_conv3d_norm(x, weight, bias, torch.ones(3))
    with pytest.raises(ValueError, match=r"gamma: shape \[1, 2\], wanted \[2, 1\]"):
        causal_conv3d_norm(x, weight, bias, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"gamma: strides .* wanted contiguous memory"):
        causal_conv3d_norm(x, weight, bias, torch.ones(4)[::2])


def test_says_that_there_is_no_gradient():
    x, (weight, bias), gamma = channels_last(1, 4, 3, 3), parameters(4, 2, 1, 1), torch.ones(2).double()
    for i, name in enumerate(("x", "weight", "bias", "gamma")):
        operands = [x, weight, bias, gamma]
        operands[i] = operands[i].clone().requires_grad_()
        with pytest.raises(ValueError, match=f"{name}: requires a gradient"):
            causal_conv3d_norm(operands[0], operands[1], operands[2], operands[3])


def test_opcheck_and_compilation():
    torch.manual_seed(0)
    weight, bias = (t.float() for t in parameters(3, 4, 3, 3))
    clip, residual = channels_last(4, 3, 5, 6).float(), channels_last(2, 4, 5, 6).float()
    for arguments in ((clip[2:], weight, bias, clip[:2], residual, None), (clip, weight, None, clip[:0], None, None)):
        torch.library.opcheck(causal_conv3d_op.library_op, arguments)
    for out_scale, tail in ((None, None), (2.0, None), (None, channels_last(1, 4, 5, 6).float())):
        arguments = (clip[2:], weight, bias, bias + 1, clip[:2], None, out_scale, tail)
        torch.library.opcheck(causal_conv3d_norm_op.library_op, arguments)
    whole = torch.compile(conv3d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(clip, weight, bias, 1, residual), conv3d(clip, weight, bias, 1, residual))


def test_what_the_hopper_kernel_supports():
    x, weight = torch.zeros(2, 16, 4, 4).bfloat16(), torch.zeros(8, 16, 3, 3, 3).bfloat16()
    assert supports(x, x[:0], weight)
    assert not supports(x.float(), x[:0].float(), weight.float())
    assert supports(x, x[:1], weight[:3])
    assert not supports(x[:, :12], x[:0], weight[:, :12])  # pixels of 24 bytes
    assert not supports(x, torch.zeros(1000).bfloat16()[1:513].view(2, 16, 4, 4), weight)


def test_dispatch_follows_the_tuned_tables(monkeypatch):
    """Without measurements: the library in 16 bits, the kernel in FP8. On other GPUs than Hopper: the library."""
    taken: list[tuple[str, object]] = []
    monkeypatch.setattr(conv, "launch_library", lambda *_: taken.append(("library", None)))
    monkeypatch.setattr(conv, "launch_sm90", lambda *arguments: taken.append(("gluon", arguments[-1])))
    tables: dict[torch.dtype, TunedConfig | None] = {}
    monkeypatch.setattr(conv, "tuned_conv_config", lambda _operation, x, *_: tables.get(x.dtype))
    x, weight = channels_last(2, 16, 4, 4).bfloat16(), torch.zeros(8, 16, 3, 3, 3).bfloat16()
    x8, weight8, scale = x.to(FP8), weight.to(FP8), torch.ones(8)
    bias = scale.bfloat16()
    gluon = TunedConfig("gluon", {"STAGES": 3})
    for capability, found, expected, expected_fp8 in (
        ("9.0", None, ("library", None), ("gluon", None)),
        ("9.0", gluon, ("gluon", gluon.config), ("gluon", gluon.config)),
        ("9.0", TunedConfig("library", {}), ("library", None), ("library", None)),
        ("8.9", None, ("library", None), ("library", None)),
        ("8.9", gluon, ("library", None), ("library", None)),
    ):
        tables = {} if found is None else {torch.bfloat16: found, FP8: found}
        with assume_gpu(GPU("any", capability, 132)):
            conv.dispatch(x, weight, None, x[:0], None, None)
            conv.dispatch(x8, weight8, bias, x8[:0], None, scale)
        assert taken == [expected, expected_fp8]
        taken.clear()
    tables.clear()
    odd, weight = x8[:, :12].contiguous(memory_format=torch.channels_last), weight8[:, :12]  # pixels of 12 bytes
    with assume_gpu(GPU("any", "9.0", 132)):
        conv.dispatch(odd, weight, bias, odd[:0], None, scale)
        conv.dispatch(x8, weight8, scale, x8[:0], None, scale)  # a result in float32, as its bias
    assert taken == [("library", None)] * 2


def test_dispatch_of_the_norm_follows_the_tuned_tables(monkeypatch):
    """The norm is fused only where measurements say so, and only on Hopper; with a tail, under a name of its own."""
    taken: list[tuple[str, object]] = []
    tails: list[Tensor | None] = []
    names: list[str] = []

    def took(name: str, config: object, tail: Tensor | None) -> None:
        taken.append((name, config))
        tails.append(tail)

    monkeypatch.setattr(conv, "dispatch", lambda *_: None)
    monkeypatch.setattr(conv, "launch_rms_norm_silu", lambda *arguments: took("separate", None, arguments[4]))
    monkeypatch.setattr(conv, "launch_sm90", lambda *arguments: took("fused", arguments[6], arguments[9]))
    x, weight = channels_last(2, 16, 4, 4).bfloat16(), torch.zeros(8, 16, 3, 3, 3).bfloat16()
    gamma, fused = torch.ones(8), TunedConfig("fused", {"STAGES": 3})
    for capability, found, expected in (
        ("9.0", None, ("separate", None)),
        ("9.0", fused, ("fused", fused.config)),
        ("9.0", TunedConfig("separate", {}), ("separate", None)),
        ("8.9", fused, ("separate", None)),
    ):
        monkeypatch.setattr(conv, "tuned_conv_config", lambda name, *_, found=found: names.append(name) or found)
        with assume_gpu(GPU("any", capability, 132)):
            for tail in (None, x[:1, :8]):
                conv.dispatch_norm(x, weight, gamma, gamma, x[:0], None, None, tail)
                assert taken.pop() == expected
                assert tails.pop() is tail
    assert names == ["causal_conv3d_norm", "causal_conv3d_norm_tail"] * 4
    monkeypatch.setattr(conv, "tuned_conv_config", lambda *_: fused)
    x8, weight8 = x.to(FP8), weight.to(FP8)
    with assume_gpu(GPU("any", "9.0", 132)):
        conv.dispatch_norm(x8, weight8, gamma, gamma, x8[:0], gamma, None, None)  # a result in float32, as its bias
        conv.dispatch_norm(x8, weight8, gamma, gamma, x8[:0], gamma, 2.0, None)  # in e4m3
    assert taken == [("separate", None), ("fused", fused.config)]


@pytest.mark.parametrize("outputs", [24, 20])
def test_a_tail_that_tma_cannot_write_is_copied(outputs, monkeypatch):
    """Where output channels are padded, or its memory begins anywhere."""
    stored = []

    def launch(*arguments: Any, tail: Tensor | None, **_: object) -> None:
        y = arguments[6].fill_(1)
        stored.append(tail is not None)
        if tail is not None:
            tail.copy_(y[-len(tail) :])

    monkeypatch.setattr(conv.conv_sm90, "launch_conv", launch)
    x, weight, bias = channels_last(3, 16, 4, 5).bfloat16(), torch.zeros(outputs, 16, 3, 3, 3).bfloat16(), None
    memory = torch.zeros(2 * outputs * 20 + 8).bfloat16()
    for start in (0, 1):
        tail = memory[start:][: 2 * outputs * 20].view(2, 4, 5, outputs).permute(0, 3, 1, 2).fill_(torch.nan)
        y = conv.launch_sm90(x, weight, bias, x[:0], None, None, None, torch.ones(outputs), None, tail)
        assert torch.equal(tail, y[1:])
    assert stored == [outputs == 24, False]


def sm90_config(
    block_n0: int, block_n1: int, block_k: int, stages: int, reuse_rows: int, tile_h: int = 8
) -> dict[str, int]:
    return {
        "BLOCK_N0": block_n0,
        "BLOCK_N1": block_n1,
        "BLOCK_K": block_k,
        "STAGES": stages,
        "REUSE_ROWS": reuse_rows,
        "TILE_H": tile_h,
    }


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "config"),
    [
        (384, 384, (3, 3), None),
        (192, 192, (3, 3), None),
        (96, 96, (3, 3), None),
        (16, 384, (3, 3), None),
        (384, 32, (3, 3), None),
        (48, 24, (3, 3), None),
        (96, 3, (3, 3), None),
        (96, 96, (3, 3), sm90_config(64, 32, 64, 2, 1)),
        (96, 192, (3, 1), None),
        (192, 96, (1, 3), None),
        (64, 256, (3, 3), sm90_config(128, 0, 64, 3, 0)),
        (64, 256, (3, 3), sm90_config(128, 0, 32, 4, 1)),
        (96, 192, (3, 3), sm90_config(128, 64, 32, 2, 1)),
        (96, 96, (3, 3), sm90_config(64, 32, 32, 9, 0)),
        (96, 96, (3, 3), sm90_config(64, 32, 32, 3, 1, 16)),
        (96, 96, (3, 3), sm90_config(64, 32, 32, 5, 0, 16)),
        (96, 3, (3, 3), sm90_config(16, 0, 32, 5, 1, 16)),
        (192, 96, (1, 3), sm90_config(64, 32, 64, 2, 0, 16)),
    ],
)
@pytest.mark.parametrize("past_frames", [0, 1, 2])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_gpu_hopper_kernel(inputs, outputs, kernel, past_frames, added, fp8, config):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    kt, k = kernel
    past_frames = min(past_frames, kt - 1)
    x, past = (channels_last(n, inputs, 21, 19).to("cuda", torch.bfloat16) for n in (3, past_frames))
    weight = (torch.randn(outputs, inputs, kt, k, k) * (inputs * kt * k * k) ** -0.5).to("cuda", torch.bfloat16)
    bias, scale = torch.randn(outputs).to("cuda", torch.bfloat16), None
    residual = channels_last(3, outputs, 21, 19).to("cuda", torch.bfloat16) if added else None
    wide, filters = torch.cat([past, x]).double(), weight.double()
    if fp8:
        (x, past), (weight, scale) = ((t * 64).to(FP8) for t in (x, past)), quantize_conv_weight(weight, 64.0)
        wide = torch.cat([past.double(), x.double()]) / 64
        filters = weight.double() * 64 * scale.double().view(-1, 1, 1, 1, 1)
    given = (x, weight, bias, past, residual, scale, config)
    with poisoned_memory():
        y = conv.launch_sm90(*given)
    zeros = wide.new_zeros(kt - 1 - past_frames, *wide.shape[1:])
    padded = torch.cat([zeros, wide[:past_frames]])
    expected = causal_conv3d_reference(wide[past_frames:], filters, bias.double(), padded)
    expected = expected if residual is None else expected + residual.double()
    assert torch.linalg.vector_norm(y - expected) < 5e-3 * torch.linalg.vector_norm(expected)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, conv.launch_sm90(*given))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "config"),
    [
        (192, None),
        (96, None),
        (16, None),
        (48, None),
        (24, None),
        (180, None),
        (192, sm90_config(128, 64, 32, 2, 1)),
        (96, sm90_config(64, 32, 64, 2, 1)),
        (96, sm90_config(128, 0, 32, 4, 0)),
        (96, sm90_config(64, 32, 32, 3, 1, 16)),
        (96, sm90_config(64, 32, 64, 2, 0, 16)),
    ],
)
@pytest.mark.parametrize("past_frames", [0, 2])
@pytest.mark.parametrize("fp8_output", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_gpu_norm_in_the_epilogue(channels, config, past_frames, fp8_output, fp8):
    """Every pixel of every tile, also at the edges of the picture, from bf16 and e4m3 to bf16 and e4m3."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    if fp8_output and channels <= SMALL_TILE_CHANNELS:
        pytest.skip("e4m3 tiles of 16 channels are narrower than what can be copied")
    x, past = (channels_last(n, 64, 21, 19).to("cuda", torch.bfloat16) for n in (3, past_frames))
    weight = (torch.randn(channels, 64, 3, 3, 3) * (64 * 27) ** -0.5).to("cuda", torch.bfloat16)
    bias, scale = torch.randn(channels).to("cuda", torch.bfloat16), None
    gamma = 1 + 0.1 * torch.randn(channels, 1, 1, 1).to("cuda", torch.bfloat16)
    wide, filters = torch.cat([past, x]).double(), weight.double()
    if fp8:
        (x, past), (weight, scale) = ((t * 64).to(FP8) for t in (x, past)), quantize_conv_weight(weight, 64.0)
        wide = torch.cat([past.double(), x.double()]) / 64
        filters = weight.double() * 64 * scale.double().view(-1, 1, 1, 1, 1)
    out_scale = fp8_out_scale(gamma) if fp8_output else None
    given = (x, weight, bias, past, None, scale, config, gamma, out_scale)
    with poisoned_memory():
        y = conv.launch_sm90(*given)
    memory = channels_last(4, channels, 21, 19).fill_(torch.nan).to("cuda", y.dtype)
    assert torch.equal(conv.launch_sm90(*given, tail=memory[1:-1]).view(torch.uint8), y.view(torch.uint8))
    assert torch.equal(memory[1:-1].view(torch.uint8), y[1:].view(torch.uint8))
    assert memory.float()[[0, -1]].isnan().all()
    zeros = wide.new_zeros(2 - past_frames, *wide.shape[1:])
    padded = torch.cat([zeros, wide[:past_frames]])
    expected = causal_conv3d_reference(wide[past_frames:], filters, bias.double(), padded)
    expected = rms_norm_silu_reference(expected, gamma.double(), True) * (out_scale or 1)
    error = torch.linalg.vector_norm(y.double() - expected, dim=1) / torch.linalg.vector_norm(expected, dim=1)
    assert error.max() < (6e-2 if fp8_output else 1e-2)
    assert y.dtype == (FP8 if fp8_output else torch.bfloat16)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.view(torch.uint8), conv.launch_sm90(*given).view(torch.uint8))


@settings(max_examples=40)
@given(
    st.sampled_from([*KERNELS, (1, 3)]), SIZES, CHANNELS, SIZES, SIZES, SIZES, st.booleans(), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_fp8_is_the_product_of_what_was_rounded(kernel, frames, inputs, outputs, rows, columns, has_past, added, seed):
    torch.manual_seed(seed)
    past_frames = kernel[0] - 1
    weight, bias = (t.float() for t in parameters(inputs, outputs, *kernel))
    x, past = (channels_last(n, inputs, rows, columns).mul(32).clamp(-448, 448).to(FP8) for n in (frames, past_frames))
    past = past if has_past and past_frames else None
    residual = channels_last(frames, outputs, rows, columns).float() if added else None
    weight8, scale = quantize_conv_weight(weight, 32.0)
    assert weight8.is_contiguous(memory_format=torch.channels_last_3d)
    restored = weight8.double() * scale.double().view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(restored * 32, weight.double(), rtol=2**-4, atol=float(weight.abs().max()) * 2**-15)
    with poisoned_memory():
        y = causal_conv3d(x, weight8, bias, past, residual, scale)
    expected = causal_conv3d_reference(x.double(), restored, bias.double(), None if past is None else past.double())
    expected = expected + (0 if residual is None else residual.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-3)
    assert y.dtype == torch.float32
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_says_what_is_wrong_in_fp8():
    x, weight, bias = channels_last(1, 4, 3, 3).to(FP8), torch.randn(2, 4, 1, 1, 1), torch.randn(2)
    weight8, scale = quantize_conv_weight(weight, 1.0)
    with pytest.raises(ValueError, match="scale: wanted with e4m3"):
        conv3d(x, weight8, bias)
    with pytest.raises(ValueError, match="scale: wanted with e4m3"):
        conv3d(x.float(), weight, bias, scale=scale)
    with pytest.raises(ValueError, match="scale: wanted with e4m3 and a bias"):
        conv3d(x, weight8, None, scale=scale)
    with pytest.raises(ValueError, match=r"scale: shape \[1\], wanted \[2\]"):
        conv3d(x, weight8, bias, scale=scale[:1])
    with pytest.raises(ValueError, match="stride: 2, wanted 1 in FP8"):
        conv3d(x, weight8, bias, stride=2, scale=scale)
    with pytest.raises(ValueError, match=r"x: torch\.float32, wanted torch\.float8_e4m3fn"):
        conv3d(x.float(), weight8, bias, scale=scale)
