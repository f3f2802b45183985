"""What one operation of a chunk computes: the call under the names that cases use, its FLOPs and its bytes.

`calls_of` describes a call of one of the operations of kernels/ from its arguments. Cases measure some operations under
another name or together, and they are described so here: a convolution with the norm behind it is two calls, which is
how it runs; absorbed audio attention counts together with the absorption before it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kernels.common import DTYPE_NAMES, QUANTIZED_NAMES
from profiling.cases.attention import FRAME_ATTENTION, SELF_ATTENTION, TEXT_IMAGE_ATTENTION
from profiling.cases.case import ITEM_BYTES, Operation
from profiling.cases.convolution import DOWNSAMPLE_CONV2D, UPSAMPLE_CONV2D
from profiling.cases.elementwise import (
    LAB_TRANSFER,
    LAYER_NORM_MODULATE,
    QUANTIZE_ROWS,
    RMS_NORM_ROPE,
    RMS_NORM_ROPE_FP8,
    RMS_NORM_SILU,
    RMS_NORM_SILU_TAIL,
)
from profiling.cases.linear import LINEAR

Dims = Mapping[str, int]

# Calls that are no operation of kernels/: a matrix product of PyTorch; passes over memory that one kernel makes,
# because the compiler fuses them, and one that stands alone.
MATMUL, FUSED_PASS, EAGER_PASS = "matmul", "fused pass", "eager pass"
AUDIO_LAYER, CONVOLUTION = "audio_layer", "causal_conv3d"

_OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        SELF_ATTENTION, TEXT_IMAGE_ATTENTION, FRAME_ATTENTION, LINEAR, LAYER_NORM_MODULATE, RMS_NORM_ROPE,
        RMS_NORM_ROPE_FP8, RMS_NORM_SILU, RMS_NORM_SILU_TAIL, QUANTIZE_ROWS, LAB_TRANSFER, UPSAMPLE_CONV2D,
        DOWNSAMPLE_CONV2D,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of an operation at a shape, or of plain PyTorch."""

    operation: str
    dims: tuple[tuple[str, int], ...]  # sorted, under the names that cases use; empty where only bytes are known
    dtype: str  # as cases spell it
    flops: float
    bytes: float

    @property
    def is_matmul(self) -> bool:
        """Whether its FLOPs are matrix products."""
        own = _OPERATIONS.get(self.operation)
        return own.is_matmul if own else self.flops > 0

    def __str__(self) -> str:
        """Its operation, shape and dtype, in one line."""
        shape = ", ".join(f"{name} {size}" for name, size in self.dims)
        return f"{self.operation} {self.dtype}" + (f" ({shape})" if shape else f" ({self.bytes / 1e6:.3g} MB)")


def call(operation: str, dtype: str, **dims: int) -> Call:
    """A call at these dimensions, with the FLOPs and bytes that follow from them."""
    return Call(operation, tuple(sorted(dims.items())), dtype, *work(operation, dims, dtype))


def work(operation: str, dims: Dims, dtype: str) -> tuple[float, float]:
    """FLOPs and least bytes of a call."""
    item = ITEM_BYTES[dtype]
    if operation == CONVOLUTION:
        return _conv_work(dims, item)
    if operation == AUDIO_LAYER:
        return _audio_work(dims, item)
    own = _OPERATIONS[operation]
    return own.flops(dims), own.bytes(dims, item)


def _conv_work(d: Dims, item: int) -> tuple[float, float]:
    taps, pixels = d["kt"] * d["k"] ** 2, d["rows"] * d["columns"]
    moved = pixels * ((d["frames"] + d["kt"] - 1) * d["channels"] + d["frames"] * d["outputs"])
    weights = taps * d["channels"] * d["outputs"]
    return 2.0 * weights * d["frames"] * pixels, float(item * (moved + weights))


