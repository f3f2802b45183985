"""Convolutions that double or halve rows and columns, against their definitions in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import resample_conv2d as resample
from kernels.resample_conv2d import (
    downsample_conv2d,
    downsample_conv2d_op,
    downsample_conv2d_reference,
    downsample_sm90,
    fold_upsampling,
    upsample_conv2d,
    upsample_conv2d_op,
    upsample_conv2d_reference,
    upsample_sm90,
)
from kernels.tuning import GPU, TunedConfig, assume_gpu
from profiling.measure.check import poisoned_memory

SIZES, CHANNELS = st.integers(1, 6), st.integers(2, 6)


def channels_last(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def assert_like(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=25)
@given(SIZES, CHANNELS, SIZES, SIZES, SIZES, st.integers(0, 2**31))
def test_upsampling_equals_reference(frames, inputs, outputs, rows, columns, seed):
    torch.manual_seed(seed)
    x, weight = channels_last(frames, inputs, rows, columns), torch.randn(outputs, inputs, 3, 3, dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64)
    with poisoned_memory():
        y = upsample_conv2d(x, fold_upsampling(weight), bias)
    assert_like(y, upsample_conv2d_reference(x, weight, bias))


def test_the_reference_repeats_every_pixel():
    x, weight = channels_last(1, 2, 2, 3), torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    weight[0, 0, 1, 1] = weight[1, 1, 1, 1] = 1  # the identity
    y = upsample_conv2d_reference(x, weight, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(y, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_folded_weights_are_rounded_once():
    weight = torch.randn(2, 3, 3, 3).bfloat16()
    assert torch.equal(fold_upsampling(weight), fold_upsampling(weight.float()).bfloat16())


@settings(max_examples=25)
@given(SIZES, CHANNELS, SIZES, st.integers(2, 7), st.integers(2, 7), st.integers(0, 2**31))
def test_downsampling_equals_reference(frames, inputs, outputs, rows, columns, seed):
    torch.manual_seed(seed)
    x, weight = channels_last(frames, inputs, rows, columns), torch.randn(outputs, inputs, 3, 3, dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64)
    assert_like(downsample_conv2d(x, weight, bias), downsample_conv2d_reference(x, weight, bias))


@settings(max_examples=25)
@given(SIZES, CHANNELS, SIZES, st.integers(2, 7), st.integers(2, 7), st.integers(0, 2**31))
def test_downsampling_is_padded_below_and_to_the_right(frames, inputs, outputs, rows, columns, seed):
    torch.manual_seed(seed)
    x, weight = channels_last(frames, inputs, rows, columns), torch.randn(outputs, inputs, 3, 3, dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64)
    whole = F.conv2d(F.pad(x, (0, 2, 0, 2)), weight, bias)  # at every pixel; the stride takes every second one
    expected = whole[:, :, :-1:2, :-1:2][:, :, : rows // 2, : columns // 2]
    assert_like(downsample_conv2d_reference(x, weight, bias).contiguous(memory_format=torch.channels_last), expected)


@pytest.mark.parametrize("function", [downsample_conv2d, upsample_conv2d])
def test_says_in_one_line_what_is_wrong(function: Callable[..., Tensor]):
    x, weight, bias = channels_last(2, 3, 5, 6), torch.randn(4, 3, 3, 3).double(), torch.randn(4).double()
    weight = fold_upsampling(weight) if function is upsample_conv2d else weight
    wrong = [
        (channels_last(2, 2, 5, 6), r"x: shape \[2, 2, 5, 6\], wanted \[frames, 3, rows, columns\]"),
        (x[0], r"x: shape \[3, 5, 6\], wanted \[frames, 3, rows, columns\]"),
        (x.float(), r"x: torch.float32, wanted torch.float64"),
        (x.contiguous(), r"x: strides .* wanted channels-last memory"),
    ]
    if function is downsample_conv2d:
        wrong.append((channels_last(2, 3, 1, 6), r"x: shape \[2, 3, 1, 6\], wanted 2 rows and columns or more"))
    calls = [((given_x, weight, bias), words) for given_x, words in wrong]
    calls.append(((x, weight, bias[:1]), r"bias: shape \[1\], wanted \[4\]"))
    calls.append(((x, weight[..., :1], bias), r"weights?: shape .* wanted \[.*outputs, inputs, "))
    for arguments, words in calls:
        with pytest.raises(ValueError, match=words) as raised:
            function(*arguments)
        assert "\n" not in str(raised.value)


def test_opcheck():
    x, weight, bias = channels_last(2, 3, 4, 6).float(), torch.randn(5, 3, 3, 3), torch.randn(5)
    torch.library.opcheck(upsample_conv2d_op.library_op, (x, fold_upsampling(weight), bias))
    torch.library.opcheck(downsample_conv2d_op.library_op, (x, weight, bias))


def test_dispatch_follows_the_tuned_tables(monkeypatch):
    """The kernel only where measurements say so, on Hopper, and for outputs that it can store; else the library."""
    taken: list[tuple[str, object]] = []
    for name in ("upsample", "downsample"):
        monkeypatch.setattr(resample, f"{name}_library", lambda *_: taken.append(("library", None)))
        monkeypatch.setattr(resample, f"{name}_sm90", lambda *arguments: taken.append(("gluon", arguments[-1])))
    gluon = TunedConfig("gluon", {"STAGES": 3})
    for capability, outputs, found, expected in (
        ("9.0", 8, None, ("library", None)),
        ("9.0", 8, gluon, ("gluon", gluon.config)),
        ("9.0", 8, TunedConfig("library", {}), ("library", None)),
        ("9.0", 4, gluon, ("library", None)),
        ("8.9", 8, gluon, ("library", None)),
    ):
        monkeypatch.setattr(resample, "tuned_conv_config", lambda *_, found=found: found)
        x, weight = channels_last(2, 16, 4, 4).bfloat16(), torch.zeros(outputs, 16, 3, 3).bfloat16()
        with assume_gpu(GPU("any", capability, 132)):
            resample.dispatch_upsample(x, fold_upsampling(weight), weight[:, 0, 0, 0])
            resample.dispatch_downsample(x, weight, weight[:, 0, 0, 0])
        assert taken == [expected, expected]
        taken.clear()


# --- On a GPU -------------------------------------------------------------------------------------------------------


def sm90_config(block_k: int, reuse_rows: int) -> dict[str, int]:
    return {"BLOCK_N0": 64, "BLOCK_N1": 32, "BLOCK_K": block_k, "STAGES": 5, "REUSE_ROWS": reuse_rows}


@pytest.fixture
def operands(inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    x = channels_last(3, inputs, 14, 22).to("cuda", torch.bfloat16)
    weight = (torch.randn(outputs, inputs, 3, 3) * (9 * inputs) ** -0.5).to("cuda", torch.bfloat16)
    return x, weight, torch.randn(outputs).to("cuda", torch.bfloat16)


def assert_close(y: Tensor, expected: Tensor) -> None:
    assert torch.linalg.vector_norm(y - expected) < 5e-3 * torch.linalg.vector_norm(expected)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "outputs"), [(384, 192), (192, 96), (40, 24)])
@pytest.mark.parametrize("reuse_rows", [0, 1])
def test_gpu_upsampling_on_hopper(operands, reuse_rows):
    x, weight, bias = operands
    with poisoned_memory():
        y = upsample_sm90(x, fold_upsampling(weight), bias, sm90_config(32, reuse_rows))
    assert_close(y, upsample_conv2d_reference(x.double(), weight.double(), bias.double()))


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "outputs"), [(384, 384), (192, 192), (96, 96)])
@pytest.mark.parametrize("config", [None, sm90_config(32, 0)])
def test_gpu_downsampling_on_hopper(operands, config):
    x, weight, bias = operands
    weight = weight.contiguous(memory_format=torch.channels_last)
    with poisoned_memory():
        y = downsample_sm90(x, weight, bias, config)
    assert_close(y, downsample_conv2d_reference(x.double(), weight.double(), bias.double()))
