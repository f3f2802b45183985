"""The kernel of the VAE's RMSNorm and SiLU, compared with the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.common import FP8
from kernels.rms_norm_silu import fp8_out_scale, launch_rms_norm_silu, reference
from profiling.measure.check import poisoned_memory


def pixels(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@settings(max_examples=30)
@given(
    st.integers(1, 4), st.sampled_from([2, 3, 16, 24, 96]), st.integers(1, 5), st.integers(1, 5),
    st.booleans(), st.sampled_from([1, 4, 16]), st.integers(0, 99),
)  # fmt: skip
def test_norm_and_silu(frames, channels, rows, columns, silu, block, seed):
    """Pixel counts that are no multiple of PIXELS, frames of one pixel, channel counts that are no power of two."""
    torch.manual_seed(seed)
    x, gamma = pixels(frames, channels, rows, columns), 1 + torch.randn(channels) / 4
    y = launch_rms_norm_silu(x, gamma, silu, config={"PIXELS": block, "num_warps": 4})
    expected = reference(x.double(), gamma.double(), silu)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_pixels_of_any_size(scale):
    """A pixel of zeros stays zero; one whose squares underflow float32 is divided by the smallest norm allowed."""
    x, gamma = scale * pixels(1, 8, 2, 3), torch.ones(8)
    y = launch_rms_norm_silu(x, gamma)
    assert y.isfinite().all()
    if scale == 1e15:
        torch.testing.assert_close(y.double(), reference(x.double(), gamma.double()), rtol=1e-5, atol=1e-6)
    else:
        assert y.abs().max() < 1e-6


def test_half_precision():
    x, gamma = pixels(2, 12, 3, 4).half(), torch.randn(12).half()
    y = launch_rms_norm_silu(x, gamma)
    expected = reference(x.double(), gamma.double())
    torch.testing.assert_close(y, expected.half(), rtol=2e-3, atol=1e-3)


@settings(max_examples=30)
@given(
    st.integers(1, 4), st.integers(1, 4), st.sampled_from([2, 3, 24, 96]), st.integers(1, 5), st.integers(1, 5),
    st.booleans(), st.sampled_from([1, 4, 16]), st.sampled_from([torch.float32, torch.float16]), st.integers(0, 99),
)  # fmt: skip
def test_the_tail_has_the_last_frames_again(frames, kept, channels, rows, columns, silu, block, dtype, seed):
    """Bit for bit, from programs that have pixels before and in the tail; nothing beside the tail is written."""
    torch.manual_seed(seed)
    kept = min(kept, frames)
    x, gamma = pixels(frames, channels, rows, columns).to(dtype), (1 + torch.randn(channels) / 4).to(dtype)
    memory = torch.full((kept + 2, rows, columns, channels), torch.nan, dtype=dtype).permute(0, 3, 1, 2)
    config = {"PIXELS": block, "num_warps": 4}
    with poisoned_memory():
        y = launch_rms_norm_silu(x, gamma, silu, tail=memory[1:-1], config=config)
    assert torch.equal(y, launch_rms_norm_silu(x, gamma, silu, config=config))
    assert torch.equal(memory[1:-1], y[-kept:])
    assert memory[0].isnan().all()
    assert memory[-1].isnan().all()


def test_an_e4m3_tail_is_the_result_again():
    """The interpreter rounds to e4m3 in its own way, but twice the same."""
    x, gamma = pixels(3, 12, 3, 4), torch.randn(12)
    tail = torch.full_like(x[:2], torch.nan).to(FP8)
    y = launch_rms_norm_silu(x, gamma, True, fp8_out_scale(gamma), tail)
    assert torch.equal(tail.view(torch.uint8), y[1:].view(torch.uint8))
