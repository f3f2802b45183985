"""The audio layer with its projections absorbed into the keys and values, with bias and residual in its epilogue.

`kernels.absorb_audio_projections` multiplies the projections of the layer into the audio keys and values of each latent
frame f: G and g from the keys, U from the values. For the tokens of a frame the layer is then two products and a
softmax over the keys of each head:

    P = softmax(z G[f]^T + g[f])         y = residual + (P U[f] + bias)

The first kernel computes P, whose tiles hold whole heads, so that the softmax is its epilogue. The second one computes
y. Both work on tiles of tokens of one frame. Tokens may begin and end inside a frame, as with sequence parallelism.

Back-ends of the second product: the library (cuBLAS), or the Triton kernel where kernels/tuned/ names it for the shape;
in FP8 always the Triton kernel. The library takes bias and residual as the matrix that a product is added to, which
costs a pass over memory before it.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.absorb_audio_projections import check_keys_per_frame
from kernels.common import DTYPE_NAMES, FP8_MAX, check, define_op, to_e4m3
from kernels.frame_attention import check_frames, frame_kv_ranges
from kernels.linear import load_tile
from kernels.linear_epilogue import Epilogue, check_epilogue, store_tile
from kernels.scheduler import query_tiles_on
from kernels.tuning import LaunchConfig, TunedConfig, reads_by_pointers, tuned_config, untuned_config

# Launch parameters where nothing was tuned. Both products have tiles of BLOCK_M tokens; those of the first one have
# BLOCK_N columns, which are whole heads, those of the second one OUT_BLOCK_N.
DEFAULT_CONFIG: Mapping[str, LaunchConfig] = {
    "fp32": {"BLOCK_M": 32, "BLOCK_N": 64, "OUT_BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    "fp16": {"BLOCK_M": 128, "BLOCK_N": 128, "OUT_BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    "bf16": {"BLOCK_M": 128, "BLOCK_N": 128, "OUT_BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    "fp8": {"BLOCK_M": 128, "BLOCK_N": 128, "OUT_BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
}


class Sizes(NamedTuple):
    """How tokens and keys belong to frames."""

    keys_per_frame: int
    tokens_per_frame: int
    first_token: int = 0  # which token of the chunk is the first one


class Scales(NamedTuple):
    """The scales of e4m3 operands, float32."""

    z: Tensor  # [tokens]
    keys: Tensor  # [frames, heads x keys]
    values: Tensor  # [frames, out width]


# --- Reference ------------------------------------------------------------------------------------------------------


def absorbed_reference(
    z: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    sizes: Sizes,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scales: Scales | None = None,
) -> Tensor:
    """y by definition in float32, or in float64 if key_bias is float64.

    With scales, the operands are multiplied by them, and P is rounded to the dtype of z, as 448 P. bias is [out width]
    or [frames, out width].
    """
    wide = torch.promote_types(torch.float32, key_bias.dtype)
    outputs = []
    keys_per_frame, tokens_per_frame, first_token = sizes
    for start, end, frame, _ in frame_kv_ranges(len(z), 1, tokens_per_frame, first_token):
        logits = z[start:end].to(wide) @ keys[frame].to(wide).T
        if scales is not None:
            logits = logits * scales.z[start:end, None] * scales.keys[frame]
        p = (logits + key_bias[frame]).unflatten(1, (-1, keys_per_frame)).softmax(2).flatten(1)
        if scales is not None:
            p = (FP8_MAX * p).to(z.dtype).to(wide)
        y = p @ values[frame].to(wide).T
        if scales is not None:
            y = y * (scales.values[frame] / FP8_MAX)
        if bias is not None:
            y = y + (bias if bias.ndim == 1 else bias[frame])
        outputs.append(y if residual is None else y + residual[start:end])
    return torch.cat(outputs)


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def frame_product(x, w, row, w_row, rows, w_rows, terms, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_K: tl.constexpr, POINTERS: tl.constexpr):  # fmt: skip
    """The tile of x [rows, terms] times w [w_rows, terms] transposed, from `row` and `w_row` on."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, terms, BLOCK_K):
        x_tile = load_tile(x, row, k, rows, terms, terms, BLOCK_M, BLOCK_K, POINTERS)
        w_tile = load_tile(w, w_row, k, w_rows, terms, terms, BLOCK_N, BLOCK_K, POINTERS)
        acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")
    return acc


