"""Convolutions that double or halve pictures, against the library on the doubled and the padded picture, in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import resample_conv2d as resample_conv
from kernels.resample_conv2d import downsample_conv2d, fold_upsampling, upsample_conv2d
from profiling.measure.check import poisoned_memory

SIZES, CHANNELS = st.integers(1, 6), st.integers(2, 6)


def channels_last(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def assert_like(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)


@settings(deadline=None, max_examples=25)
@given(SIZES, CHANNELS, SIZES, SIZES, SIZES, st.integers(0, 2**31))
def test_upsampling_folded_into_its_convolution(frames, inputs, outputs, rows, columns, seed):
    torch.manual_seed(seed)
    x, weight = channels_last(frames, inputs, rows, columns), torch.randn(outputs, inputs, 3, 3, dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), weight, bias, padding=1)
    with poisoned_memory():
        y = upsample_conv2d(x, fold_upsampling(weight), bias)
    assert_like(y, expected)


def test_folded_weights_are_rounded_once():
    weight = torch.randn(2, 3, 3, 3).bfloat16()
    assert torch.equal(fold_upsampling(weight), fold_upsampling(weight.float()).bfloat16())


@settings(deadline=None, max_examples=25)
@given(SIZES, CHANNELS, SIZES, st.integers(2, 7), st.integers(2, 7), st.integers(0, 2**31))
def test_downsampling_is_padded_below_and_to_the_right(frames, inputs, outputs, rows, columns, seed):
    torch.manual_seed(seed)
    x, weight = channels_last(frames, inputs, rows, columns), torch.randn(outputs, inputs, 3, 3, dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64)
    whole = F.conv2d(F.pad(x, (0, 2, 0, 2)), weight, bias)  # at every place; a stride takes every second of them
    assert_like(downsample_conv2d(x, weight, bias), whole[:, :, :-1:2, :-1:2][:, :, : rows // 2, : columns // 2])


@pytest.mark.parametrize("function", [downsample_conv2d, upsample_conv2d])
def test_says_in_one_line_what_is_wrong(function: Callable[..., Tensor]):
    x, weight, bias = channels_last(2, 3, 5, 6), torch.randn(4, 3, 3, 3).double(), torch.randn(4).double()
    weight = fold_upsampling(weight) if function is upsample_conv2d else weight
    wrong = [
        (channels_last(2, 2, 5, 6), r"x: shape \[2, 2, 5, 6\], wanted \[frames, 3, rows, columns\]"),
        (x[0], r"x: shape \[3, 5, 6\], wanted \[frames, 3, rows, columns\]"),
        (x.float(), r"x: dtype torch.float32, wanted the weight's, torch.float64"),
        (x.contiguous(), r"x: strides .* wanted channels-last memory"),
    ]
    if function is downsample_conv2d:
        wrong.append((channels_last(2, 3, 1, 6), r"x: shape \[2, 3, 1, 6\], wanted 2 rows and columns or more"))
    for given_x, words in wrong:
        with pytest.raises(ValueError, match=words) as raised:
            function(given_x, weight, bias)
        assert "\n" not in str(raised.value)


def test_opcheck():
    x, weight, bias = channels_last(2, 3, 4, 6).float(), torch.randn(5, 3, 3, 3), torch.randn(5)
    torch.library.opcheck(resample_conv._upsample_conv2d, (x, fold_upsampling(weight), bias))
    torch.library.opcheck(resample_conv._downsample_conv2d, (x, weight, bias))


# --- On a GPU -------------------------------------------------------------------------------------------------------


def hopper(block_k: int, tall: int) -> dict[str, int]:
    return {"BLOCK_N0": 64, "BLOCK_N1": 32, "BLOCK_K": block_k, "STAGES": 5, "REUSE_ROWS": tall}


@pytest.fixture
def operands(inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the form for Hopper needs one")
    x = channels_last(3, inputs, 14, 22).to("cuda", torch.bfloat16)
    weight = (torch.randn(outputs, inputs, 3, 3) * (9 * inputs) ** -0.5).to("cuda", torch.bfloat16)
    return x, weight, torch.randn(outputs).to("cuda", torch.bfloat16)


def assert_close(y: Tensor, expected: Tensor) -> None:
    assert torch.linalg.vector_norm(y - expected) < 5e-3 * torch.linalg.vector_norm(expected)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "outputs"), [(384, 192), (192, 96), (40, 24)])
@pytest.mark.parametrize("tall", [0, 1])
def test_gpu_upsampling_on_hopper(operands, tall):
    x, weight, bias = operands
    phases = fold_upsampling(weight)
    with poisoned_memory():
        y = resample_conv.upsample_hopper(x, phases, bias, hopper(32, tall))
    assert_close(y, resample_conv.upsample_library(x.double(), phases.double(), bias.double()))


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "outputs"), [(384, 384), (192, 192), (96, 96)])
@pytest.mark.parametrize("launch", [None, hopper(32, 0)])
def test_gpu_downsampling_on_hopper(operands, launch):
    x, weight, bias = operands
    weight = weight.contiguous(memory_format=torch.channels_last)
    with poisoned_memory():
        y = resample_conv.downsample_hopper(x, weight, bias, launch)
    assert_close(y, resample_conv.downsample_library(x.double(), weight.double(), bias.double()))
