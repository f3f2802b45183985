"""Linear layers in FP8, INT8 and in 16 bits: on the CPU, as torch ops, on a model of Hopper, and on a GPU.

The Triton kernels also run in Triton's interpreter: `interpreted/linear.py`.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

import importlib
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu

from kernels import linear_sm90
from kernels.common import FP8
from kernels.linear import (
    BACKENDS,
    Epilogue,
    dequantize,
    dispatch,
    linear,
    linear_fp8,
    linear_fp8_quantized,
    linear_int8,
    output_bound,
    quantize_rows,
    quantize_rows_int8,
    reference,
)
from kernels.linear_sm90 import supports
from kernels.tuning import GPU, TunedConfig, assume_gpu
from profiling.measure.check import poisoned_memory
from tests.fake_gluon import fake_hopper
from tests.tensors import draw, error

module = importlib.import_module("kernels.linear")  # the module; `kernels.linear` is its function


def operands(m: int, k: int, n: int, outliers: float = 1.0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """x, w and bias; every hundredth column of x, and one of w's rows in a hundred, is `outliers` times as large."""
    x, w, bias = torch.randn(m, k), torch.randn(n, k) * k**-0.5, torch.randn(n)
    x[:, torch.randperm(k)[: k // 100 + 1]] *= outliers
    w[torch.randperm(n)[: n // 100 + 1]] *= outliers
    return x.to(device), w.to(device), bias.to(device)


# --- On the CPU -----------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.integers(1, 9), st.integers(1, 6), st.integers(1, 40), st.sampled_from(["", "gelu", "gate", "residual"]),
    st.integers(0, 99),
)  # fmt: skip
def test_equals_the_formula(m, groups, n, what, seed):
    torch.manual_seed(seed)
    x, w, bias = operands(m, 16 * groups, n)
    gate = torch.randn(n) if what in ("gate", "residual") else None
    residual = torch.randn(m, n) if what == "residual" else None
    activation = "gelu_tanh" if what == "gelu" else None
    y = torch.nn.functional.linear(x.double(), w.double(), bias.double())
    y = torch.nn.functional.gelu(y, approximate="tanh") if activation else y
    y = y if gate is None else y * gate
    y = y if residual is None else y + residual
    assert error(linear(x, w, bias, activation, gate, residual), y) < 1e-5
    (x8, x_scale), (w8, w_scale) = quantize_rows(x), quantize_rows(w)
    same = linear_fp8(x8, x_scale, w8, w_scale, bias, activation, gate, residual, torch.float32)
    exact = linear(dequantize(x8, x_scale), dequantize(w8, w_scale), bias, activation, gate, residual)
    torch.testing.assert_close(same, exact, rtol=1e-4, atol=1e-4)
    (x8, x_scale), (w8, w_scale) = quantize_rows_int8(x), quantize_rows_int8(w)
    same = linear_int8(x8, x_scale, w8, w_scale, bias, activation, gate, residual, torch.float32)
    exact = linear(dequantize(x8, x_scale), dequantize(w8, w_scale), bias, activation, gate, residual)
    torch.testing.assert_close(same, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outliers", [1.0, 10.0, 30.0, 80.0])
def test_rotated_int8_has_a_third_of_the_error_of_e4m3(outliers):
    """However large the outlier channels are; without the rotation it would be larger than that of e4m3."""
    torch.manual_seed(0)
    x, w, _ = operands(64, 1024, 128)
    x[:, ::100] *= outliers
    exact = x.double() @ w.double().T
    int8 = linear_int8(*quantize_rows_int8(x), *quantize_rows_int8(w), dtype=torch.float32)
    fp8 = linear_fp8(*quantize_rows(x), *quantize_rows(w), dtype=torch.float32)
    assert error(int8, exact) < 1.5e-2
    assert error(int8, exact) < 0.4 * error(fp8, exact)


@pytest.mark.parametrize("outliers", [1.0, 10.0, 100.0])
def test_quantisation_keeps_four_bits(outliers):
    x, _, _ = operands(64, 512, 8, outliers)
    values, scale = quantize_rows(x)
    assert values.dtype == FP8
    assert values.float().abs().amax() <= 448
    assert error(dequantize(values, scale), x) < 3.5e-2


def test_extreme_rows_stay_finite():
    x = torch.zeros(5, 16)
    x[1] = 1e-42
    x[2, 3] = 3e38
    x[3] = -1.0
    values, scale = quantize_rows(x)
    assert values.float().isfinite().all()
    assert (values[:2].float() == 0).all()
    assert scale[0] == pytest.approx(1e-12)
    assert values[2, 3].float() == 448
    assert (values[3].float() == -448).all()


def test_values_beyond_a_wrong_bound_are_clamped():
    """e4m3 has no infinity: such values become 448."""
    x, w, _ = operands(8, 64, 32)
    bound = torch.tensor([1e-6, 1e-6])
    y, _ = linear_fp8_quantized(*quantize_rows(x), *quantize_rows(w), bound)
    assert y.float().isfinite().all()
    assert (y.float().abs() == 448).float().mean() > 0.5


@pytest.mark.parametrize("outliers", [1.0, 30.0])
@pytest.mark.parametrize("gelu", [False, True])
def test_quantised_output_loses_one_rounding(outliers, gelu):
    """A loose bound costs no precision: the error is always that of rounding to 4 bits, 2.6 %."""
    torch.manual_seed(0)
    x, w, bias = operands(64, 1024, 512, outliers)
    (x8, x_scale), (w8, w_scale) = quantize_rows(x), quantize_rows(w)
    activation = "gelu_tanh" if gelu else None
    exact = linear_fp8(x8, x_scale, w8, w_scale, bias, activation, dtype=torch.float32)
    y, y_scale = linear_fp8_quantized(x8, x_scale, w8, w_scale, output_bound(w8, w_scale, bias), bias, activation)
    assert error(dequantize(y, y_scale), exact) < 2.8e-2


def test_two_layers_stay_near_float32():
    """A feed-forward layer whose hidden values stay in e4m3."""
    torch.manual_seed(0)
    x, up, bias = operands(48, 512, 1024, 20.0)
    _, down, _ = operands(1, 1024, 512)
    expected = torch.nn.functional.gelu(x @ up.T + bias, approximate="tanh") @ down.T
    (up8, up_scale), (down8, down_scale) = quantize_rows(up), quantize_rows(down)
    bound = output_bound(up8, up_scale, bias)
    hidden = linear_fp8_quantized(*quantize_rows(x), up8, up_scale, bound, bias, "gelu_tanh")
    assert error(linear_fp8(*hidden, down8, down_scale, dtype=torch.float32), expected) < 6e-2


# --- As torch ops ---------------------------------------------------------------------------------------------------


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every op with arguments."""
    x, w, bias = operands(5, 32, 16)
    (x8, x_scale), (w8, w_scale) = quantize_rows(x), quantize_rows(w)
    gate, residual = torch.randn(16), torch.randn(5, 16)
    bound = output_bound(w8, w_scale, bias)
    return {
        "linear": (module.linear_op.library_op, (x, w, bias, False, gate, residual)),
        "linear_fp8": (
            module.linear_fp8_op.library_op,
            (x8, x_scale, w8, w_scale, bias, False, gate, residual, torch.float32),
        ),
        "linear_int8": (
            module.linear_int8_op.library_op,
            (*quantize_rows_int8(x), *quantize_rows_int8(w), bias, False, gate, residual, torch.float32),
        ),
        "linear_fp8_quantized": (
            module.linear_fp8_quantized_op.library_op,
            (x8, x_scale, w8, w_scale, bound, bias, True),
        ),
    }


@pytest.mark.parametrize("name", ["linear", "linear_fp8", "linear_fp8_quantized", "linear_int8"])
def test_opcheck(name):
    operation, arguments = calls()[name]
    # `test_schema` multiplies the inputs, which PyTorch cannot do in FP8.
    skipped = "test_schema" if "fp8" in name else ""
    tests = [test for test in torch.library._OPCHECK_DEFAULT_UTILS if test != skipped]
    torch.library.opcheck(operation, arguments, test_utils=tests)


def test_compiles_without_graph_breaks():
    x, w, bias = operands(5, 32, 16)
    (w8, w_scale), residual = quantize_rows(w), torch.randn(5, 16)
    bound = output_bound(w8, w_scale, bias)

    def layer(x: Tensor) -> Tensor:
        x8, x_scale = quantize_rows(x)
        hidden, scale = linear_fp8_quantized(x8, x_scale, w8, w_scale, bound, bias, "gelu_tanh")
        y = linear_fp8(hidden, scale, w8[:, :16], w_scale, bias, residual=residual, dtype=torch.float32)
        return linear(y, w[:, :16])

    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


FLOAT = {"x": torch.zeros(4, 16), "w": torch.zeros(8, 16), "bias": torch.zeros(8)}
EIGHT = {
    "x": torch.zeros(4, 16).to(FP8), "x_scale": torch.ones(4), "w": torch.zeros(8, 16).to(FP8),
    "w_scale": torch.ones(8),
}  # fmt: skip
INT8 = EIGHT | {name: EIGHT[name].to(torch.int8) for name in ("x", "w")}


@pytest.mark.parametrize(
    ("function", "change", "words"),
    [
        (linear, {"x": torch.zeros(16)}, "x: shape [16], wanted [rows, columns]"),
        (linear, {"x": torch.zeros(0, 16)}, "x: shape [0, 16], wanted [rows, columns]"),
        (linear, {"x": torch.zeros(4, 16).double()}, "x: torch.float64, wanted torch.float32 or torch.float16 or"),
        (linear, {"x": torch.zeros(4, 17)[:, :16]}, "x: strides (17, 1), wanted contiguous rows, a multiple of 16"),
        (linear, {"w": torch.zeros(8, 12)}, "w: shape [8, 12], wanted [outputs, 16]"),
        (linear, {"w": torch.zeros(8, 16).half()}, "w: torch.float16, wanted torch.float32"),
        (linear, {"w": torch.zeros(8, 16, device="meta")}, "w: on meta, wanted cpu"),
        (linear, {"bias": torch.zeros(4)}, "bias: shape [4], wanted [8]"),
        (linear, {"activation": "relu"}, "activation: 'relu', wanted 'gelu_tanh' or None"),
        (linear, {"gate": torch.zeros(8).half()}, "gate: torch.float16, wanted torch.float32"),
        (linear, {"gate": torch.zeros(8), "activation": "gelu_tanh"}, "gate: not together with an activation"),
        (linear, {"residual": torch.zeros(4, 8).half()}, "residual: torch.float16, wanted torch.float32"),
        (linear, {"residual": torch.zeros(8, 4).T}, "residual: strides (1, 4) for shape [4, 8], wanted stride 1"),
        (linear, {"bias": torch.zeros(8, requires_grad=True)}, "bias: requires a gradient"),
        (linear_fp8, {"x": torch.zeros(4, 16)}, "x: torch.float32, wanted torch.float8_e4m3fn"),
        (linear_fp8, {"x_scale": torch.ones(4, 1)}, "x_scale: shape [4, 1], wanted [4]"),
        (linear_fp8, {"x_scale": torch.ones(8)[::2]}, "x_scale: strides (2,) for shape [4], wanted contiguous memory"),
        (linear_fp8, {"w_scale": torch.ones(8).half()}, "w_scale: torch.float16, wanted torch.float32"),
        (linear_fp8, {"dtype": FP8}, "dtype: torch.float8_e4m3fn, wanted torch.float32 or torch.float16 or"),
        (linear_fp8, {"residual": torch.zeros(4, 8)}, "residual: torch.float32, wanted torch.bfloat16"),
        (linear_int8, {"x": torch.zeros(4, 16)}, "x: torch.float32, wanted torch.int8"),
        (linear_int8, {"w": torch.zeros(8, 16).to(FP8)}, "w: torch.float8_e4m3fn, wanted torch.int8"),
        (linear_int8, {"w_scale": torch.ones(4)}, "w_scale: shape [4], wanted [8]"),
        (linear_int8, {"dtype": torch.int8}, "dtype: torch.int8, wanted torch.float32 or torch.float16 or"),
        (
            linear_int8,
            {name: torch.zeros(rows, 133_152, dtype=torch.int8) for name, rows in (("x", 4), ("w", 8))},
            "x: 133152 columns, wanted at most 133144",
        ),
        (linear_fp8_quantized, {"bound": torch.zeros(3)}, "bound: shape [3], wanted [2]"),
    ],
)
def test_bad_arguments(function, change, words):
    given: dict[str, Any] = dict({linear: FLOAT, linear_int8: INT8}.get(function, EIGHT))
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        function(**given | change)
    assert words in str(raised.value)


def test_operands_that_the_hopper_kernel_supports():
    x, w = torch.zeros(4, 32).to(FP8), torch.zeros(16, 32).to(FP8)
    residual = torch.zeros(4, 16, dtype=torch.bfloat16)
    assert supports(x, w, torch.bfloat16, residual)
    assert supports(x, w, FP8, None)
    assert not supports(x[:, 1:17], w[:, 1:17], torch.bfloat16, None)  # an address that is no multiple of 16
    assert not supports(x, w[:12], FP8, None)  # output rows 12 bytes apart
    assert not supports(x, w, torch.float32, None)
    assert not supports(x, w, torch.bfloat16, residual.float())


def test_dispatch_follows_the_tuned_table(monkeypatch):
    """Untuned shapes use the library in 16 bits and the Triton kernel in FP8."""
    taken: list[tuple[str, object]] = []

    def take(name: str, *arguments: object) -> None:
        taken.append((name, arguments[-1]))

    monkeypatch.setattr(module, "BACKENDS", {name: partial(take, name) for name in BACKENDS})
    x, w = torch.zeros(4, 32), torch.zeros(16, 32)
    x8, w8, scales = x.to(FP8), w.to(FP8), (torch.ones(4), torch.ones(16))
    tables: dict[str, TunedConfig | None] = {"bf16": None, "fp8": None}
    monkeypatch.setattr(module, "tuned_config", lambda _operation, _dims, dtype, _device, **_: tables[dtype])
    for capability, found, expected in (
        ("9.0", None, ("triton", None)),
        ("9.0", TunedConfig("gluon", {"STAGES": 3}), ("gluon", {"STAGES": 3})),
        ("8.9", TunedConfig("gluon", {"STAGES": 3}), ("triton", None)),
        ("9.0", TunedConfig("library", {}), ("library", None)),
    ):
        tables["fp8"] = found
        with assume_gpu(GPU("any", capability, 132)):
            dispatch(x8, w8, scales, Epilogue(), torch.bfloat16)
        assert taken.pop() == expected
    tables["int8"] = None
    with assume_gpu(GPU("any", "9.0", 132)):
        dispatch(x8.to(torch.int8), w8.to(torch.int8), scales, Epilogue(), torch.bfloat16)
    assert taken.pop() == ("triton", None)
    with assume_gpu(GPU("any", "9.0", 132)):
        dispatch(x.bfloat16(), w.bfloat16(), None, Epilogue(), torch.bfloat16)
    assert taken.pop() == ("library", None)


# --- On a model of Hopper -------------------------------------------------------------------------------------------


@settings(max_examples=4, deadline=None)
@given(
    m=st.integers(1, 150), k=st.integers(1, 24), n=st.integers(1, 10), programs=st.integers(1, 5),
    accumulation=st.sampled_from([{}, {"FP32_ACCUM": 1}, {"DRIFT": 0.5}]), seed=st.integers(0, 99),
    what=st.sampled_from(["plain", "residual", "round"]),
)  # fmt: skip
def test_hopper_fp8(m, k, n, programs, accumulation, seed, what):
    """Any shape and epilogue. DRIFT multiplies a sum of K terms by 1 + DRIFT K."""
    k, n = 16 * k, 16 * n
    (x, w, residual), (bias, gate) = draw((m, k), (n, k), (m, n), seed=seed), draw((n,), (n,), seed=seed)
    (x8, x_scale), (w8, w_scale) = quantize_rows(x), quantize_rows(w)
    gain = 1 + accumulation.get("DRIFT", 0.0) * k
    epilogue = {
        "plain": Epilogue(bias),
        "residual": Epilogue(bias, False, gate, residual.half()),
        "round": Epilogue(bias, True, bound=gain * output_bound(w8, w_scale, bias)),
    }[what]
    dtype = FP8 if what == "round" else torch.float16
    config = {"BLOCK_N": 64, "STAGES": 2, **accumulation}
    with poisoned_memory(), fake_hopper(linear_sm90, "linear_fwd_sm90", programs, seed):
        y, y_scale, *_ = linear_sm90.launch(x8, w8, (x_scale, w_scale), *epilogue, dtype=dtype, config=config)
    wide = Epilogue(*(t.double() if isinstance(t, Tensor) else t for t in epilogue))
    expected = reference(x8, w8, (gain * x_scale.double(), w_scale.double()), wide, torch.float64)
    got = dequantize(y, y_scale) if what == "round" else y
    assert error(got, expected) < (4e-2 if what == "round" else 2e-3)


def tensor_core_product(x: Tensor, w: Tensor) -> Tensor:
    """x w^T as Hopper's tensor cores sum it: 32 terms at a time, truncated to 13 bits below the largest one."""
    total = torch.zeros(len(x), len(w), dtype=torch.float64)
    for k in range(0, x.shape[1], 32):
        terms = torch.cat((x[:, None, k : k + 32] * w[None, :, k : k + 32], total[..., None]), -1)
        exponent = torch.frexp(terms.abs().amax(-1, keepdim=True)).exponent - 1
        unit = torch.ldexp(torch.ones_like(terms[..., :1]), exponent - 13)
        total = ((terms / unit).trunc() * unit).sum(-1)
    return total


@pytest.mark.parametrize(("share", "drift", "before", "after"), [(0.0, 4e-8, 4e-3, 4e-3), (0.3, 7e-7, 11e-3, 4e-3)])
def test_a_factor_undoes_the_drift_of_truncated_sums(share, drift, before, after):
    """By emulation, of as many terms as the second feed-forward layer has.

    The drift depends on a component that both operands share, so that no factor suits all data: that of the second case
    would make the first one's error 1 %.
    """
    x, w, common = draw((16, 13824), (16, 13824), (1, 13824), seed=0)
    x, w = (quantize_rows(t)[0].double() for t in (gelu(x + share * common), w + share * common))
    sums, exact = tensor_core_product(x, w), x @ w.T
    assert error(sums, exact) < before
    assert error((1 + drift * 13824) * sums, exact) < after
    assert error((1 + 7e-7 * 13824) * sums, exact) < (after if share else 11e-3)


def test_the_emulation_agrees_with_an_h100():
    """On one, sums of 13,824 terms of one sign were 22 % too small."""
    x, w = (torch.rand(8, 13824).to(FP8).double() for _ in range(2))
    assert 0.21 < error(tensor_core_product(x, w), x @ w.T) < 0.23


# --- On a GPU -------------------------------------------------------------------------------------------------------

SHAPES = [(1, 64, 128), (17, 208, 272), (300, 4096, 512), (1000, 8208, 1040)]
HOPPER = [
    {},
    {"FP32_ACCUM": 1},
    {"FP32_ACCUM": 0, "SPLIT_K": 1},
    {"FP32_ACCUM": 0, "DRIFT": 1e-7},
    {"BLOCK_N": 128, "CONSUMERS": 3, "STAGES": 4, "FP32_ACCUM": 1, "SPLIT_K": 1, "GROUP_N": 3},
]
BACKEND_PARAMETERS = [("gluon", parameters) for parameters in HOPPER] + [("triton", {}), ("library", {})]


def skip_unless_hopper(backend: str) -> None:
    if backend == "gluon" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel needs a Hopper GPU")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "parameters"), BACKEND_PARAMETERS)
@pytest.mark.parametrize("what", ["plain", "gelu", "residual", "round"])
def test_gpu_fp8(shape, backend, parameters, what):
    skip_unless_hopper(backend)
    m, k, n = shape
    x, w, bias = operands(m, k, n, 10.0, "cuda")
    scales = (quantize_rows(x), quantize_rows(w))
    (x8, x_scale), (w8, w_scale) = scales
    gate, residual = torch.randn(n, device="cuda"), torch.randn(m, n, device="cuda").bfloat16()
    epilogue = {
        "plain": Epilogue(bias.bfloat16()),
        "gelu": Epilogue(bias, True),
        "residual": Epilogue(bias, False, gate, residual),
        "round": Epilogue(bias, True, bound=output_bound(w8, w_scale, bias)),
    }[what]
    dtype = FP8 if what == "round" else torch.bfloat16
    with poisoned_memory():
        y, y_scale = dispatch(x8, w8, (x_scale, w_scale), epilogue, dtype, TunedConfig(backend, parameters))
    wide = Epilogue(*(t.double() if isinstance(t, Tensor) else t for t in epilogue))
    expected = reference(x8, w8, (x_scale.double(), w_scale.double()), wide, torch.float64)
    assert y.dtype == dtype
    got = dequantize(y, y_scale) if what == "round" else y
    # Numbers just above a power of two are rounded to e4m3 with an error of up to 2^-4, 3.6 % in the mean square; a
    # single row of outputs, dominated by a few, was seen at 3.56 %.
    assert error(got, expected) < (4e-2 if what == "round" else 1e-2)
    again = dispatch(x8, w8, (x_scale, w_scale), epilogue, dtype, TunedConfig(backend, parameters))[0]
    assert torch.equal(y.view(torch.uint8), again.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("backend", "parameters"),
    [
        ("gluon", {}), ("gluon", {"SPLIT_K": 1}), ("gluon", {"BLOCK_N": 128, "CONSUMERS": 3, "STAGES": 4}),
        ("triton", {**module.SMALL_8BIT_CONFIG, "POINTERS": 0}),
        ("triton", {**module.SMALL_8BIT_CONFIG, "POINTERS": 1}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("what", ["plain", "gelu", "residual"])
def test_gpu_int8(shape, backend, parameters, what):
    skip_unless_hopper(backend)
    m, k, n = shape
    x, w, bias = operands(m, k, n, 10.0, "cuda")
    (x8, x_scale), (w8, w_scale) = quantize_rows_int8(x), quantize_rows_int8(w)
    gate, residual = torch.randn(n, device="cuda"), torch.randn(m, n, device="cuda").bfloat16()
    epilogue = {
        "plain": Epilogue(bias.bfloat16()),
        "gelu": Epilogue(bias, True),
        "residual": Epilogue(bias, False, gate, residual),
    }[what]
    tuned = TunedConfig(backend, parameters)
    with poisoned_memory():
        y, _ = dispatch(x8, w8, (x_scale, w_scale), epilogue, torch.bfloat16, tuned)
    wide = Epilogue(*(t.double() if isinstance(t, Tensor) else t for t in epilogue))
    assert error(y, reference(x8, w8, (x_scale.double(), w_scale.double()), wide, torch.float64)) < 1e-2
    assert torch.equal(y, dispatch(x8, w8, (x_scale, w_scale), epilogue, torch.bfloat16, tuned)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "parameters"), BACKEND_PARAMETERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_16_bits(shape, backend, parameters, dtype):
    skip_unless_hopper(backend)
    m, k, n = shape
    x, w, bias = (t.to(dtype) for t in operands(m, k, n, 1.0, "cuda"))
    gate, residual = torch.randn(n, device="cuda"), torch.randn(m, n, device="cuda").to(dtype)
    parameters = {**parameters, "FP32_ACCUM": 0, "DRIFT": 0.0} if parameters else parameters
    for epilogue in (Epilogue(bias, True), Epilogue(bias, False, gate, residual)):
        with poisoned_memory():
            y, _ = dispatch(x, w, None, epilogue, dtype, TunedConfig(backend, parameters))
        wide = Epilogue(*(t.double() if isinstance(t, Tensor) else t for t in epilogue))
        assert error(y, reference(x.double(), w.double(), None, wide, torch.float64)) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "fp32_accum", "bound"), [("gluon", 1, 2e-3), ("triton", 1, 2e-3), ("gluon", 0, 0.25)]
)
def test_gpu_sums_of_many_terms(backend, fp32_accum, bound):
    """Of one sign, where truncated sums drift the most: by 22 % on an H100, unless accumulated in float32."""
    skip_unless_hopper(backend)
    x8, w8 = (torch.rand(s, 13824, device="cuda").to(FP8) for s in (256, 512))
    scales = (torch.ones(256, device="cuda"), torch.ones(512, device="cuda"))
    parameters = {"FP32_ACCUM": fp32_accum} if backend == "gluon" else module.FP8_ACC32_CONFIG
    y, _ = dispatch(x8, w8, scales, Epilogue(), torch.bfloat16, TunedConfig(backend, parameters))
    assert error(y, x8.double() @ w8.double().T) < bound + 2e-3  # and the output's rounding


@pytest.mark.parametrize("more", [{}, {"gelu": True}, {"gate": 1, "residual": 1}, {"residual": 1}, {"bound": 1}])
def test_the_library_is_considered_only_for_products_with_a_bias(more, monkeypatch):
    """Tuned times of the library do not include the further passes that other epilogues cost it."""
    x, w = torch.ones(4, 32), torch.ones(8, 32)
    epilogue = module.Epilogue(**{k: v if v is True else torch.ones(8) for k, v in more.items()})
    asked = Mock(return_value=TunedConfig("triton", {}))
    backends = {name: Mock(return_value=name) for name in module.BACKENDS}
    monkeypatch.setattr(module, "tuned_config", asked)
    monkeypatch.setattr(module, "BACKENDS", backends)
    assert module.dispatch(x, w, None, epilogue, torch.float32) == "triton"
    assert ("library" in asked.call_args.kwargs["backends"]) == (not more)
    assert {"gluon", "triton"} <= set(asked.call_args.kwargs["backends"])
