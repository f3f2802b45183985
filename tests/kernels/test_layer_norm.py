"""LayerNorm and quantisation of rows: on the CPU, as torch ops, and on a GPU.

The kernel also runs in Triton's interpreter: `interpreted/layer_norm.py`.
"""

# pyright: reportCallIssue=false

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.layer_norm import (
    layer_norm,
    layer_norm_fp8,
    layer_norm_int8,
    layer_norm_modulate,
    layer_norm_modulate_fp8,
    layer_norm_modulate_int8,
    layer_norm_reference,
    quantize_int8_reference,
    quantize_reference,
    quantize_rows,
    quantize_rows_int8,
)
from kernels.rotation import rotate
from profiling.measure.check import poisoned_memory
from tests.tensors import error

module = importlib.import_module("kernels.layer_norm")  # the module; `kernels.layer_norm` is its function

EPS = 1e-6


# --- On the CPU -----------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([torch.float32, torch.bfloat16]))
def test_layer_norm(rows, columns, dtype):
    x, weight, bias = (3 * torch.randn(rows, columns)).to(dtype), *torch.randn(2, columns)
    y = torch.nn.functional.layer_norm(x.double(), (columns,), eps=EPS)
    close: Any = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-2}
    torch.testing.assert_close(layer_norm(x, weight, bias, EPS), (y * weight + bias).to(dtype), **close)
    torch.testing.assert_close(layer_norm_modulate(x, bias, weight, EPS), (y * (1 + weight) + bias).to(dtype), **close)


@pytest.mark.parametrize("function", [layer_norm_fp8, layer_norm_modulate_fp8])
def test_quantised_layer_norm(function):
    x = torch.randn(40, 96).bfloat16()
    x[:, 5] *= 50
    first, second = torch.randn(2, 96)
    values, scale = function(x, first, second, EPS)
    weight, bias, offset = (first, second, 0.0) if function is layer_norm_fp8 else (second, first, 1.0)
    exact = layer_norm_reference(x.double(), weight.double(), bias.double(), EPS, offset)
    assert error(values.double() * scale[:, None], exact) < 3.5e-2
    assert (values.float().abs().amax(1) == 448).all()


@pytest.mark.parametrize("function", [layer_norm_int8, layer_norm_modulate_int8])
def test_layer_norm_rotated_to_int8(function):
    x = torch.randn(40, 96).bfloat16()
    x[:, 5] *= 50
    first, second = torch.randn(2, 96)
    values, scale = function(x, first, second, EPS)
    weight, bias, offset = (first, second, 0.0) if function is layer_norm_int8 else (second, first, 1.0)
    exact = layer_norm_reference(x.double(), weight.double(), bias.double(), EPS, offset)
    assert error(rotate(values.double() * scale[:, None]), exact) < 1.5e-2
    assert (values.abs().amax(1) == 127).all()


def test_rows_of_zeros_stay_zero_in_int8():
    values, scale = quantize_rows_int8(torch.zeros(3, 64))
    assert (values == 0).all()
    torch.testing.assert_close(scale, torch.full((3,), 1e-12))


# --- As torch ops ---------------------------------------------------------------------------------------------------


def test_opcheck():
    x, weight, bias = torch.randn(3, 16), *torch.randn(2, 16)
    torch.library.opcheck(module.layer_norm_op.library_op, (x, weight, bias, EPS, 1.0))
    torch.library.opcheck(module.layer_norm_fp8_op.library_op, (x, weight, bias, EPS, 0.0))
    torch.library.opcheck(module.layer_norm_int8_op.library_op, (x, weight, bias, EPS, 0.0))
    torch.library.opcheck(module.quantize_rows_op.library_op, (x,))
    torch.library.opcheck(module.quantize_rows_int8_op.library_op, (x,))


def test_compiles_without_graph_breaks():
    x, weight, bias = torch.randn(3, 16), *torch.randn(2, 16)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        y = layer_norm_modulate(x, bias, weight)
        return (*layer_norm_fp8(x, weight, bias), *quantize_rows(y), *quantize_rows_int8(y))

    for y, expected in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x), strict=True):
        torch.testing.assert_close(y.float(), expected.float())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("x", lambda x: x[0], "x: shape [16], wanted [rows, columns]"),
        ("x", lambda x: x.double(), "x: torch.float64, wanted torch.float32 or torch.float16 or torch.bfloat16"),
        ("x", lambda x: x.T.contiguous().T, "x: strides (1, 3) for shape [3, 16], wanted stride 1 along the last axis"),
        ("weight", lambda x: x[:3], "weight: shape [3], wanted [16]"),
        ("bias", lambda x: x.to("meta"), "bias: on meta, wanted cpu"),
        ("bias", lambda x: x.clone().requires_grad_(), "bias: requires a gradient"),
    ],
)
def test_bad_arguments(name, change, words):
    given: dict[str, Any] = {"x": torch.randn(3, 16), "weight": torch.randn(16), "bias": torch.randn(16)}
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        layer_norm(**given | {name: change(given[name])})
    assert words in str(raised.value)


# --- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 5120), (1000, 5120), (77, 13824)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu(rows, columns, dtype):
    x = torch.randn(rows, columns, device="cuda")
    x[:, :: columns // 4] *= 30
    x, weight, bias = x.to(dtype), *torch.randn(2, columns, device="cuda")
    with poisoned_memory():
        y = layer_norm_modulate(x, bias, weight, EPS)
        values, scale = layer_norm_fp8(x, weight, bias, EPS)
        own, own_scale = quantize_rows(x)
    wide_x, wide_weight, wide_bias = x.double(), weight.double(), bias.double()
    assert error(y, layer_norm_reference(wide_x, wide_weight, wide_bias, EPS, 1.0)) < 5e-3
    assert error(values.double() * scale[:, None], layer_norm_reference(wide_x, wide_weight, wide_bias, EPS)) < 3.5e-2
    expected, expected_scale = quantize_reference(x)
    torch.testing.assert_close(own_scale, expected_scale)
    assert (own.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()
    with poisoned_memory():
        values, scale = layer_norm_int8(x, weight, bias, EPS)
        own, own_scale = quantize_rows_int8(x)
    rotated = rotate(layer_norm_reference(wide_x, wide_weight, wide_bias, EPS))
    assert error(values.double() * scale[:, None], rotated) < 2e-2
    expected, expected_scale = quantize_int8_reference(x)
    torch.testing.assert_close(own_scale, expected_scale)
    assert (own.int() - expected.int()).abs().amax() <= 1
