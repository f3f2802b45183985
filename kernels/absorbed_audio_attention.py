"""The audio attention layer with its projections absorbed into the keys and values.

The layer projects z to queries, lets the tokens of each latent frame f attend to the audio keys of that frame, and
projects the result (without the last bias, which the caller adds):

    q = z Wq^T + bq         o = softmax(q k[f]^T / sqrt(head_dim)) v[f]         y = concat over heads(o) Wo^T

With one speaker there is neither a norm nor a rotation between a projection and the attention. The projections can then
be multiplied into keys and values beforehand. DeepSeek's multi-head latent attention (MLA) calls this *weight
absorption*. For each head:

    logits = (z Wq^T + bq) k^T / sqrt(head_dim) = z G^T + g         G = k Wq / sqrt(head_dim), g = k bq / sqrt(head_dim)
    P v Wo^T = P U                                                  U = v Wo^T

Per frame and head, this is a product with 32 keys instead of head_dim 128: 3/4 fewer operations.
`absorb_audio_projections` makes G, g and U of a layer from the keys and values of a chunk, and
`absorbed_audio_attention` computes y from them. They are made anew at each call, because those of all layers would take
9 GB.

Source of the layer: SingleStreamAttention of SoulX-FlashTalk. Source of the term: DeepSeek-V2 (arXiv 2405.04434).
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.common import DTYPE_NAMES, FP8, check, define_op
from kernels.frame_attention import check_frames, frame_kv_ranges
from kernels.scheduler import query_tiles_on
from kernels.tuning import LaunchConfig, launch_config

# Launch parameters where nothing was tuned.
ABSORB_CONFIG: LaunchConfig = {"BLOCK_N": 128, "num_warps": 4, "num_stages": 2}
BF16_CONFIG: LaunchConfig = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
FP32_CONFIG: LaunchConfig = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}


# --- Reference ------------------------------------------------------------------------------------------------------


def absorb_reference(
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    out_weight: Tensor,
    q_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`absorb_audio_projections` by definition, in k's precision, with the same arguments."""
    heads, head_dim = k.shape[2:]
    scale = head_dim**-0.5
    q_weight, out_weight = (_dequantize(w, s, k.dtype) for w, s in ((q_weight, q_scale), (out_weight, out_scale)))
    keys = torch.einsum("fkhd,hdn->fhkn", k, q_weight.unflatten(0, (heads, head_dim))) * scale
    key_bias = torch.einsum("fkhd,hd->fhk", k, q_bias.unflatten(0, (heads, head_dim))) * scale
    values = torch.einsum("fkhd,nhd->fhkn", v, out_weight.unflatten(1, (heads, head_dim)))
    return keys.flatten(1, 2), key_bias.flatten(1, 2), values.flatten(1, 2)


