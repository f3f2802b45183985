"""The kernel of the VAE's RMSNorm and SiLU, compared with the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.rms_norm_silu import launch_rms_norm_silu, reference


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
