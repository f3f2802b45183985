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
from kernels.tuning import GPU, TunedConfig, assume_gpu
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
    for silu, tail in ((True, None), (False, None), (True, pixels(1, 6, 4, 5))):
        torch.library.opcheck(module.rms_norm_silu_op.library_op, (x, gamma, silu, None, tail))
    tail = pixels(1, 6, 4, 5).to(FP8)  # of which the check of schemas knows no hash
    for test in ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"):
        torch.library.opcheck(module.rms_norm_silu_op.library_op, (x, gamma, True, 1.0, tail), test_utils=test)


def test_compiles_without_graph_breaks():
    x, gamma, tail = pixels(2, 6, 4, 5), torch.randn(6), pixels(2, 6, 4, 5)
    whole = torch.compile(rms_norm_silu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x, gamma), rms_norm_silu(x, gamma))
    y = whole(x, gamma, tail=tail[1:])
    assert torch.equal(tail[1:], y[1:])


@settings(max_examples=40)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(2, 6), st.integers(1, 4), st.integers(1, 4), st.booleans(),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_the_tail_has_the_last_frames_again(frames, kept, channels, rows, columns, silu, fp8, seed):
    torch.manual_seed(seed)
    kept = min(kept, frames)
    x, gamma = pixels(frames, channels, rows, columns), torch.randn(channels)
    out_scale = fp8_out_scale(gamma) if fp8 else None
    memory = torch.full((kept + 2, rows, columns, channels), torch.nan).to(FP8 if fp8 else x.dtype).permute(0, 3, 1, 2)
    with poisoned_memory():
        y = rms_norm_silu(x, gamma, silu, out_scale, memory[1:-1])
    assert torch.equal(y.float(), rms_norm_silu(x, gamma, silu, out_scale).float())
    assert torch.equal(memory[1:-1].float(), y[-kept:].float())
    assert memory[0].float().isnan().all()
    assert memory[-1].float().isnan().all()


def test_whether_the_kernel_writes_tails_is_in_the_tuned_tables(monkeypatch):
    size = (4, 96, 768, 448)
    assert not module.tail_is_tuned(*size, torch.bfloat16, "cpu")
    with assume_gpu(GPU("NVIDIA H100 80GB HBM3", "9.0", 132)):
        assert not module.tail_is_tuned(*size, torch.bfloat16, "cuda"), "no GPU has measured it"
    for backend in ("fused", "separate"):
        found = TunedConfig(backend, {"PIXELS": 16})
        monkeypatch.setattr(module, "tuned_config", lambda *_, found=found: found)
        assert module.tail_is_tuned(*size, torch.bfloat16, "cuda") == (backend == "fused")
        assert not module.tail_is_tuned(*size, torch.float64, "cuda")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", torch.zeros(4, 5), "x: shape [4, 5], wanted [frames, channels, rows, columns]"),
        ("x", torch.zeros(2, 6, 4, 5), "x: strides (120, 20, 5, 1) for shape [2, 6, 4, 5], wanted channels-last"),
        ("gamma", torch.ones(5), "gamma: shape [5], wanted [6]"),
        ("gamma", torch.ones(12)[::2], "gamma: strides (2,) for shape [6], wanted contiguous memory"),
        ("gamma", torch.ones(6, device="meta"), "gamma: on meta, wanted cpu"),
        ("gamma", torch.ones(6, requires_grad=True), "gamma: requires a gradient"),
        ("tail", pixels(1, 6, 4, 4), "tail: shape [1, 6, 4, 4], wanted [frames, 6, 4, 5]"),
        ("tail", pixels(0, 6, 4, 5), "tail: shape [0, 6, 4, 5], wanted [frames, 6, 4, 5]"),
        ("tail", pixels(3, 6, 4, 5), "tail: shape [3, 6, 4, 5], wanted 2 frames or fewer"),
        ("tail", pixels(1, 6, 4, 5).half(), "tail: torch.float16, wanted torch.float32"),
        ("tail", torch.zeros(1, 6, 4, 5), "tail: strides (120, 20, 5, 1) for shape [1, 6, 4, 5], wanted channels-last"),
        ("tail", pixels(1, 6, 4, 5).to("meta"), "tail: on meta, wanted cpu"),
    ],
)
def test_bad_arguments(name, value, words):
    given: dict[str, Any] = {"x": pixels(2, 6, 4, 5), "gamma": torch.ones(6)}
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        rms_norm_silu(**given | {name: value})
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_tail_of_an_e4m3_result_is_e4m3():
    x, gamma = pixels(2, 6, 4, 5), torch.ones(6)
    with pytest.raises(ValueError, match=r"tail: torch.float32, wanted torch.float8_e4m3fn"):
        rms_norm_silu(x, gamma, out_scale=1.0, tail=torch.empty_like(x))


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


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [96, 192, 384, 10])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("frames", "kept"), [(4, 2), (1, 1), (2, 2), (3, 1)])
def test_gpu_tail(channels, fp8, frames, kept):
    """The last frames again, bit for bit; the frames around them in the same memory stay as they were."""
    x, gamma = pixels(frames, channels, 33, 21, device="cuda").bfloat16(), torch.randn(channels, device="cuda")
    gamma = gamma.bfloat16()
    out_scale = fp8_out_scale(gamma) if fp8 else None
    memory = torch.full((kept + 2, 33, 21, channels), torch.nan, device="cuda").to(FP8 if fp8 else torch.bfloat16)
    memory = memory.permute(0, 3, 1, 2)
    with poisoned_memory():
        y = rms_norm_silu(x, gamma, out_scale=out_scale, tail=memory[1:-1])
    assert torch.equal(y.float(), rms_norm_silu(x, gamma, out_scale=out_scale).float())
    assert torch.equal(memory[1:-1].float(), y[-kept:].float())
    assert memory[[0, -1]].float().isnan().all()