def _dequantize(w: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return w if scale is None else (w.to(dtype) * scale[:, None]).to(dtype)


def absorbed_reference(
    z: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    keys_per_frame: int,
    tokens_per_frame: int,
    first_token: int = 0,
) -> Tensor:
    """`absorbed_audio_attention` by definition, in z's precision, with the same arguments."""
    outputs = []
    for start, end, frame, _ in frame_kv_ranges(len(z), 1, tokens_per_frame, first_token):
        logits = z[start:end] @ keys[frame].T + key_bias[frame]
        weights = logits.unflatten(1, (-1, keys_per_frame)).softmax(2).flatten(1)
        outputs.append(weights.to(values.dtype) @ values[frame])
    return torch.cat(outputs)


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def absorb_projection(x, w, w_scale, out, scale, width, frames, x_frame, x_row, x_head, w_head, w_channel, w_column,
                      SCALED: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """out[f, head, key, n] = scale sum_d x[f, key, head, d] w[head, d, n], for one head, BLOCK_N columns, all frames.

    SCALED: the result is multiplied by w_scale[n]. e4m3 weights are converted to the dtype of x, which is exact.
    """
    head, heads = tl.program_id(1), tl.num_programs(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_d, mask_n = tl.arange(0, KEYS), tl.arange(0, D), offs_n < width
    w_ptrs = w + head.to(tl.int64) * w_head + offs_d[:, None] * w_channel + offs_n[None, :].to(tl.int64) * w_column
    w_tile = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0).to(x.dtype.element_ty)
    for frame in range(frames):
        x_tile = tl.load(x + frame * x_frame + offs_k[:, None] * x_row + head * x_head + offs_d[None, :])
        acc = tl.dot(x_tile, w_tile, input_precision="ieee") * scale
        if SCALED:
            acc *= tl.load(w_scale + offs_n, mask=mask_n, other=0.0)[None, :]
        rows = ((frame * heads + head) * KEYS + offs_k).to(tl.int64)
        out_ptrs = out + rows[:, None] * width + offs_n[None, :]
        tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=mask_n[None, :])


@triton.jit
def absorbed_attention_weights(z_desc, keys_desc, key_bias, out, token_tiles, columns, width,
                               KEYS_PER_FRAME: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                               BLOCK_K: tl.constexpr):  # fmt: skip
    """softmax(z G^T + g) over groups of KEYS_PER_FRAME columns: a tile of tokens of one frame, BLOCK_N columns.

    z_desc describes z [tokens, width], and keys_desc G [frames x columns, width]. A box may reach into the next frame,
    whose results are not stored, or beyond the end of memory, where it is filled with zeros.
    """
    tile_ptr = token_tiles + 4 * tl.program_id(1)
    row, row_end, frame = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    first_column = tl.program_id(0) * BLOCK_N
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, width, BLOCK_K):
        z_tile, keys_tile = z_desc.load([row, k]), keys_desc.load([frame * columns + first_column, k])
        logits = tl.dot(z_tile, keys_tile.T, logits, input_precision="ieee")
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    logits += tl.load(key_bias + frame * columns + offs_n, mask=mask_n, other=0.0)[None, :]
    grouped = tl.reshape(logits * 1.4426950408889634, [BLOCK_M, BLOCK_N // KEYS_PER_FRAME, KEYS_PER_FRAME])
    p = tl.exp2(grouped - tl.max(grouped, 2)[:, :, None])
    p = tl.reshape(p * (1.0 / tl.sum(p, 2))[:, :, None], [BLOCK_M, BLOCK_N])
    out_ptrs = out + offs_m[:, None].to(tl.int64) * columns + offs_n[None, :]
    tl.store(out_ptrs, p.to(out.dtype.element_ty), mask=(offs_m < row_end)[:, None] & mask_n[None, :])


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_absorb(
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    out_weight: Tensor,
    q_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`absorb_audio_projections` by the Triton kernel, launched once for the keys and once for the values.

    The rows of q_weight are summed over, so that q_scale is multiplied into k. `config` replaces default launch
    parameters.
    """
    frames, keys_per_frame, heads, head_dim = k.shape
    if keys_per_frame < 16 or keys_per_frame & (keys_per_frame - 1):
        raise ValueError(f"k: {keys_per_frame} keys a frame, wanted a power of two from 16 on")
    dims = {"frames": frames, "keys": keys_per_frame, "heads": heads, "head_dim": head_dim}
    parameters = launch_config(
        "absorb_audio_projections", dims, DTYPE_NAMES[k.dtype], k.device,
        default=ABSORB_CONFIG, given=config, match_exactly=("head_dim",),
    )  # fmt: skip

    def absorb(x: Tensor, w: Tensor, w_strides: tuple[int, ...], width: int, w_scale: Tensor | None, scale: float):
        """`w_strides` are those of w as [head, channel of the head, column]."""
        out = x.new_empty(frames, heads * keys_per_frame, width)
        absorb_projection[(triton.cdiv(width, parameters["BLOCK_N"]), heads)](
            x, w, x if w_scale is None else w_scale, out, scale, width, frames, *x.stride()[:3], *w_strides,
            SCALED=w_scale is not None, KEYS=keys_per_frame, D=head_dim, **parameters,
        )  # fmt: skip
        return out

    scaled_k = k if q_scale is None else (k * q_scale.view(heads, head_dim)).to(k.dtype)
    q_strides = head_dim * q_weight.stride(0), q_weight.stride(0), q_weight.stride(1)
    out_strides = head_dim * out_weight.stride(1), out_weight.stride(1), out_weight.stride(0)
    keys = absorb(scaled_k, q_weight, q_strides, q_weight.shape[1], None, head_dim**-0.5)
    values = absorb(v, out_weight, out_strides, out_weight.shape[0], out_scale, 1.0)
    key_bias = torch.matmul(k.float().transpose(1, 2), q_bias.float().view(heads, head_dim, 1)).flatten(1)
    return keys, key_bias * head_dim**-0.5, values


def launch_absorbed(
    z: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    keys_per_frame: int,
    tokens_per_frame: int,
    first_token: int = 0,
    config: LaunchConfig | None = None,
) -> Tensor:
    """`absorbed_audio_attention`: the weights by the Triton kernel, their product with the values by PyTorch.

    `config` replaces default launch parameters.
    """
    (tokens, width), columns = z.shape, keys.shape[1]
    dims = {"tokens": tokens, "tokens_per_frame": tokens_per_frame, "columns": columns, "width": width}
    parameters = launch_config(
        "absorbed_audio_attention", dims, DTYPE_NAMES[z.dtype], z.device,
        default=FP32_CONFIG if z.dtype == torch.float32 else BF16_CONFIG, given=config,
    )  # fmt: skip
    ranges = frame_kv_ranges(tokens, 1, tokens_per_frame, first_token)
    block_m, block_n, block_k = (parameters[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    z_desc = TensorDescriptor.from_tensor(z, [block_m, block_k])
    keys_desc = TensorDescriptor.from_tensor(keys.flatten(0, 1), [block_n, block_k])
    token_tiles = query_tiles_on(z.device, type(z), ranges, block_m)
    p = z.new_empty(tokens, columns)
    absorbed_attention_weights[(triton.cdiv(columns, block_n), len(token_tiles))](
        z_desc, keys_desc, key_bias, p, token_tiles, columns, width, KEYS_PER_FRAME=keys_per_frame, **parameters
    )
    if tokens == len(values) * tokens_per_frame:
        return torch.bmm(p.unflatten(0, (-1, tokens_per_frame)), values).flatten(0, 1)
    return torch.cat([p[start:end] @ values[frame] for start, end, frame, _ in ranges])


# --- Operation ------------------------------------------------------------------------------------------------------


def _absorb_cpu(
    k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, out_weight: Tensor, q_scale: Tensor | None,
    out_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    keys, key_bias, values = absorb_reference(k, v, q_weight, q_bias, out_weight, q_scale, out_scale)
    return keys.contiguous(), key_bias.float().contiguous(), values.contiguous()


def _absorbed_cpu(
    z: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, keys_per_frame: int, tokens_per_frame: int,
    first_token: int,
) -> Tensor:  # fmt: skip
    return absorbed_reference(z, keys, key_bias, values, keys_per_frame, tokens_per_frame, first_token).to(z.dtype)


def _absorbed_fake(z: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, *_: int) -> Tensor:
    return z.new_empty(z.shape[0], values.shape[2])


absorb_audio_projections_op = define_op("absorb_audio_projections", cpu=_absorb_cpu, cuda=launch_absorb)

# The fake is written out because key ranges are computed from numbers, which symbolic shapes are not.
absorbed_audio_attention_op = define_op(
    "absorbed_audio_attention", cpu=_absorbed_cpu, cuda=launch_absorbed, fake=_absorbed_fake
)


def absorb_audio_projections(
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    out_weight: Tensor,
    q_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiplies the projections of an audio attention layer into its keys and values ("weight absorption").

    For each head: G = k Wq / sqrt(head_dim), g = k bq / sqrt(head_dim), U = v Wo^T. `absorbed_audio_attention` computes
    the layer from them.

    Args:
        k: [frames, keys, heads, head_dim], contiguous along head_dim; float32, float16 or bfloat16. On a GPU the number
            of keys must be a power of two of at least 16.
        v: like k.
        q_weight: [heads x head_dim, width], the weight of the query projection as nn.Linear has it.
        q_bias: [heads x head_dim], the bias of the query projection.
        out_weight: [out width, heads x head_dim], the weight of the output projection as nn.Linear has it.
        q_scale: None, or float32 [heads x head_dim], the scales of the rows of a float8_e4m3fn q_weight.
        out_scale: None, or float32 [out width], the scales of the rows of a float8_e4m3fn out_weight.

    Returns:
        G [frames, heads x keys, width] in the dtype of k, g float32 [frames, heads x keys], and U
        [frames, heads x keys, out width] in the dtype of k.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, or requires a gradient.
    """
    check("k", k, shape=("frames", "keys", "heads", "head_dim"))
    check("v", v, shape=k.shape, dtype=k.dtype, device=k.device)
    channels = k.shape[2] * k.shape[3]
    q_dtype, out_dtype = (k.dtype if scale is None else FP8 for scale in (q_scale, out_scale))
    check("q_weight", q_weight, shape=(channels, "width"), dtype=q_dtype, device=k.device)
    check("q_bias", q_bias, shape=(channels,), dtype=k.dtype, device=k.device)
    check("out_weight", out_weight, shape=("out width", channels), dtype=out_dtype, device=k.device)
    if q_scale is not None:
        check("q_scale", q_scale, shape=(channels,), dtype=torch.float32, device=k.device)
    if out_scale is not None:
        check("out_scale", out_scale, shape=out_weight.shape[:1], dtype=torch.float32, device=k.device)
    return absorb_audio_projections_op(k, v, q_weight, q_bias, out_weight, q_scale, out_scale)


def absorbed_audio_attention(
    z: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    keys_per_frame: int,
    tokens_per_frame: int,
    first_token: int = 0,
) -> Tensor:
    """The audio attention layer without its last bias, from the results of `absorb_audio_projections`.

    For each token of z in latent frame f: y = softmax(z G[f]^T + g[f]) U[f], with a softmax over the keys of each head.

    Args:
        z: [tokens, width], contiguous; float32, float16 or bfloat16. The input of the query projection for consecutive
            tokens of a chunk, which may begin and end inside a frame.
        keys: G [frames, heads x keys_per_frame, width], contiguous; z's dtype and device.
        key_bias: g, float32 [frames, heads x keys_per_frame], contiguous.
        values: U [frames, heads x keys_per_frame, out width], contiguous; z's dtype and device.
        keys_per_frame: number of keys of a frame, a power of two.
        tokens_per_frame: number of tokens of a latent frame.
        first_token: which token of the chunk is the first one of z.

    Returns:
        y [tokens, out width], contiguous, in the dtype of z.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device, stride or value, or requires a gradient.
    """
    check("z", z, shape=("tokens", "width"), layout="contiguous")
    frames, columns = keys.shape[:2]
    if keys.ndim != 3 or columns % keys_per_frame:
        raise ValueError(f"keys: shape {list(keys.shape)}, wanted [frames, a multiple of {keys_per_frame}, width]")
    check("keys", keys, shape=(frames, columns, z.shape[1]), dtype=z.dtype, device=z.device, layout="contiguous")
    check("key_bias", key_bias, shape=(frames, columns), dtype=torch.float32, device=z.device, layout="contiguous")
    check("values", values, shape=(frames, columns, "out width"), dtype=z.dtype, device=z.device, layout="contiguous")
    check_frames("keys", frames, len(z), tokens_per_frame, first_token)
    return absorbed_audio_attention_op(z, keys, key_bias, values, keys_per_frame, tokens_per_frame, first_token)
