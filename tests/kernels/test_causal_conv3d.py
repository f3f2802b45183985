"""The causal convolution against its definition in float64, over shapes, strides and lengths of the past."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import causal_conv3d as conv
from kernels.causal_conv3d import causal_conv3d, conv3d, reference
from kernels.conv_sm90 import THIN, supports
from kernels.rms_norm_silu import fp8_out_scale
from kernels.rms_norm_silu import reference as pixel_norm_reference
from kernels.sm90 import FP8
from kernels.tuning import GPU, TunedConfig, assume_gpu
from profiling.measure.check import poisoned_memory

KERNELS = [(3, 3), (3, 1), (1, 1)]
SIZES = st.integers(1, 6)
CHANNELS = st.integers(2, 6)  # the memory format of a single channel is both or neither
ODD_CHANNELS = st.sampled_from([1, 3, 5, 17, 33])


@pytest.fixture(params=["_stacked", "_volume"], autouse=True, scope="module")
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds for the CPU's form and, run on the CPU, for the GPU's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "_stacked", getattr(conv, request.param))
        yield


def channels_last(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def parameters(inputs: int, outputs: int, kt: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.randn(outputs, inputs, kt, k, k, dtype=torch.float64), torch.randn(outputs, dtype=torch.float64)


def assert_like(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KERNELS), SIZES, CHANNELS, SIZES, SIZES, SIZES, st.booleans(), st.integers(0, 2**31))
def test_equals_reference(kernel, frames, inputs, outputs, rows, columns, has_past, seed):
    torch.manual_seed(seed)
    weight, bias = parameters(inputs, outputs, *kernel)
    x = channels_last(frames, inputs, rows, columns)
    past = channels_last(kernel[0] - 1, inputs, rows, columns) if has_past and kernel[0] > 1 else None
    assert_like(causal_conv3d(x, weight, bias, past), reference(x, weight, bias, past))


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from([*KERNELS, (1, 3)]), st.integers(1, 4), ODD_CHANNELS, ODD_CHANNELS, SIZES, SIZES,
    st.sampled_from([0, 1, 2]), st.booleans(), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_any_number_of_frames_before(kernel, frames, inputs, outputs, rows, columns, before, biased, added, seed):
    """The operation itself: single pixels, channels that no tile divides; what is not written is NaN."""
    torch.manual_seed(seed)
    kt, _ = kernel
    before = min(before, kt - 1)
    weight, bias = parameters(inputs, outputs, *kernel)
    x, past = channels_last(frames, inputs, rows, columns), channels_last(before, inputs, rows, columns)
    residual = channels_last(frames, outputs, rows, columns)
    given = (weight, bias if biased else None, residual if added else None, None)
    padded = torch.cat([x.new_zeros(kt - 1 - before, *x.shape[1:]), past]).contiguous(memory_format=torch.channels_last)
    with poisoned_memory():
        y, from_zeros = conv._conv3d(x, past, *given), conv._conv3d(x, padded, *given)
    expected = reference(x, weight, bias * biased, padded) + residual * added
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-11)
    if before:  # at a clip's start the taps on zero frames are left out, and sums come in another order
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
        torch.testing.assert_close(reference(x, weight, bias)[t], frame, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([(3, 3), (3, 1)]), st.lists(st.integers(2, 4), min_size=1, max_size=4), st.integers(0, 2**31))
def test_pieces_equal_the_whole(kernel, lengths, seed):
    torch.manual_seed(seed)
    weight, bias = parameters(3, 4, *kernel)
    pieces = [channels_last(length, 3, 5, 4) for length in lengths]
    past, outputs = None, []
    for piece in pieces:
        outputs.append(causal_conv3d(piece, weight, bias, past))
        past = piece[-2:]
    torch.testing.assert_close(torch.cat(outputs), reference(torch.cat(pieces), weight, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fp8", [False, True])
@settings(deadline=None, max_examples=20)
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
    whole = reference(clip, weight * 0.5 if fp8 else weight, bias)
    scale = torch.full((5,), 0.5) if fp8 else None
    if fp8:
        clip, weight = clip.to(FP8), weight.to(FP8)
    pieces, end = [], 0
    for length in lengths:
        past, x = clip[max(0, end - 2) : end], clip[end : end + length]  # of 0, 1 or 2 frames
        pieces.append(conv._conv3d(x, past, weight, bias, None, scale))
        end += length
    assert torch.equal(torch.cat(pieces), whole)


@settings(deadline=None, max_examples=30)
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
    expected = reference(x, weight, bias, past)
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
    with pytest.raises(ValueError, match=r"past: dtype torch.float32, wanted x's, torch.float64"):
        causal_conv3d(x, weight, bias, past.float())
    with pytest.raises(ValueError, match=r"x: shape \[4, 2, 5, 6\], wanted \[1 or more, 3, rows, columns\]"):
        causal_conv3d(channels_last(4, 2, 5, 6), weight, bias)
    with pytest.raises(ValueError, match=r"x: dtype torch.float32, wanted the weight's, torch.float64"):
        causal_conv3d(x.float(), weight, bias)
    with pytest.raises(ValueError, match=r"x: strides .* wanted channels-last memory"):
        causal_conv3d(x.contiguous(), weight, bias)
    with pytest.raises(ValueError, match=r"x: shape \[2, 3, 5, 6\], wanted \[3 or more, 3, rows, columns\]"):
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
    assert_one_line(r"x: shape \[0, 3, 5, 6\], wanted \[1 or more, 3,", causal_conv3d, x[:0], weight, bias)
    assert_one_line(r"x: shape \[4, 3, 5\], wanted \[1 or more, 3, rows", causal_conv3d, x[..., 0], weight, bias)
    assert_one_line(r"x: dtype torch.float16, wanted the weight's, torch.float64", conv3d, x.half(), weight, bias)
    assert_one_line(r"x: strides .* wanted channels-last memory", conv3d, x.contiguous(), weight, bias)
    residual = channels_last(4, 2, 5, 6)
    words = r"residual: torch.float32 \[4, 2, 5, 6\], wanted torch.float64 \[4, 2, 5, 6\]"
    assert_one_line(words, causal_conv3d, x, weight, bias, None, residual.float())
    words = r"residual: torch.float64 \[4, 2, 5, 6\], wanted torch.float64 \[2, 2, 5, 6\]"
    assert_one_line(words, conv3d, x, weight, bias, residual=residual)
    narrow, scale = conv.quantize_conv(weight, 1.0)
    words = r"scale: torch.float64 \[2\], wanted float32 \[2\]"
    assert_one_line(words, causal_conv3d, x.to(FP8), narrow, bias, scale=scale.double())
    words = r"residual: torch.float64 \[4, 2, 5, 6\], wanted torch.float32"  # the bias's, not e4m3
    assert_one_line(words, causal_conv3d, x.to(FP8), narrow, bias.float(), None, residual, scale.float())
    assert_one_line(
        r"past: dtype torch.float64, wanted x's", causal_conv3d, x.to(FP8), narrow, bias, past, None, scale.float()
    )


@pytest.mark.parametrize("has_past", [False, True])
def test_a_residual_is_added(has_past):
    torch.manual_seed(0)
    weight, bias = parameters(3, 4, 3, 3)
    x, residual = channels_last(3, 3, 5, 6), channels_last(3, 4, 5, 6)
    past = channels_last(2, 3, 5, 6) if has_past else None
    before = residual.clone()
    assert_like(causal_conv3d(x, weight, bias, past, residual), reference(x, weight, bias, past) + residual)
    assert torch.equal(residual, before)
    strided = conv3d(x, weight, None, 2, residual[:1])
    assert_like(strided, conv3d(x, weight, None, 2) + residual[:1])


def test_says_what_is_wrong_with_a_residual():
    weight, bias = parameters(3, 4, 3, 3)
    x = channels_last(3, 3, 5, 6)
    with pytest.raises(
        ValueError, match=r"residual: torch.float64 \[2, 4, 5, 6\], wanted torch.float64 \[3, 4, 5, 6\]"
    ):
        causal_conv3d(x, weight, bias, None, channels_last(2, 4, 5, 6))
    with pytest.raises(ValueError, match=r"residual: strides .* wanted channels-last memory"):
        causal_conv3d(x, weight, bias, None, torch.zeros(3, 4, 5, 6, dtype=torch.float64))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(KERNELS), SIZES, CHANNELS, SIZES, SIZES, SIZES, st.booleans(), st.integers(0, 2**31))
def test_normed_for_the_next_convolution(kernel, frames, inputs, outputs, rows, columns, has_past, seed):
    torch.manual_seed(seed)
    (weight, bias), gamma = parameters(inputs, outputs, *kernel), torch.randn(outputs, 1, 1, 1, dtype=torch.float64)
    x, past = (channels_last(n, inputs, rows, columns) for n in (frames, kernel[0] - 1))
    past = past if has_past else None
    y = reference(x, weight, bias, past)
    normed = y / y.square().sum(1, keepdim=True).sqrt() * outputs**0.5 * gamma.view(-1, 1, 1)
    assert_like(causal_conv3d(x, weight, bias, past, gamma=gamma), normed * normed.sigmoid())
    factor = fp8_out_scale(gamma)
    narrow = causal_conv3d(x, weight, bias, past, gamma=gamma, factor=factor)
    torch.testing.assert_close(narrow.double() / factor, normed * normed.sigmoid(), rtol=2**-4, atol=2**-9 / factor)
    assert narrow.dtype == FP8


def test_says_what_is_wrong_with_gamma():
    x, (weight, bias) = channels_last(1, 4, 3, 3), parameters(4, 2, 1, 1)
    with pytest.raises(ValueError, match=r"gamma: shape \[3\], wanted \[2\]"):
        causal_conv3d(x, weight, bias, gamma=torch.ones(3))
    with pytest.raises(ValueError, match="residual: not together with gamma"):
        causal_conv3d(x, weight, bias, residual=channels_last(1, 2, 3, 3), gamma=torch.ones(2))


def test_opcheck_and_compilation():
    torch.manual_seed(0)
    weight, bias = (t.float() for t in parameters(3, 4, 3, 3))
    clip, residual = channels_last(4, 3, 5, 6).float(), channels_last(2, 4, 5, 6).float()
    for arguments in ((clip[2:], clip[:2], weight, bias, residual, None), (clip, clip[:0], weight, None, None, None)):
        torch.library.opcheck(conv._conv3d, arguments)
    for factor in (None, 2.0):
        torch.library.opcheck(conv._conv3d_norm, (clip[2:], clip[:2], weight, bias, None, bias + 1, factor))
    whole = torch.compile(conv3d, fullgraph=True)
    torch.testing.assert_close(whole(clip, weight, bias, 1, residual), conv3d(clip, weight, bias, 1, residual))


def test_what_the_form_for_hopper_takes():
    x, weight = torch.zeros(2, 16, 4, 4).bfloat16(), torch.zeros(8, 16, 3, 3, 3).bfloat16()
    assert supports(x, x[:0], weight)
    assert not supports(x.float(), x[:0].float(), weight.float())
    assert supports(x, x[:1], weight[:3])
    assert not supports(x[:, :12], x[:0], weight[:, :12])  # pixels of 24 bytes
    assert not supports(x, torch.zeros(1000).bfloat16()[1:513].view(2, 16, 4, 4), weight)


def test_the_form_is_the_tables(monkeypatch):
    """Where nothing was measured, the library in 16 bits and the kernel in FP8; only the library away from Hopper."""
    taken: list[tuple[str, object]] = []

    def take(name: str, *arguments: object) -> None:
        taken.append((name, arguments[-1]))

    monkeypatch.setattr(conv, "BACKENDS", {name: partial(take, name) for name in conv.BACKENDS})
    tables: dict[torch.dtype, TunedConfig | None] = {}
    monkeypatch.setattr(conv, "tuned", lambda _operation, x, *_: tables.get(x.dtype))
    x, weight = channels_last(2, 16, 4, 4).bfloat16(), torch.zeros(8, 16, 3, 3, 3).bfloat16()
    x8, weight8, scale = x.to(FP8), weight.to(FP8), torch.ones(8)
    gluon = TunedConfig("gluon", {"STAGES": 3})
    for capability, found, expected, expected_fp8 in (
        ("9.0", None, ("library", None), ("gluon", None)),
        ("9.0", gluon, ("gluon", gluon.config), ("gluon", gluon.config)),
        ("9.0", TunedConfig("library", {}), ("library", {}), ("library", {})),
        ("8.9", None, ("library", None), ("library", None)),
        ("8.9", gluon, ("library", None), ("library", None)),
    ):
        tables = {} if found is None else {torch.bfloat16: found, FP8: found}
        with assume_gpu(GPU("any", capability, 132)):
            conv.launch(x, x[:0], weight, None, None)
            conv.launch(x8, x8[:0], weight8, scale, None, scale)
        assert taken == [expected, expected_fp8]
        taken.clear()
    tables.clear()
    odd, weight = x8[:, :12].contiguous(memory_format=torch.channels_last), weight8[:, :12]  # pixels of 12 bytes
    with assume_gpu(GPU("any", "9.0", 132)):
        conv.launch(odd, odd[:0], weight, scale, None, scale)
    assert taken == [("library", None)]


def hopper(left: int, right: int, block_k: int, stages: int, tall: int, lines: int = 8) -> dict[str, int]:
    return {
        "BLOCK_N0": left,
        "BLOCK_N1": right,
        "BLOCK_K": block_k,
        "STAGES": stages,
        "REUSE_ROWS": tall,
        "TILE_H": lines,
    }


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "launch"),
    [
        (384, 384, (3, 3), None),
        (192, 192, (3, 3), None),
        (96, 96, (3, 3), None),
        (16, 384, (3, 3), None),
        (384, 32, (3, 3), None),
        (48, 24, (3, 3), None),
        (96, 3, (3, 3), None),
        (96, 96, (3, 3), hopper(64, 32, 64, 2, 1)),
        (96, 192, (3, 1), None),
        (192, 96, (1, 3), None),
        (64, 256, (3, 3), hopper(128, 0, 64, 3, 0)),
        (64, 256, (3, 3), hopper(128, 0, 32, 4, 1)),
        (96, 192, (3, 3), hopper(128, 64, 32, 2, 1)),
        (96, 96, (3, 3), hopper(64, 32, 32, 9, 0)),
        (96, 96, (3, 3), hopper(64, 32, 32, 3, 1, 16)),
        (96, 96, (3, 3), hopper(64, 32, 32, 5, 0, 16)),
        (96, 3, (3, 3), hopper(16, 0, 32, 5, 1, 16)),
        (192, 96, (1, 3), hopper(64, 32, 64, 2, 0, 16)),
    ],
)
@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_gpu_form_for_hopper(inputs, outputs, kernel, before, added, fp8, launch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the form for Hopper needs one")
    kt, k = kernel
    before = min(before, kt - 1)
    x, past = (channels_last(n, inputs, 21, 19).to("cuda", torch.bfloat16) for n in (3, before))
    weight = (torch.randn(outputs, inputs, kt, k, k) * (inputs * kt * k * k) ** -0.5).to("cuda", torch.bfloat16)
    bias, scale = torch.randn(outputs).to("cuda", torch.bfloat16), None
    residual = channels_last(3, outputs, 21, 19).to("cuda", torch.bfloat16) if added else None
    wide, filters = torch.cat([past, x]).double(), weight.double()
    if fp8:
        (x, past), (weight, scale) = ((t * 64).to(FP8) for t in (x, past)), conv.quantize_conv(weight, 64.0)
        wide = torch.cat([past.double(), x.double()]) / 64
        filters = weight.double() * 64 * scale.double().view(-1, 1, 1, 1, 1)
    given = (x, past, weight, bias, residual, scale, launch)
    with poisoned_memory():
        y = conv.launch_sm90(*given)
    zeros = wide.new_zeros(kt - 1 - before, *wide.shape[1:])
    expected = reference(wide[before:], filters, bias.double(), torch.cat([zeros, wide[:before]]))
    expected = expected if residual is None else expected + residual.double()
    assert torch.linalg.vector_norm(y - expected) < 5e-3 * torch.linalg.vector_norm(expected)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, conv.launch_sm90(*given))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "launch"),
    [
        (192, None),
        (96, None),
        (16, None),
        (48, None),
        (24, None),
        (180, None),
        (192, hopper(128, 64, 32, 2, 1)),
        (96, hopper(64, 32, 64, 2, 1)),
        (96, hopper(128, 0, 32, 4, 0)),
        (96, hopper(64, 32, 32, 3, 1, 16)),
        (96, hopper(64, 32, 64, 2, 0, 16)),
    ],
)
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_gpu_norm_on_the_way_out(channels, launch, before, narrow, fp8):
    """Every pixel of every tile, those at the picture's edges too, from bf16 and e4m3 into bf16 and e4m3."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the form for Hopper needs one")
    if narrow and channels <= THIN:
        pytest.skip("e4m3 tiles of 16 channels are narrower than what can be copied")
    x, past = (channels_last(n, 64, 21, 19).to("cuda", torch.bfloat16) for n in (3, before))
    weight = (torch.randn(channels, 64, 3, 3, 3) * (64 * 27) ** -0.5).to("cuda", torch.bfloat16)
    bias, scale = torch.randn(channels).to("cuda", torch.bfloat16), None
    gamma = 1 + 0.1 * torch.randn(channels, 1, 1, 1).to("cuda", torch.bfloat16)
    wide, filters = torch.cat([past, x]).double(), weight.double()
    if fp8:
        (x, past), (weight, scale) = ((t * 64).to(FP8) for t in (x, past)), conv.quantize_conv(weight, 64.0)
        wide = torch.cat([past.double(), x.double()]) / 64
        filters = weight.double() * 64 * scale.double().view(-1, 1, 1, 1, 1)
    factor = fp8_out_scale(gamma) if narrow else None
    given = (x, past, weight, bias, None, scale, launch, gamma, factor)
    with poisoned_memory():
        y = conv.launch_sm90(*given)
    zeros = wide.new_zeros(2 - before, *wide.shape[1:])
    expected = reference(wide[before:], filters, bias.double(), torch.cat([zeros, wide[:before]]))
    expected = pixel_norm_reference(expected, gamma.double(), True) * (factor or 1)
    error = torch.linalg.vector_norm(y.double() - expected, dim=1) / torch.linalg.vector_norm(expected, dim=1)
    assert error.max() < (6e-2 if narrow else 1e-2)
    assert y.dtype == (FP8 if narrow else torch.bfloat16)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.view(torch.uint8), conv.launch_sm90(*given).view(torch.uint8))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([*KERNELS, (1, 3)]), SIZES, CHANNELS, SIZES, SIZES, SIZES, st.booleans(), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_fp8_is_the_product_of_what_was_rounded(kernel, frames, inputs, outputs, rows, columns, has_past, added, seed):
    torch.manual_seed(seed)
    before = kernel[0] - 1
    weight, bias = (t.float() for t in parameters(inputs, outputs, *kernel))
    x, past = (channels_last(n, inputs, rows, columns).mul(32).clamp(-448, 448).to(FP8) for n in (frames, before))
    past = past if has_past and before else None
    residual = channels_last(frames, outputs, rows, columns).float() if added else None
    narrow, scale = conv.quantize_conv(weight, 32.0)
    assert narrow.is_contiguous(memory_format=torch.channels_last_3d)
    restored = narrow.double() * scale.double().view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(restored * 32, weight.double(), rtol=2**-4, atol=float(weight.abs().max()) * 2**-15)
    with poisoned_memory():
        y = causal_conv3d(x, narrow, bias, past, residual, scale)
    expected = reference(x.double(), restored, bias.double(), None if past is None else past.double())
    expected = expected + (0 if residual is None else residual.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-3)
    assert y.dtype == torch.float32
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_says_what_is_wrong_in_fp8():
    x, weight, bias = channels_last(1, 4, 3, 3).to(FP8), torch.randn(2, 4, 1, 1, 1), torch.randn(2)
    narrow, scale = conv.quantize_conv(weight, 1.0)
    with pytest.raises(ValueError, match="scale: wanted with e4m3"):
        conv3d(x, narrow, bias)
    with pytest.raises(ValueError, match="scale: wanted with e4m3"):
        conv3d(x.float(), weight, bias, scale=scale)
    with pytest.raises(ValueError, match="scale: wanted with e4m3 and a bias"):
        conv3d(x, narrow, None, scale=scale)
    with pytest.raises(ValueError, match=r"scale: torch.float32 \[1\], wanted float32 \[2\]"):
        conv3d(x, narrow, bias, scale=scale[:1])
    with pytest.raises(ValueError, match="stride: 2, wanted 1 in FP8"):
        conv3d(x, narrow, bias, stride=2, scale=scale)
    with pytest.raises(ValueError, match=r"x: dtype torch\.float32, wanted the weight's"):
        conv3d(x.float(), narrow, bias, scale=scale)
