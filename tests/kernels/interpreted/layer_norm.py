"""The kernel of LayerNorm and quantisation of rows, compared with the reference in float64."""

# pyright: reportCallIssue=false

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.common import FP8_MAX
from kernels.layer_norm import launch_layer_norm, launch_layer_norm_fp8, layer_norm_reference
from tests.tensors import error

EXAMPLES = settings(max_examples=15)
EPS = 1e-6


@EXAMPLES
@given(st.integers(1, 9), st.sampled_from([1, 3, 16, 65, 96]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_layer_norm(rows, columns, modulated, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(rows, 2 * columns, generator=generator)
    x = x[:, :columns] if strided else x[:, :columns].contiguous()
    weight, bias = torch.randn(2, columns, generator=generator)
    offset = float(modulated)
    expected = layer_norm_reference(x.double(), weight.double(), bias.double(), EPS, offset)
    out = launch_layer_norm(x, weight, bias, EPS, offset)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)  # 3 less 3 in one column
    out, scale = launch_layer_norm_fp8(x, weight, bias, EPS, offset)
    torch.testing.assert_close(out.double() * scale.double()[:, None], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.abs().amax(1), torch.full((rows,), FP8_MAX))


def test_layer_norm_of_rows_without_variance():
    """A constant row becomes the bias, here zero; an outlier is normalised like any value."""
    x = torch.full((3, 32), 5.0)
    x[1, 7] = 1e6
    zeros = torch.zeros(32)
    out, scale = launch_layer_norm_fp8(x, zeros, zeros, EPS, 1.0)
    assert out.isfinite().all()
    assert (out[0] == 0).all()
    assert scale[0] == pytest.approx(1e-12)
    expected = layer_norm_reference(x.double(), zeros.double(), zeros.double(), EPS, 1.0)
    assert error(out * scale[:, None], expected) < 1e-5


def test_half_precision_layer_norm():
    x = torch.randn(5, 48).half()
    weight, bias = torch.randn(2, 48)
    out = launch_layer_norm(x, weight, bias, EPS, 0.0)
    expected = layer_norm_reference(x.double(), weight.double(), bias.double(), EPS)
    torch.testing.assert_close(out, expected.half(), rtol=1e-3, atol=1e-3)
