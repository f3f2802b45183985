"""Which back-end runs by default: the description is held to what the dispatchers in kernels/ launch."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import tuning
from kernels.absorbed_audio_attention_fp8 import IN_16_BITS, is_tuned
from kernels.common import FP8
from kernels.tuning import GPU, assume_gpu
from model.errors import UserError
from profiling.cases import Case, registry
from profiling.cases.convolution import conv_shapes, prepare_weight
from profiling.defaults import default_backend
from profiling.fake_gpu import FakeCudaMode
from profiling.results import OK, Machine, Measurement

# The package exports functions under the names of their modules.
CHOOSERS = (
    "chunk_attention", "text_image_attention", "linear", "causal_conv3d", "upsample_conv2d", "downsample_conv2d",
    "frame_attention", "absorbed_audio_attention",
)  # fmt: skip
MODULES = (
    "chunk_attention", "text_image_attention", "linear", "causal_conv3d", "frame_attention", "resample_conv2d",
    "absorbed_audio_attention",
)  # fmt: skip
(
    chunk_attention,
    text_image_attention,
    linear,
    causal_conv3d,
    frame_attention,
    resample_conv2d,
    absorbed_audio_attention,
) = (import_module(f"kernels.{name}") for name in MODULES)
MACHINES = {
    "H100": Machine("cuda", "NVIDIA H100 80GB HBM3", 132, 80, "9.0"),
    "H200": Machine("cuda", "NVIDIA H200", 132, 141, "9.0"),  # takes the H100's table
    "L40S": Machine("cuda", "NVIDIA L40S", 142, 48, "8.9"),  # has none
}
CASES = [case for case in registry().values() if case.operation.name in CHOOSERS and case.dtype != "fp32"]


class Chosen(Exception):  # noqa: N818
    """Raised by what a dispatcher calls, with its name."""


def chooses(name: str) -> Any:
    def call(*_: object, **__: object) -> None:
        raise Chosen(name)

    return call


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every launcher raises its name instead of launching."""
    for module in (chunk_attention, linear, absorbed_audio_attention):
        for name in module.BACKENDS:
            monkeypatch.setitem(module.BACKENDS, name, chooses(name))
    monkeypatch.setattr(chunk_attention, "_sdpa_ranges", chooses("sdpa"))
    monkeypatch.setattr(absorbed_audio_attention, "launch_weights", lambda *_: None)
    monkeypatch.setattr(text_image_attention, "launch_sm90", chooses("gluon"))
    monkeypatch.setattr(text_image_attention, "launch_text_image", chooses("triton"))
    monkeypatch.setattr(causal_conv3d, "launch_sm90", chooses("gluon"))
    monkeypatch.setattr(causal_conv3d, "launch_library", chooses("library"))
    monkeypatch.setattr(frame_attention, "launch_frame", chooses("triton"))
    monkeypatch.setattr(frame_attention, "_frames_as_batch", chooses("sdpa"))
    for way in ("upsample", "downsample"):
        monkeypatch.setattr(resample_conv2d, f"{way}_sm90", chooses("gluon"))
        monkeypatch.setattr(resample_conv2d, f"{way}_library", chooses("library"))
    tuning._tuned_config.cache_clear()
    yield
    tuning._tuned_config.cache_clear()


def dispatch(case: Case) -> None:
    """Calls the dispatcher of the case's operation on inputs without memory."""
    x, *rest = case.inputs(torch.device("cuda"), None)
    name, fp8 = case.operation.name, case.dtype == "fp8"
    if name == "chunk_attention":
        k, v = rest
        if fp8:
            scales: Any = (x, k, v)  # only whether there are any counts
            ranges = chunk_attention.chunk_ranges(len(x), len(k), None, 0)
            x, k = (t[None].to(FP8) for t in (x, k))
            v = v.permute(1, 2, 0).contiguous().to(FP8)[None]
            chunk_attention.dispatch(x, k, v, scales, ranges, 1.0, torch.bfloat16)
        else:
            chunk_attention._attention_cuda(x[None], k[None], v[None], None, 0, 1.0)
    elif name == "text_image_attention":
        text_image_attention.dispatch(x, *rest, None)
    elif name == "linear":
        w, bias = rest
        eight = {"fp8": FP8, "int8": torch.int8}.get(case.dtype)
        operands: tuple[Tensor, ...] = (x, w) if eight is None else (x.to(eight), w.to(eight))
        scales = None if eight is None else (bias, bias)
        linear.dispatch(*operands, scales, linear.Epilogue(bias), torch.bfloat16)
    elif name == "causal_conv3d":
        w, bias, past = rest
        x8, w8, past8, _ = conv_shapes(x, w, past, fp8)
        causal_conv3d.dispatch(x8, w8, bias, past8, None, None)
    elif name == "absorbed_audio_attention":
        keys, key_bias, values, bias, residual, tokens_per_frame, keys_per_frame = rest
        sizes = absorbed_audio_attention.Sizes(keys_per_frame, tokens_per_frame)
        heads = keys.shape[1] // keys_per_frame
        if fp8 and not is_tuned(len(x), x.shape[1], heads, sizes, x.device):
            raise Chosen(IN_16_BITS)
        absorbed_audio_attention.dispatch(x, keys, key_bias, values, sizes, bias, residual)
    elif name == "frame_attention":
        frame_attention._frame_cuda(x, *rest, 0)
    else:
        w, bias = rest
        if name == "upsample_conv2d":
            resample_conv2d.dispatch_upsample(x, prepare_weight(name, w), bias)
        else:
            resample_conv2d.dispatch_downsample(x, w, bias)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.usefixtures("launched")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_the_description_agrees_with_the_dispatchers(machine: str) -> None:
    gpu = MACHINES[machine]
    for case in CASES:
        measured = tuple(Measurement(b.name, OK, b.ours) for b in case.backends)
        named = GPU(gpu.device, gpu.capability or "", gpu.units)
        with assume_gpu(named), FakeCudaMode(), pytest.raises(Chosen) as chosen:
            dispatch(case)
        assert default_backend(case.result(measured), gpu) == str(chosen.value), case.name


def test_a_damaged_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text("{")
    monkeypatch.setattr("profiling.defaults.FOLDER", tmp_path)
    case = CASES[0].result(())
    with pytest.raises(UserError, match=r"nvidia-h100-80gb-hbm3.json is not JSON"):
        default_backend(case, MACHINES["H100"])


def test_an_operation_with_one_back_end_has_no_choice() -> None:
    case = registry()["rms_norm_rope/14b-w1/bf16"]
    ours = case.result((Measurement("triton", OK, ours=True), Measurement("torch", OK)))
    assert default_backend(ours, MACHINES["H100"]) == "triton"
    two = case.result((Measurement("a", OK, ours=True), Measurement("b", OK, ours=True)))
    assert default_backend(two, MACHINES["H100"]) is None
