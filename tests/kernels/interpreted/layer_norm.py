"""The kernel of LayerNorm and quantisation of rows, compared with the reference in float64."""

# pyright: reportCallIssue=false

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.common import FP8_MAX
from kernels.layer_norm import (
    launch_layer_norm,
    launch_layer_norm_fp8,
    launch_layer_norm_int8,
    launch_quantize_rows_int8,
    layer_norm_reference,
    quantize_int8_reference,
)
from kernels.rotation import rotate
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


@EXAMPLES
@given(
    st.integers(1, 9), st.sampled_from([1, 3, 16, 65, 96, 320, 384]), st.booleans(), st.booleans(), st.integers(0, 99)
)
def test_layer_norm_rotated_to_int8(rows, columns, modulated, strided, seed):
    """Values halfway between two integers may be rounded to either."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(rows, 2 * columns, generator=generator)
    x[:, columns // 2] *= 50
    x = x[:, :columns] if strided else x[:, :columns].contiguous()
    weight, bias = torch.randn(2, columns, generator=generator)
    offset = float(modulated)
    expected = rotate(layer_norm_reference(x.double(), weight.double(), bias.double(), EPS, offset))
    out, scale = launch_layer_norm_int8(x, weight, bias, EPS, offset)
    assert out.dtype == torch.int8
    assert (out.abs().amax(1) == 127).all()
    half = scale.double()[:, None] / 2
    assert ((out * scale.double()[:, None] - expected).abs() <= half * (1 + 1e-3) + 1e-4).all()


@pytest.mark.parametrize("kind", ["outliers", "zeros", "one huge value", "tiny", "largest"])
def test_difficult_rows_in_int8(kind):
    x = torch.randn(6, 96)
    if kind == "outliers":
        x[:, ::17] *= 1000
    elif kind == "zeros":
        x[2:4] = 0
    elif kind == "one huge value":
        x[3, 7] = 1e30
    elif kind == "tiny":
        x *= 1e-30
    else:
        x[1] = torch.finfo(torch.float32).max / 16  # a rotated row may be sqrt(128) times as large
    out, scale = launch_quantize_rows_int8(x)
    expected, expected_scale = quantize_int8_reference(x)
    assert scale.isfinite().all()
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert (out.int() - expected.int()).abs().amax() <= 1
    assert (out[2:4] == 0).all() or kind != "zeros"


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