def _audio_work(d: Dims, item: int) -> tuple[float, float]:
    """Of the absorption and of the attention with it. A share of the tokens may touch a frame more than it fills."""
    width, keys = d["heads"] * d["head_dim"], d["heads"] * d["keys"]
    frames = d.get("frames", -(-d["queries"] // d["tokens_per_frame"]))
    flops = 4.0 * width * keys * d["queries"] + 4.0 * width * frames * d["keys"] * width
    return flops, float(item * 2 * width * (d["queries"] + width + 2 * frames * keys))


# --- Operations of kernels/ -----------------------------------------------------------------------------------------


def calls_of(operation: str, arguments: Mapping[str, Any]) -> list[Call] | None:
    """The calls that a call of `flashtalk::operation` counts as; None if the operation is not known here."""
    describe = DESCRIBED.get(operation)
    return None if describe is None else list(describe(arguments))


def dtype_of(x: Tensor) -> str:
    """The dtype of a tensor as cases spell it."""
    return (DTYPE_NAMES | QUANTIZED_NAMES).get(x.dtype, "fp32")


def _linear(a: Mapping[str, Any]) -> Iterator[Call]:
    yield call("linear", dtype_of(a["x"]), rows=len(a["x"]), inputs=a["w"].shape[1], outputs=len(a["w"]))


def _attention(a: Mapping[str, Any]) -> Iterator[Call]:
    batch, queries, heads, head_dim = a["q"].shape
    dims = {"queries": queries, "keys": a["k"].shape[1], "heads": heads, "head_dim": head_dim}
    for _ in range(batch):
        yield call("chunk_attention", dtype_of(a["q"]), **dims)


def _attention_fp8(a: Mapping[str, Any]) -> Iterator[Call]:
    queries, heads, head_dim = a["q"].shape[-3:]
    keys = a["k"].shape[-3]
    yield call("chunk_attention", "fp8", queries=queries, keys=keys, heads=heads, head_dim=head_dim)


def _text_image(a: Mapping[str, Any]) -> Iterator[Call]:
    queries, heads, head_dim = a["q"].shape
    yield call(
        "text_image_attention",
        dtype_of(a["q"]),
        queries=queries,
        text=len(a["text_k"]),
        image=len(a["image_k"]),
        heads=heads,
        head_dim=head_dim,
        dedup_padding=int(a["num_text_tokens"] is not None),
    )


def _quantized_attention(
    a: Mapping[str, Any], attention: Callable[[Mapping[str, Any]], Iterator[Call]]
) -> Iterator[Call]:
    """Attention and the quantisation of its output, which are two kernels by default."""
    yield from attention(a)
    rows, heads, head_dim = a["q"].shape
    yield call("quantize_rows", "fp8", rows=rows, columns=heads * head_dim)


def _frame_attention(a: Mapping[str, Any]) -> Iterator[Call]:
    (queries, heads, head_dim), keys = a["q"].shape, a["k"].shape[1]
    dims = {"queries": queries, "tokens_per_frame": a["tokens_per_frame"], "keys": keys}
    yield call("frame_attention", dtype_of(a["q"]), heads=heads, head_dim=head_dim, **dims)


def _absorbed_audio(a: Mapping[str, Any]) -> Iterator[Call]:
    """`keys` is [frame, heads x keys, width]; absorption multiplies weights by the keys and values of all frames."""
    frames, columns, width = a["keys"].shape
    per_frame, heads = a["keys_per_frame"], columns // a["keys_per_frame"]
    dims = {"queries": len(a["z"]), "tokens_per_frame": a["tokens_per_frame"], "keys": per_frame, "heads": heads}
    whole = call(AUDIO_LAYER, dtype_of(a["z"]), head_dim=width // heads, **dims)
    flops, moved = _audio_work(dict(whole.dims) | {"frames": frames}, ITEM_BYTES[whole.dtype])
    yield replace(whole, flops=flops, bytes=moved)


def _layer_norm(a: Mapping[str, Any], dtype: str | None = None) -> Iterator[Call]:
    rows, columns = a["x"].shape
    yield call("layer_norm_modulate", dtype or dtype_of(a["x"]), rows=rows, columns=columns)


def _rms_norm_rope(a: Mapping[str, Any], operation: str, dtype: str | None = None) -> Iterator[Call]:
    tokens, heads, head_dim = a["q"].shape
    yield call(operation, dtype or dtype_of(a["q"]), tokens=tokens, heads=heads, head_dim=head_dim)


def _quantize_rows(a: Mapping[str, Any], dtype: str) -> Iterator[Call]:
    yield call("quantize_rows", dtype, rows=len(a["x"]), columns=a["x"].shape[1])


def _pixels(x: Tensor) -> dict[str, int]:
    return dict(zip(("frames", "channels", "rows", "columns"), x.shape, strict=True))


def _rms_norm_silu(a: Mapping[str, Any]) -> Iterator[Call]:
    yield _norm_silu(a, dtype_of(a["x"]), **_pixels(a["x"]))


def _norm_silu(a: Mapping[str, Any], dtype: str, **dims: int) -> Call:
    return call("rms_norm_silu" if a.get("tail") is None else "rms_norm_silu_tail", dtype, **dims)


def _convolution(a: Mapping[str, Any]) -> Iterator[Call]:
    x, weight = a["x"], a["weight"]
    outputs, channels, kt, k, _ = weight.shape
    dtype, frames = dtype_of(x), len(x)
    if kt == k == 1:
        pixels = frames * x.shape[2] * x.shape[3]
        yield matmul(dtype, pixels, channels, outputs)
        return
    whole = call(CONVOLUTION, dtype, **_pixels(x), outputs=outputs, kt=kt, k=k)
    # At a clip's beginning, the taps on frames before it are skipped.
    past = len(a["past"])
    seen = sum(min(kt, past + t + 1) for t in range(frames)) / frames
    yield replace(whole, flops=whole.flops * seen / kt)


def _convolution_norm(a: Mapping[str, Any]) -> Iterator[Call]:
    yield from _convolution(a)
    frames, _, rows, columns = a["x"].shape
    dtype = dtype_of(a["bias"])
    yield _norm_silu(a, dtype, frames=frames, channels=len(a["weight"]), rows=rows, columns=columns)


def _upsample(a: Mapping[str, Any]) -> Iterator[Call]:
    yield call("upsample_conv2d", dtype_of(a["x"]), **_pixels(a["x"]), outputs=a["phase_weights"].shape[2])


def _downsample(a: Mapping[str, Any]) -> Iterator[Call]:
    yield call("downsample_conv2d", dtype_of(a["x"]), **_pixels(a["x"]), outputs=len(a["weight"]))


def _lab_transfer(a: Mapping[str, Any]) -> Iterator[Call]:
    frames, _, rows, columns = a["pixels"].shape
    yield call("lab_transfer", "fp32", frames=frames, rows=rows, columns=columns)


def _nothing(_: Mapping[str, Any]) -> Iterator[Call]:
    yield from ()


# By the name of the operation; one that is not here counts by the bytes of its operands and results.
DESCRIBED: dict[str, Callable[[Mapping[str, Any]], Iterator[Call]]] = {
    "linear": _linear,
    "linear_fp8": _linear,
    "linear_fp8_quantized": _linear,
    "linear_int8": _linear,
    "chunk_attention": _attention,
    "chunk_attention_with_lse": _attention,
    "chunk_attention_fp8_with_lse": _attention_fp8,
    "chunk_attention_fp8_quantized": lambda a: _quantized_attention(a, _attention_fp8),
    "text_image_attention": _text_image,
    "text_image_attention_quantized": lambda a: _quantized_attention(a, _text_image),
    "frame_attention": _frame_attention,
    "absorb_audio_projections": _nothing,  # counted with the attention that it is for
    "absorb_audio_projections_fp8": _nothing,
    "absorbed_audio_attention": _absorbed_audio,
    "absorbed_audio_attention_fp8": _absorbed_audio,
    "layer_norm": _layer_norm,
    "layer_norm_fp8": lambda a: _layer_norm(a, "fp8"),
    "layer_norm_int8": lambda a: _layer_norm(a, "int8"),
    "quantize_rows": lambda a: _quantize_rows(a, "fp8"),
    "quantize_rows_int8": lambda a: _quantize_rows(a, "int8"),
    "rms_norm_rope": lambda a: _rms_norm_rope(a, "rms_norm_rope"),
    "rms_norm_rope_fp8": lambda a: _rms_norm_rope(a, "rms_norm_rope_fp8", "fp8"),
    "rms_norm_silu": _rms_norm_silu,
    "causal_conv3d": _convolution,
    "causal_conv3d_norm": _convolution_norm,
    "upsample_conv2d": _upsample,
    "downsample_conv2d": _downsample,
    "lab_transfer": _lab_transfer,
}


# --- Plain PyTorch --------------------------------------------------------------------------------------------------


def matmul(dtype: str, rows: int, inputs: int, outputs: int) -> Call:
    """A matrix product of PyTorch."""
    dims = {"rows": rows, "inputs": inputs, "outputs": outputs}
    moved = ITEM_BYTES[dtype] * (rows * inputs + inputs * outputs + rows * outputs)
    return Call(MATMUL, tuple(sorted(dims.items())), dtype, 2.0 * rows * inputs * outputs, float(moved))