@triton.jit
def absorbed_attention_weights(z, keys, z_scale, keys_scale, key_bias, p, token_tiles, tokens, key_rows, columns, width,
                               SCALED: tl.constexpr, KEYS_PER_FRAME: tl.constexpr, BLOCK_M: tl.constexpr,
                               BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, POINTERS: tl.constexpr):  # fmt: skip
    """softmax(z G^T + g) over groups of KEYS_PER_FRAME columns: a tile of tokens of one frame, BLOCK_N columns.

    z [tokens, width] and keys G [key_rows = frames x columns, width] are descriptors, or pointers if POINTERS. A tile
    may reach into the next frame, whose results are not stored. SCALED: the operands are e4m3, and so is the result,
    which is 448 times the weights.
    """
    tile_ptr = token_tiles + 4 * tl.program_id(1)
    row, row_end, frame = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    first_column = tl.program_id(0) * BLOCK_N
    logits = frame_product(z, keys, row, frame * columns + first_column, tokens, key_rows, width, BLOCK_M, BLOCK_N,
                           BLOCK_K, POINTERS)  # fmt: skip
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < row_end, offs_n < columns
    if SCALED:
        logits *= tl.load(z_scale + offs_m, mask=mask_m, other=0.0)[:, None]
        logits *= tl.load(keys_scale + frame * columns + offs_n, mask=mask_n, other=0.0)[None, :]
    logits += tl.load(key_bias + frame * columns + offs_n, mask=mask_n, other=0.0)[None, :]
    grouped = tl.reshape(logits * 1.4426950408889634, [BLOCK_M, BLOCK_N // KEYS_PER_FRAME, KEYS_PER_FRAME])
    weights = tl.exp2(grouped - tl.max(grouped, 2)[:, :, None])
    largest = 448.0 if SCALED else 1.0
    weights = tl.reshape(weights * (largest / tl.sum(weights, 2))[:, :, None], [BLOCK_M, BLOCK_N])
    p_ptrs = p + offs_m[:, None].to(tl.int64) * columns + offs_n[None, :]
    weights = to_e4m3(weights, p) if SCALED else weights.to(p.dtype.element_ty)
    tl.store(p_ptrs, weights, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def absorbed_attention_output(p, values, values_scale, y, residual, bias, token_tiles, tokens, value_rows, columns,
                              out_width, bias_frame, residual_row, SCALED: tl.constexpr, BIAS: tl.constexpr,
                              RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                              BLOCK_K: tl.constexpr, POINTERS: tl.constexpr):  # fmt: skip
    """residual + (P U + bias): a tile of tokens of one frame, BLOCK_N columns.

    p [tokens, columns] and values U^T [value_rows = frames x out_width, columns] are descriptors, or pointers if
    POINTERS. SCALED: both are e4m3, and p holds 448 times the weights.
    """
    tile_ptr = token_tiles + 4 * tl.program_id(1)
    row, row_end, frame = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    first_column = tl.program_id(0) * BLOCK_N
    acc = frame_product(p, values, row, frame * out_width + first_column, tokens, value_rows, columns, BLOCK_M, BLOCK_N,
                        BLOCK_K, POINTERS)  # fmt: skip
    # The epilogue runs on one half of the tile after the other; on the whole tile it would run out of registers.
    left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
    offs_m = row + tl.arange(0, BLOCK_M)
    for half in tl.static_range(2):
        part = left if half == 0 else right
        offs_n = first_column + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        if SCALED:
            scale = tl.load(values_scale + frame * out_width + offs_n, mask=offs_n < out_width, other=0.0)
            part *= scale[None, :] * (1.0 / 448.0)
        store_tile(part, offs_m, offs_n, row_end, out_width, y, residual, y, y, y, y, bias + frame * bias_frame, y,
                   out_width, residual_row, SCALED=False, BIAS=BIAS, GELU=False, RESIDUAL=RESIDUAL, GATED=False,
                   QUANTIZE=False)  # fmt: skip


# --- Launcher -------------------------------------------------------------------------------------------------------

TokenRanges = tuple[tuple[int, int, int, int], ...]  # for each frame: first token, end of tokens, frame, next frame


def dispatch(
    z: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    sizes: Sizes,
    bias: Tensor | None,
    residual: Tensor | None,
    scales: Scales | None = None,
    dtype: torch.dtype | None = None,
    tuned: TunedConfig | None = None,
) -> Tensor:
    """y in `dtype`, or else that of z, with the back-end `tuned`, or else the one that kernels/tuned/ names.

    Shapes that were not tuned use the library in 16 and 32 bits, which is nearest to what was measured, a product
    without addition, and the Triton kernel in FP8. bias is [out width] or [frames, out width].
    """
    name = DTYPE_NAMES[z.dtype] if scales is None else "fp8"
    dims = dims_of(len(z), z.shape[1], keys.shape[1] // sizes.keys_per_frame, sizes)
    backends = BACKENDS if scales is None else ("triton",)
    tuned = tuned or tuned_config("absorbed_audio_attention", dims, name, z.device, backends=backends)
    parameters = {
        "POINTERS": int(reads_by_pointers(z, keys, values)),
        **DEFAULT_CONFIG[name],
        **untuned_config("absorbed_audio_attention", name, z.device),
        **(tuned.config if tuned else {}),
    }
    ranges = frame_kv_ranges(len(z), 1, sizes.tokens_per_frame, sizes.first_token)
    p = launch_weights(z, keys, key_bias, sizes.keys_per_frame, ranges, scales, parameters)
    output = BACKENDS[tuned.backend if tuned else "library" if scales is None else "triton"]
    return output(p, values, ranges, bias, residual, None if scales is None else scales.values, dtype, parameters)


def dims_of(tokens: int, width: int, heads: int, sizes: Sizes) -> dict[str, int]:
    """The shape of a layer, under the names that cases and tuned tables use."""
    per_frame = {"tokens_per_frame": sizes.tokens_per_frame, "keys": sizes.keys_per_frame}
    return {"tokens": tokens, **per_frame, "heads": heads, "width": width}


def launch_weights(
    z: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    keys_per_frame: int,
    ranges: TokenRanges,
    scales: Scales | None,
    parameters: Mapping[str, Any],
) -> Tensor:
    """P [tokens, heads x keys] in the dtype of z, by the Triton kernel."""
    check_keys_per_frame("keys_per_frame", keys_per_frame)
    (tokens, width), columns, keys = z.shape, keys.shape[1], keys.flatten(0, 1)
    launch = _launch_parameters(parameters, max(parameters["BLOCK_N"], keys_per_frame))
    token_tiles = query_tiles_on(z.device, type(z), ranges, launch["BLOCK_M"])
    p = z.new_empty(tokens, columns)
    z_scale, keys_scale = (key_bias, key_bias) if scales is None else (scales.z, scales.keys)
    absorbed_attention_weights[(triton.cdiv(columns, launch["BLOCK_N"]), len(token_tiles))](
        *_operands(z, keys, launch), z_scale, keys_scale, key_bias, p, token_tiles, tokens, len(keys), columns, width,
        SCALED=scales is not None, KEYS_PER_FRAME=keys_per_frame, **launch,
    )  # fmt: skip
    return p


def launch_output(
    p: Tensor,
    values: Tensor,
    ranges: TokenRanges,
    bias: Tensor | None,
    residual: Tensor | None,
    values_scale: Tensor | None,
    dtype: torch.dtype | None,
    parameters: Mapping[str, Any],
) -> Tensor:
    """residual + (P U + bias) in `dtype`, or else that of p, by the Triton kernel."""
    (tokens, columns), out_width, values = p.shape, values.shape[1], values.flatten(0, 1)
    launch = _launch_parameters(parameters, parameters["OUT_BLOCK_N"])
    token_tiles = query_tiles_on(p.device, type(p), ranges, launch["BLOCK_M"])
    y = p.new_empty(tokens, out_width, dtype=dtype)
    absorbed_attention_output[(triton.cdiv(out_width, launch["BLOCK_N"]), len(token_tiles))](
        *_operands(p, values, launch), y if values_scale is None else values_scale, y,
        y if residual is None else residual, y if bias is None else bias, token_tiles, tokens, len(values), columns,
        out_width, out_width if bias is not None and bias.ndim == 2 else 0,
        0 if residual is None else residual.stride(0), SCALED=values_scale is not None, BIAS=bias is not None,
        RESIDUAL=residual is not None, **launch,
    )  # fmt: skip
    return y


def _launch_parameters(parameters: Mapping[str, Any], block_n: int) -> dict[str, Any]:
    """The launch parameters of one of the products, whose tiles have `block_n` columns."""
    return {**{name: value for name, value in parameters.items() if name != "OUT_BLOCK_N"}, "BLOCK_N": block_n}


def _operands(x: Tensor, w: Tensor, launch: Mapping[str, Any]) -> tuple[Any, Any]:
    """The operands of the product x w^T, as descriptors of their tiles or as pointers."""
    if launch["POINTERS"]:
        return x, w
    block_m, block_n, block_k = (launch[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return TensorDescriptor.from_tensor(x, [block_m, block_k]), TensorDescriptor.from_tensor(w, [block_n, block_k])


def multiply_library(
    p: Tensor,
    values: Tensor,
    ranges: TokenRanges,
    bias: Tensor | None,
    residual: Tensor | None,
    _values_scale: None,
    _dtype: None,
    _parameters: Mapping[str, Any],
) -> Tensor:
    """residual + (P U + bias) by cuBLAS, in the dtype of p, added to the rounded sum of residual and bias."""
    y, added = p.new_empty(len(p), values.shape[1]), [x for x in (residual, bias) if x is not None]
    if len(added) == 2:
        torch.add(*added, out=y)
    elif added:
        y.copy_(added[0])
    beta, lengths = float(bool(added)), {end - start for start, end, *_ in ranges}
    if len(ranges) == len(values) and len(lengths) == 1:
        by_frame, weights = (x.unflatten(0, (len(values), -1)) for x in (y, p))
        by_frame.baddbmm_(weights, values.mT, beta=beta)
    else:
        for start, end, frame, _ in ranges:
            y[start:end].addmm_(p[start:end], values[frame].T, beta=beta)
    return y


BACKENDS: Mapping[str, Callable[..., Tensor]] = {"triton": launch_output, "library": multiply_library}


# --- Operation ------------------------------------------------------------------------------------------------------


def _absorbed_cpu(
    z: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, keys_per_frame: int, tokens_per_frame: int,
    first_token: int, bias: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    sizes = Sizes(keys_per_frame, tokens_per_frame, first_token)
    return absorbed_reference(z, keys, key_bias, values, sizes, bias, residual).to(z.dtype)


def launch_absorbed(
    z: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, keys_per_frame: int, tokens_per_frame: int,
    first_token: int = 0, bias: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`absorbed_audio_attention` by its kernels, with the same arguments."""
    sizes = Sizes(keys_per_frame, tokens_per_frame, first_token)
    return dispatch(z, keys, key_bias, values, sizes, bias, residual)


def _absorbed_fake(z: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, *_: object) -> Tensor:
    return z.new_empty(z.shape[0], values.shape[1])


# The fake is written out because key ranges are computed from numbers, which symbolic shapes are not.
absorbed_audio_attention_op = define_op(
    "absorbed_audio_attention", cpu=_absorbed_cpu, cuda=launch_absorbed, fake=_absorbed_fake
)


def absorbed_audio_attention(
    z: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    keys_per_frame: int,
    tokens_per_frame: int,
    first_token: int = 0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The audio attention layer, from the results of `absorb_audio_projections`.

    For each token of z in latent frame f: y = residual + (softmax(z G[f]^T + g[f]) U[f] + bias), with a softmax over
    the keys of each head. Sums, softmax and epilogue are computed in float32. The weights of the softmax are rounded to
    the dtype of z, and so is the result. The library rounds the sum of residual and bias to the dtype of z first.

    Args:
        z: [tokens, width], contiguous; float32, float16 or bfloat16. The input of the query projection for consecutive
            tokens of a chunk, which may begin and end inside a frame.
        keys: G [frames, heads x keys_per_frame, width], contiguous; z's dtype and device.
        key_bias: g, float32 [frames, heads x keys_per_frame], contiguous.
        values: U^T [frames, out width, heads x keys_per_frame], contiguous; z's dtype and device.
        keys_per_frame: number of keys of a frame; on a GPU a power of two.
        tokens_per_frame: number of tokens of a latent frame.
        first_token: which token of the chunk is the first one of z.
        bias: None, or [out width], the bias of the output projection; float32, float16 or bfloat16.
        residual: None, or [tokens, out width] in z's dtype. The values of a row are adjacent.

    Returns:
        y [tokens, out width], contiguous, in the dtype of z.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device, stride or value, or requires a gradient.
    """
    check("z", z, shape=("tokens", "width"), dtype=DTYPE_NAMES, layout="contiguous")
    sizes = Sizes(keys_per_frame, tokens_per_frame, first_token)
    check_absorbed(z, keys, key_bias, values, sizes)
    check_epilogue(z, values[0], Epilogue(bias, residual=residual), z.dtype)
    return absorbed_audio_attention_op(z, keys, key_bias, values, *sizes, bias, residual)


def check_absorbed(z: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, sizes: Sizes) -> None:
    """Raises ValueError unless keys and values are those of the frames that the tokens belong to."""
    keys_per_frame, tokens_per_frame, first_token = sizes
    if keys_per_frame < 1:
        raise ValueError(f"keys_per_frame: {keys_per_frame}, wanted at least 1")
    if keys.ndim != 3 or keys.shape[1] % keys_per_frame:
        raise ValueError(f"keys: shape {list(keys.shape)}, wanted [frames, a multiple of {keys_per_frame}, width]")
    frames, columns = keys.shape[:2]
    check("keys", keys, shape=(frames, columns, z.shape[1]), dtype=z.dtype, device=z.device, layout="contiguous")
    check("key_bias", key_bias, shape=(frames, columns), dtype=torch.float32, device=z.device, layout="contiguous")
    check("values", values, shape=(frames, "out width", columns), dtype=z.dtype, device=z.device, layout="contiguous")
    check_frames("keys", frames, len(z), tokens_per_frame, first_token)
