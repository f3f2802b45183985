"""The VAE's RMSNorm and SiLU: on the CPU, as a torch op, and on a GPU.

The kernel also runs in Triton's interpreter: `interpreted/rms_norm_silu.py`.
"""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.common import FP8
from kernels.rms_norm_silu import fp8_out_scale, reference, rms_norm_silu
from profiling.measure.check import poisoned_memory

module = importlib.import_module("kernels.rms_norm_silu")  # the module; `kernels.rms_norm_silu` is its function


def pixels(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
def test_equals_the_formula(dtype, silu):
    x, gamma = pixels(3, 6, 4, 5).to(dtype), torch.randn(6, 1, 1, 1).to(dtype)
    y = rms_norm_silu(x, gamma, silu)
    expected = F.normalize(x.double(), dim=1) * 6**0.5 * gamma.double().view(-1, 1, 1)
    expected = F.silu(expected) if silu else expected
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=close, atol=close)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_opcheck():
    x, gamma = pixels(2, 6, 4, 5), torch.randn(6)
    torch.library.opcheck(module.rms_norm_silu_op.library_op, (x, gamma, True, None))
    torch.library.opcheck(module.rms_norm_silu_op.library_op, (x, gamma, False, None))


def test_compiles_without_graph_breaks():
    x, gamma = pixels(2, 6, 4, 5), torch.randn(6)
    whole = torch.compile(rms_norm_silu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x, gamma), rms_norm_silu(x, gamma))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", torch.zeros(4, 5), "x: shape [4, 5], wanted [frames, channels, rows, columns]"),
        ("x", torch.zeros(2, 6, 4, 5), "x: strides (120, 20, 5, 1) for shape [2, 6, 4, 5], wanted channels-last"),
        ("gamma", torch.ones(5), "gamma: shape [5], wanted [6]"),
        ("gamma", torch.ones(12)[::2], "gamma: strides (2,) for shape [6], wanted contiguous memory"),
        ("gamma", torch.ones(6, device="meta"), "gamma: on meta, wanted cpu"),
        ("gamma", torch.ones(6, requires_grad=True), "gamma: requires a gradient"),
    ],
)
def test_bad_arguments(name, value, words):
    given: dict[str, Any] = {"x": pixels(2, 6, 4, 5), "gamma": torch.ones(6)}
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        rms_norm_silu(**given | {name: value})
    assert words in str(raised.value)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [96, 192, 384, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu(channels, dtype):
    x, gamma = pixels(4, channels, 33, 21, device="cuda").to(dtype), torch.randn(channels, device="cuda").to(dtype)
    with poisoned_memory():
        y = rms_norm_silu(x, gamma)
    expected = reference(x.double(), gamma.double())
    assert (y.double() - expected).norm() < (1e-5 if dtype == torch.float32 else 4e-3) * expected.norm()


@settings(max_examples=50)
@given(st.integers(2, 40), st.booleans(), st.integers(0, 2**31))
def test_fp8_never_saturates_and_keeps_its_precision(channels, silu, seed):
    torch.manual_seed(seed)
    gamma, x = torch.randn(channels), pixels(2, channels, 4, 5)
    x[0, :, 0, 0] = 0
    x[0, gamma.abs().argmax(), 0, 0] = 1e15 * gamma[gamma.abs().argmax()].sign()  # the whole norm in one channel
    out_scale = fp8_out_scale(gamma)
    y = rms_norm_silu(x, gamma, silu, out_scale)
    assert y.dtype == FP8
    expected = reference(x.double(), gamma.double(), silu) * out_scale
    assert expected.abs().max() < 448 * (1 + 1e-6)
    torch.testing.assert_close(y.double(), expected, rtol=2**-4, atol=2**-10)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [96, 192, 384, 10])
def test_gpu_fp8(channels):
    x, gamma = pixels(4, channels, 33, 21, device="cuda").bfloat16(), torch.randn(channels, device="cuda").bfloat16()
    out_scale = fp8_out_scale(gamma)
    with poisoned_memory():
        y = rms_norm_silu(x, gamma, out_scale=out_scale)
    expected = reference(x.double(), gamma.double(), out_scale=out_scale)
    assert (
        y.double() - expected.double()
    ).norm() < 4e-3 * expected.double().norm()  # values halfway between two of e4m3 may round either way
