"""The kernels of the colour transfer, compared with the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.lab_transfer import lab_statistics, launch_lab_transfer, reference, to_bytes


@settings(max_examples=20)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([16, 64]), st.booleans(),
    st.sampled_from([1.0, 0.4, 0.0]), st.integers(0, 99),
)  # fmt: skip
def test_transfer(frames, height, width, block, last, strength, seed):
    """Frames that are no multiple of BLOCK pixels, and of one pixel, whose deviation is zero."""
    torch.manual_seed(seed)
    video = torch.rand(frames, 3, height, width) * 2 - 1
    mean, std = lab_statistics(torch.rand(1, 3, 8, 8) * 2 - 1)
    laid_out = video.contiguous(memory_format=torch.channels_last) if last else video
    out, rgb = launch_lab_transfer(laid_out, mean, std, strength, None, {"BLOCK": block, "num_warps": 4})
    expected = reference(video.double(), mean.double(), std.double(), strength)
    torch.testing.assert_close(out.double(), expected, atol=2e-4, rtol=0)
    assert (rgb.int() - to_bytes(out).int()).abs().max() <= 1
    given_statistics = torch.stack(lab_statistics(video), -1)[:, :, 0, 0].contiguous()
    rows = laid_out[:, :, : (height + 1) // 2]
    out, _ = launch_lab_transfer(rows, mean, std, strength, given_statistics, {"BLOCK": block, "num_warps": 4})
    torch.testing.assert_close(out.double(), expected[:, :, : (height + 1) // 2], atol=2e-4, rtol=0)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_one_colour_stays_finite(value):
    mean, std = lab_statistics(torch.rand(1, 3, 8, 8) * 2 - 1)
    out, _ = launch_lab_transfer(torch.full((1, 3, 4, 4), value), mean, std, 1.0, None, {"BLOCK": 16, "num_warps": 4})
    assert out.isfinite().all()
    assert out.abs().max() <= 1 + 1e-6
