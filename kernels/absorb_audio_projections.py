"""The projections of an audio attention layer, multiplied into its keys and values ("weight absorption").

The layer projects z to queries, lets the tokens of each latent frame f attend to the audio keys of that frame, and
projects the result:

    q = z Wq^T + bq         o = softmax(q k[f]^T / sqrt(head_dim)) v[f]         y = concat over heads(o) Wo^T + bo

With one speaker there is neither a norm nor a rotation between a projection and the attention. The projections can then
be multiplied into keys and values beforehand. DeepSeek's multi-head latent attention (MLA) calls this *weight
absorption*. For each head:

    logits = (z Wq^T + bq) k^T / sqrt(head_dim) = z G^T + g         G = k Wq / sqrt(head_dim), g = k bq / sqrt(head_dim)
    P v Wo^T = P U                                                  U = v Wo^T

Per frame and head, this is a product with 32 keys instead of head_dim 128: a quarter of the operations.
`kernels.absorbed_audio_attention` computes y from G, g and U.

Source of the layer: SingleStreamAttention of SoulX-FlashTalk. Source of the term: DeepSeek-V2 (arXiv 2405.04434).
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import DTYPE_NAMES, FP8, check, define_op
from kernels.tuning import LaunchConfig, launch_config

# Launch parameters where nothing was tuned.
DEFAULT_CONFIG: LaunchConfig = {"BLOCK_N": 128, "num_warps": 4, "num_stages": 2}


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
    values = torch.einsum("fkhd,nhd->fnhk", v, out_weight.unflatten(1, (heads, head_dim)))
    return keys.flatten(1, 2), key_bias.flatten(1, 2), values.flatten(2, 3)


def _dequantize(w: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return w if scale is None else (w.to(dtype) * scale[:, None]).to(dtype)


# --- Kernel ---------------------------------------------------------------------------------------------------------


@triton.jit
def absorb_projection(x, w, w_scale, out, scale, width, frames, x_frame, x_row, x_head, w_head, w_channel, w_column,
                      out_frame, out_key, out_column, SCALED: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
                      BLOCK_N: tl.constexpr):  # fmt: skip
    """scale sum_d x[f, key, head, d] w[head, d, n], for one head, BLOCK_N columns n, all frames.

    The result is stored at out[f, head KEYS + key, n], in the order that the strides of `out` say. SCALED: it is
    multiplied by w_scale[n]. e4m3 weights are converted to the dtype of x, which is exact.
    """
    head = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_d, mask_n = tl.arange(0, KEYS), tl.arange(0, D), offs_n < width
    w_ptrs = w + head.to(tl.int64) * w_head + offs_d[:, None] * w_channel + offs_n[None, :].to(tl.int64) * w_column
    w_tile = tl.load(w_ptrs, mask=mask_n[None, :], other=0.0).to(x.dtype.element_ty)
    out_ptrs = out + (head * KEYS + offs_k)[:, None] * out_key + offs_n[None, :].to(tl.int64) * out_column
    for frame in range(frames):
        x_tile = tl.load(x + frame * x_frame + offs_k[:, None] * x_row + head * x_head + offs_d[None, :])
        acc = tl.dot(x_tile, w_tile, input_precision="ieee") * scale
        if SCALED:
            acc *= tl.load(w_scale + offs_n, mask=mask_n, other=0.0)[None, :]
        tl.store(out_ptrs + frame * out_frame, acc.to(out.dtype.element_ty), mask=mask_n[None, :])


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
    check_keys_per_frame("k", keys_per_frame)
    dims = {"frames": frames, "keys": keys_per_frame, "heads": heads, "head_dim": head_dim}
    parameters = launch_config(
        "absorb_audio_projections", dims, DTYPE_NAMES[k.dtype], k.device,
        default=DEFAULT_CONFIG, given=config, match_exactly=("head_dim",),
    )  # fmt: skip
    columns, width, out_width = heads * keys_per_frame, q_weight.shape[1], out_weight.shape[0]

    def absorb(x: Tensor, w: Tensor, w_scale: Tensor | None, scale: float, out: Tensor):
        """w is [channel, column], `out` is [frame, key, column]."""
        absorb_projection[(triton.cdiv(out.shape[2], parameters["BLOCK_N"]), heads)](
            x, w, x if w_scale is None else w_scale, out, scale, out.shape[2], frames, *x.stride()[:3],
            *channel_strides(w, head_dim), *out.stride(), SCALED=w_scale is not None, KEYS=keys_per_frame, D=head_dim,
            **parameters,
        )  # fmt: skip

    keys, values = k.new_empty(frames, columns, width), k.new_empty(frames, out_width, columns)
    absorb(scaled_by_channel(k, q_scale), q_weight, None, head_dim**-0.5, keys)
    absorb(v, out_weight.T, out_scale, 1.0, values.mT)
    return keys, bias_of_keys(k, q_bias), values


def check_keys_per_frame(name: str, keys_per_frame: int) -> None:
    """Raises ValueError, which begins with `name`, unless the kernels can group so many keys."""
    if keys_per_frame < 1 or keys_per_frame & (keys_per_frame - 1):
        raise ValueError(f"{name}: {keys_per_frame} keys a frame, wanted a power of two")


def channel_strides(w: Tensor, head_dim: int) -> tuple[int, int, int]:
    """The strides of w [channel, column] as [head, channel of the head, column]."""
    return head_dim * w.stride(0), w.stride(0), w.stride(1)


def scaled_by_channel(k: Tensor, scale: Tensor | None) -> Tensor:
    """k times the scales [heads x head_dim] of its channels, in k's dtype."""
    return k if scale is None else (k * scale.view(k.shape[2:])).to(k.dtype)


