"""The Hopper kernel of convolutions on a model of Hopper, against its definitions in float64.

`tests/kernels/test_causal_conv3d.py` and `tests/kernels/test_resample_conv2d.py` run it on a GPU.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import conv_sm90
from kernels.causal_conv3d import causal_conv3d_reference
from kernels.common import FP8
from kernels.resample_conv2d import (
    downsample_conv2d_reference,
    downsample_sm90,
    fold_upsampling,
    upsample_conv2d_reference,
    upsample_sm90,
)
from kernels.rms_norm_silu import fp8_out_scale
from kernels.rms_norm_silu import reference as rms_norm_silu_reference
from profiling.measure.check import poisoned_memory
from tests.fake_gluon import fake_hopper

KERNEL = "implicit_gemm_conv_sm90"
MARGIN = 16  # output channels of the memory around a result


def config(block_n0: int, block_n1: int, block_k: int, reuse_rows: int, tile_h: int) -> dict[str, int]:
    """Launch parameters with a ring of two stages, so that every stage is used again at once."""
    return {
        "BLOCK_N0": block_n0,
        "BLOCK_N1": block_n1,
        "BLOCK_K": block_k,
        "STAGES": 2,
        "REUSE_ROWS": reuse_rows,
        "TILE_H": tile_h,
    }


REUSING, TALL = config(64, 32, 32, 1, 8), config(64, 32, 32, 0, 16)


def channels_last(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def surrounded(frames: int, outputs: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory filled with NaN, `inside` of which a result has room."""
    return torch.full((frames + 2, rows + 2, columns + 2, outputs + 2 * MARGIN), torch.nan).to(dtype)


def inside(memory: Tensor) -> Tensor:
    return memory[1:-1, 1:-1, 1:-1, MARGIN:-MARGIN].permute(0, 3, 1, 2)


def assert_holds(memory: Tensor, expected: Tensor) -> None:
    """The expected values, rounded to the memory's dtype, are inside; what surrounds them is still NaN."""
    rtol, atol = (0.07, 2**-9) if memory.dtype == FP8 else (2e-3, 2e-3)
    torch.testing.assert_close(inside(memory).double(), expected, rtol=rtol, atol=atol)
    outside = memory.float()
    inside(outside).fill_(torch.nan)
    assert outside.isnan().all()


