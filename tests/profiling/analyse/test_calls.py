"""Calls of operations: their shapes as cases name them, their FLOPs and their bytes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.common import FP8, OPS
from profiling.analyse.calls import CONVOLUTION, DESCRIBED, MATMUL, Call, calls_of
from profiling.cases import registry


def only(operation: str, arguments: dict[str, Any]) -> Call:
    """The one call that a call of an operation counts as."""
    calls = calls_of(operation, arguments)
    assert calls is not None
    assert len(calls) == 1
    return calls[0]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CASES = {
    "linear/14b-w1-up/fp8": ("linear_fp8_quantized", {"x": empty(12096, 5120, dtype=FP8), "w": empty(13824, 5120)}),
    "linear/14b-w1-out/bf16": ("linear", {"x": empty(12096, 5120), "w": empty(5120, 5120)}),
    "chunk_attention/14b-w1/fp8": (
        "chunk_attention_fp8_with_lse",
        {"q": empty(12096, 40, 128, dtype=FP8), "k": empty(12096, 40, 128, dtype=FP8)},
    ),
    "text_image_attention/14b-w1-prompt/bf16": (
        "text_image_attention",
        {
            "q": empty(12096, 40, 128),
            "text_k": empty(512, 40, 128),
            "image_k": empty(257, 40, 128),
            "num_text_tokens": empty(1, dtype=torch.int32),
        },
    ),
    "rms_norm_rope_fp8/14b-w1/fp8": ("rms_norm_rope_fp8", {"q": empty(12096, 40, 128)}),
    "layer_norm_modulate/14b-w1/fp8": ("layer_norm_fp8", {"x": empty(12096, 5120)}),
    "quantize_rows/14b-w1-narrow/fp8": ("quantize_rows", {"x": empty(12096, 5120)}),
    "rms_norm_silu/14b-w1-level3/bf16": ("rms_norm_silu", {"x": empty(4, 96, 768, 448)}),
    "upsample_conv2d/14b-w1-level2/bf16": (
        "upsample_conv2d",
        {"x": empty(4, 192, 384, 224), "phase_weights": empty(2, 2, 96, 192, 2, 2)},
    ),
    "downsample_conv2d/14b-w1-level2/bf16": (
        "downsample_conv2d",
        {"x": empty(4, 96, 768, 448), "weight": empty(96, 96, 3, 3)},
    ),
    "lab_transfer/14b-w1/fp32": ("lab_transfer", {"pixels": empty(4, 3, 768, 448)}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_call_has_the_shape_and_the_work_of_its_case(name: str) -> None:
    operation, arguments = CASES[name]
    found, case = only(operation, arguments), registry()[name]
    assert (found.operation, dict(found.dims), found.dtype) == (case.operation.name, dict(case.shape.dims), case.dtype)
    assert (found.flops, found.bytes, found.is_matmul) == (case.flops, case.bytes, case.operation.is_matmul)


def convolution(frames: int, past: int, kt: int = 3, k: int = 3) -> dict[str, Any]:
    return {
        "x": empty(frames, 96, 768, 448),
        "weight": empty(96, 96, kt, k, k),
        "bias": empty(96),
        "past": empty(past, 96, 768, 448),
    }


def test_a_convolution_skips_the_frames_before_a_clip() -> None:
    case = registry()["causal_conv3d/14b-w1-level3/bf16"]
    whole, first = (only(CONVOLUTION, convolution(4, past)) for past in (2, 0))
    assert (dict(whole.dims), whole.flops, whole.bytes) == (dict(case.shape.dims), case.flops, case.bytes)
    assert first.flops == pytest.approx(whole.flops * (1 + 2 + 3 + 3) / 12)


def test_a_convolution_of_single_pixels_is_a_product() -> None:
    found = only(CONVOLUTION, convolution(1, 0, kt=1, k=1))
    assert (found.operation, found.flops) == (MATMUL, 2.0 * 768 * 448 * 96 * 96)


def test_a_convolution_with_its_norm_is_both() -> None:
    both = calls_of("causal_conv3d_norm", convolution(4, 2)) or ()
    assert [found.operation for found in both] == ["causal_conv3d", "rms_norm_silu"]


@pytest.mark.parametrize(
    ("operation", "attention"),
    [("text_image_attention_quantized", "text_image_attention"), ("chunk_attention_fp8_quantized", "chunk_attention")],
)
def test_attention_with_a_quantised_output_is_both(operation: str, attention: str) -> None:
    q, k = empty(12096, 40, 128), empty(257, 40, 128)
    both = calls_of(operation, {"q": q, "k": k, "text_k": k, "image_k": k, "num_text_tokens": None})
    assert both is not None
    assert [found.operation for found in both] == [attention, "quantize_rows"]
    assert dict(both[1].dims) == {"rows": 12096, "columns": 5120}


def test_absorbed_audio_attention_counts_with_the_absorption() -> None:
    """Two products with 40 x 32 keys for each token, and two for each key, of the frames that are there."""
    arguments = {"z": empty(12096, 5120), "keys": empty(9, 1280, 5120), "keys_per_frame": 32, "tokens_per_frame": 1344}
    found = only("absorbed_audio_attention", arguments)
    case = registry()["audio_layer/14b-w1/bf16"]
    assert (found.operation, dict(found.dims)) == (case.operation.name, dict(case.shape.dims))
    assert found.flops == 4.0 * 12096 * 1280 * 5120 + 4.0 * 9 * 32 * 5120 * 5120
    assert calls_of("absorb_audio_projections", {}) == []


def test_operations_have_their_shape_or_at_least_their_bytes() -> None:
    assert calls_of("another", {}) is None
    assert set(OPS) - set(DESCRIBED) <= {"kv_statistics"}


def test_every_frame_of_a_batch_is_a_call() -> None:
    q = empty(2, 5376, 1, 384)
    assert len(calls_of("chunk_attention", {"q": q, "k": q}) or ()) == 2