def bias_of_keys(k: Tensor, q_bias: Tensor) -> Tensor:
    """g, float32 [frames, heads x keys]."""
    heads, head_dim = k.shape[2:]
    products = torch.matmul(k.float().transpose(1, 2), q_bias.float().view(heads, head_dim, 1))
    return products.flatten(1) * head_dim**-0.5


# --- Operation ------------------------------------------------------------------------------------------------------


def _absorb_cpu(
    k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, out_weight: Tensor, q_scale: Tensor | None,
    out_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    keys, key_bias, values = absorb_reference(k, v, q_weight, q_bias, out_weight, q_scale, out_scale)
    return keys.contiguous(), key_bias.float().contiguous(), values.contiguous()


absorb_audio_projections_op = define_op("absorb_audio_projections", cpu=_absorb_cpu, cuda=launch_absorb)


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
            of keys must be a power of two.
        v: like k.
        q_weight: [heads x head_dim, width], the weight of the query projection as nn.Linear has it.
        q_bias: [heads x head_dim], the bias of the query projection.
        out_weight: [out width, heads x head_dim], the weight of the output projection as nn.Linear has it.
        q_scale: None, or float32 [heads x head_dim], contiguous, the scales of the rows of a float8_e4m3fn q_weight.
        out_scale: None, or float32 [out width], contiguous, the scales of the rows of a float8_e4m3fn out_weight.

    Returns:
        G [frames, heads x keys, width] in the dtype of k, g float32 [frames, heads x keys], and U^T
        [frames, out width, heads x keys] in the dtype of k.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or stride, or requires a gradient.
    """
    check_projections(k, v, q_weight, q_bias, out_weight, q_scale, out_scale)
    return absorb_audio_projections_op(k, v, q_weight, q_bias, out_weight, q_scale, out_scale)


def check_projections(
    k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, out_weight: Tensor, q_scale: Tensor | None,
    out_scale: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError unless these are keys, values and projections of one layer."""
    check("k", k, shape=("frames", "keys", "heads", "head_dim"), layout="rows")
    check("v", v, shape=k.shape, dtype=k.dtype, device=k.device, layout="rows")
    channels = k.shape[2] * k.shape[3]
    q_dtype, out_dtype = (k.dtype if scale is None else FP8 for scale in (q_scale, out_scale))
    check("q_weight", q_weight, shape=(channels, "width"), dtype=q_dtype, device=k.device)
    check("q_bias", q_bias, shape=(channels,), dtype=k.dtype, device=k.device)
    check("out_weight", out_weight, shape=("out width", channels), dtype=out_dtype, device=k.device)
    if q_scale is not None:
        check("q_scale", q_scale, shape=(channels,), dtype=torch.float32, device=k.device, layout="contiguous")
    if out_scale is not None:
        rows = out_weight.shape[:1]
        check("out_scale", out_scale, shape=rows, dtype=torch.float32, device=k.device, layout="contiguous")