class Operands(NamedTuple):
    """What `launch_conv` takes, in its order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    past: Tensor
    residual: Tensor | None
    scale: Tensor | None

    def sums(self) -> Tensor:
        """The convolution in float64, scaled, with bias and residual."""
        factor, zero = (torch.ones(1) if self.scale is None else self.scale), torch.zeros(len(self.weight))
        weight = self.weight.double() * factor.double().view(-1, 1, 1, 1, 1)
        zeros = self.x.new_zeros(weight.shape[2] - 1 - len(self.past), *self.x.shape[1:])
        past = torch.cat([zeros.double(), self.past.double()])
        y = causal_conv3d_reference(self.x.double(), weight, (zero if self.bias is None else self.bias).double(), past)
        return y if self.residual is None else y + self.residual.double()


def operands(
    sizes: tuple[int, ...], kernel: tuple[int, int], past_frames: int, dtype: torch.dtype, with_bias: bool, added: bool
) -> Operands:
    """Random ones for sums of about 1, which are scaled if they are of e4m3."""
    (frames, channels, outputs, rows, columns), (kt, k) = sizes, kernel
    x, past = (channels_last(n, channels, rows, columns, dtype=dtype) for n in (frames, past_frames))
    x[..., 0, 0] = past[..., 0, 0] = 0  # where the sums of one tap are zeros, and so is their norm
    weight, factor = torch.randn(outputs, channels, kt, k, k), (channels * kt * k * k) ** -0.5
    bias = torch.randn(outputs).half() if with_bias else None
    residual = channels_last(frames, outputs, rows, columns) if added else None
    if dtype == FP8:
        return Operands(x, weight.to(FP8), bias, past, residual, factor * (1 + torch.rand(outputs)))
    return Operands(x, (weight * factor).to(dtype), bias, past, residual, None)


def check(
    sizes: tuple[int, int, int, int, int],
    parameters: dict[str, int],
    kernel: tuple[int, int] = (3, 3),
    past_frames: int = 0,
    dtype: torch.dtype = torch.float16,
    with_bias: bool = True,
    with_residual: bool = False,
    norm_dtype: torch.dtype | None = None,
    tail_frames: int = 0,
    programs: int = 2,
    seed: int = 0,
) -> None:
    """Holds one launch to the definition.

    Args:
        sizes: frames, channels, outputs, rows, columns.
        parameters: of the launch.
        kernel: taps in time and in space.
        past_frames: that are given; those before are zeros.
        dtype: of the operands.
        with_bias: whether there is one.
        with_residual: whether one is added.
        norm_dtype: of the result of a norm in the epilogue; None without a norm, and the result is float16.
        tail_frames: last frames of the result that are stored a second time.
        programs: multiprocessors of the model.
        seed: of the operands, and of the order in which partitions go on.
    """
    torch.manual_seed(seed)
    frames, _, outputs, rows, columns = sizes
    given = operands(sizes, kernel, past_frames, dtype, with_bias, with_residual)
    expected, norm = given.sums(), None
    if norm_dtype is not None:
        gamma = 1 + 0.1 * torch.randn(outputs).half()
        norm = gamma, outputs**0.5, fp8_out_scale(gamma) if norm_dtype == FP8 else 1.0
        expected = rms_norm_silu_reference(expected, gamma.double()) * norm[2]
    y = surrounded(frames, outputs, rows, columns, norm_dtype or torch.float16)
    tail = surrounded(tail_frames, outputs, rows, columns, y.dtype)
    tap, stored = -(kernel[1] // 2), inside(tail) if tail_frames else None
    with fake_hopper(conv_sm90, KERNEL, programs, seed):
        conv_sm90.launch_conv(*given, inside(y), (tap, tap), config=parameters, norm=norm, tail=stored)
    assert_holds(y, expected)
    assert_holds(tail, expected[frames - tail_frames :])


@pytest.mark.parametrize("past_frames", [0, 1, 2])
@pytest.mark.parametrize("frames", [1, 3])
def test_frames_before_the_clip(frames, past_frames):
    """Given ones are read from their own memory; taps on others are skipped."""
    check((frames, 24, 72, 5, 9), REUSING, past_frames=past_frames, seed=frames)


@pytest.mark.parametrize(
    ("kernel", "channels", "outputs", "rows", "parameters"),
    [
        ((1, 3), 40, 72, 27, config(64, 32, 32, 0, 8)),
        ((1, 3), 40, 72, 27, config(64, 32, 32, 1, 8)),
        ((1, 3), 40, 72, 53, config(64, 32, 32, 0, 16)),
        ((1, 3), 40, 72, 53, config(64, 32, 32, 1, 16)),
        ((1, 3), 72, 136, 27, config(128, 64, 64, 0, 8)),
        ((1, 3), 72, 200, 27, config(128, 0, 64, 1, 8)),
        ((3, 1), 72, 328, 27, config(128, 64, 32, 0, 8)),
        ((3, 3), 24, 8, 27, config(16, 0, 32, 1, 8)),
        ((1, 3), 24, 8, 53, config(16, 0, 16, 1, 16)),
    ],
)
@pytest.mark.parametrize("with_residual", [False, True])
def test_launch_parameters(kernel, channels, outputs, rows, parameters, with_residual):
    """Sizes that no tile and no block divides, with more tiles than programs."""
    check((1, channels, outputs, rows, 11), parameters, kernel, with_residual=with_residual, programs=1)


EPILOGUES = [
    {"with_bias": False},
    {"with_residual": True},
    {"dtype": FP8},
    {"dtype": FP8, "with_bias": False, "with_residual": True},
    {"norm_dtype": torch.float16},
    {"norm_dtype": FP8},
    {"dtype": FP8, "norm_dtype": FP8, "with_bias": False},
]


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(
    ("parameters", "outputs", "tail_frames"), [(REUSING, 80, 2), (TALL, 80, 1), (config(64, 0, 32, 0, 8), 48, 0)]
)
def test_epilogues(epilogue, parameters, outputs, tail_frames):
    """At the edges of the picture, and with and without a second block of output channels."""
    check((3, 48, outputs, 29, 5), parameters, (3, 1), 1, tail_frames=tail_frames, seed=tail_frames, **epilogue)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_partitions(with_residual, seed):
    """One program with six tiles, of so few steps that the copies of a tile begin before the one before is stored."""
    check((3, 24, 16, 6, 11), config(16, 0, 16, 0, 8), (1, 1), with_residual=with_residual, programs=1, seed=seed)


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_tail_of_more_channels_than_a_tile_has(with_residual):
    check((2, 24, 136, 29, 5), config(64, 0, 32, 0, 8), (1, 1), with_residual=with_residual, tail_frames=1)


def test_a_picture_of_one_pixel():
    """PyTorch gives rows and columns of it any strides, which TMA may refuse."""
    check((2, 32, 96, 1, 1), REUSING)


@settings(max_examples=6)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (2, 3, 5, 30, 12))), kernel=st.sampled_from([(3, 3), (3, 1), (1, 3)]),
    past_frames=st.integers(0, 2), epilogue=st.sampled_from(EPILOGUES), tail_frames=st.integers(0, 2),
    parameters=st.sampled_from([REUSING, TALL]), programs=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(sizes, kernel, past_frames, epilogue, tail_frames, parameters, programs, seed):
    frames, channels, outputs, rows, columns = sizes
    check(
        (frames, 16 * channels, 16 * outputs, rows, columns), parameters, kernel, min(past_frames, kernel[0] - 1),
        tail_frames=min(tail_frames, frames), programs=programs, seed=seed, **epilogue,
    )  # fmt: skip


@pytest.mark.parametrize("tile_h", [8, 16])
def test_stride_of_2(tile_h):
    x, weight, bias = channels_last(1, 32, 54, 22), torch.randn(72, 32, 3, 3).half() / 17, torch.randn(72).half()
    with poisoned_memory(), fake_hopper(conv_sm90, KERNEL, 2, tile_h):
        y = downsample_sm90(x, weight, bias, config(64, 32, 16, 0, tile_h))
    expected = downsample_conv2d_reference(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("reuse_rows", [0, 1])
def test_every_second_pixel_of_the_output(reuse_rows):
    x, weight, bias = channels_last(1, 24, 27, 5), torch.randn(72, 24, 3, 3).half() / 15, torch.randn(72).half()
    with poisoned_memory(), fake_hopper(conv_sm90, KERNEL, 1, reuse_rows) as kernel:
        y = upsample_sm90(x, fold_upsampling(weight), bias, config(64, 32, 32, reuse_rows, 8))
    assert kernel.launches == 4
    expected = upsample_conv2d_reference(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=4e-3, atol=4e-3)  # phases' weights are rounded once more
