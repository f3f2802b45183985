"""`kernels.absorbed_audio_attention` with e4m3 operands in both products.

z comes from a norm with a scale for each row, G and U from `kernels.absorb_audio_projections_fp8`. The weights of a
softmax are at most 1, so that their scale is known beforehand: the first product stores P8 = 448 P in e4m3.

    P = softmax((z8 G8[f]^T) z_scale G_scale[f] + g[f])         P8 = 448 P, rounded to e4m3
    y = residual + ((P8 U8[f]) U_scale[f] / 448 + bias[f])

The bias of a frame holds what was taken out of U. Back-ends: the Triton kernels of the 16-bit form, and the Hopper
kernel of kernels/absorbed_audio_attention_sm90.py.

Whether the student uses this is measured: `is_tuned` says whether kernels/tuned/ names it for a shape. Without an entry
the student multiplies in 16 bits.
"""

import torch
from torch import Tensor

from kernels import absorbed_audio_attention_sm90 as sm90
from kernels.absorbed_audio_attention import Scales, Sizes, absorbed_reference, check_absorbed, dims_of
from kernels.absorbed_audio_attention import dispatch as dispatch_triton
from kernels.common import FP8, check, define_op
from kernels.frame_attention import frame_kv_ranges
from kernels.linear_epilogue import Epilogue, check_epilogue
from kernels.tuning import TunedConfig, gpu_of, tuned_config

BACKENDS = ("gluon", "triton")
IN_16_BITS = "bf16"  # the back-end's name, in tuned tables, of the 16-bit form of the layer


def is_tuned(tokens: int, width: int, heads: int, sizes: Sizes, device: torch.device) -> bool:
    """Whether the fastest form of the layer that was measured on the device, at the nearest shape, is in e4m3."""
    dims = dims_of(tokens, width, heads, sizes)
    tuned = tuned_config("absorbed_audio_attention", dims, "fp8", device, backends=(*BACKENDS, IN_16_BITS))
    return tuned is not None and tuned.backend != IN_16_BITS


def dispatch(
    z: Tensor,
    keys: Tensor,
    key_bias: Tensor,
    values: Tensor,
    sizes: Sizes,
    value_bias: Tensor,
    residual: Tensor | None,
    scales: Scales,
    dtype: torch.dtype,
    tuned: TunedConfig | None = None,
) -> Tensor:
    """y in `dtype`, by the back-end `tuned`, or else the one that kernels/tuned/ names. Untuned shapes use Triton."""
    dims = dims_of(len(z), z.shape[1], keys.shape[1] // sizes.keys_per_frame, sizes)
    tuned = tuned or tuned_config("absorbed_audio_attention", dims, "fp8", z.device, backends=BACKENDS)
    tuned = tuned or TunedConfig("triton", {})
    if tuned.backend == "gluon" and not _runs_on_hopper(z, keys, values, sizes, residual, dtype):
        tuned = TunedConfig("triton", {})
    if tuned.backend == "triton":
        return dispatch_triton(z, keys, key_bias, values, sizes, value_bias, residual, scales, dtype, tuned)
    ranges = frame_kv_ranges(len(z), 1, sizes.tokens_per_frame, sizes.first_token)
    p = sm90.launch_weights(z, scales.z, keys, scales.keys, key_bias, ranges, tuned.config)
    return sm90.launch_output(p, values, scales.values, value_bias, residual, dtype, ranges, tuned.config)


def _runs_on_hopper(
    z: Tensor, keys: Tensor, values: Tensor, sizes: Sizes, residual: Tensor | None, dtype: torch.dtype
) -> bool:
    supported = sm90.supports(z, keys, values, sizes.keys_per_frame, residual, dtype)
    return supported and gpu_of(z.device).capability == "9.0"


# --- Operation ------------------------------------------------------------------------------------------------------


def _absorbed_fp8_cpu(
    z: Tensor, z_scale: Tensor, keys: Tensor, keys_scale: Tensor, key_bias: Tensor, values: Tensor,
    values_scale: Tensor, value_bias: Tensor, keys_per_frame: int, tokens_per_frame: int, first_token: int,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    sizes, scales = Sizes(keys_per_frame, tokens_per_frame, first_token), Scales(z_scale, keys_scale, values_scale)
    return absorbed_reference(z, keys, key_bias, values, sizes, value_bias, residual, scales).to(dtype)


def launch_absorbed_fp8(
    z: Tensor, z_scale: Tensor, keys: Tensor, keys_scale: Tensor, key_bias: Tensor, values: Tensor,
    values_scale: Tensor, value_bias: Tensor, keys_per_frame: int, tokens_per_frame: int, first_token: int = 0,
    residual: Tensor | None = None, dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """`absorbed_audio_attention_fp8` by its kernels, with the same arguments."""
    sizes, scales = Sizes(keys_per_frame, tokens_per_frame, first_token), Scales(z_scale, keys_scale, values_scale)
    return dispatch(z, keys, key_bias, values, sizes, value_bias, residual, scales, dtype)


def _absorbed_fp8_fake(
    z: Tensor, z_scale: Tensor, keys: Tensor, keys_scale: Tensor, key_bias: Tensor, values: Tensor,
    values_scale: Tensor, value_bias: Tensor, keys_per_frame: int, tokens_per_frame: int, first_token: int,
    residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return z.new_empty(z.shape[0], values.shape[1], dtype=dtype)


# The fake is written out because key ranges are computed from numbers, which symbolic shapes are not.
absorbed_audio_attention_fp8_op = define_op(
    "absorbed_audio_attention_fp8", cpu=_absorbed_fp8_cpu, cuda=launch_absorbed_fp8, fake=_absorbed_fp8_fake
)


def absorbed_audio_attention_fp8(
    z: Tensor,
    z_scale: Tensor,
    keys: Tensor,
    keys_scale: Tensor,
    key_bias: Tensor,
    values: Tensor,
    values_scale: Tensor,
    value_bias: Tensor,
    keys_per_frame: int,
    tokens_per_frame: int,
    first_token: int = 0,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The audio attention layer in e4m3, from the results of `absorb_audio_projections_fp8`.

    For each token of z in latent frame f, with a softmax over the keys of each head:

        P = softmax((z G[f]^T) z_scale G_scale[f] + g[f])
        y = residual + ((448 P, rounded to e4m3) U[f] U_scale[f] / 448 + bias[f])

    Products are accumulated, and softmax and epilogue computed, in float32; the result is rounded once.

    Args:
        z: float8_e4m3fn [tokens, width], contiguous. The input of the query projection for consecutive tokens of a
            chunk, which may begin and end inside a frame.
        z_scale: float32 [tokens], the scale of each row of z, contiguous.
        keys: G, float8_e4m3fn [frames, heads x keys_per_frame, width], contiguous.
        keys_scale: float32 [frames, heads x keys_per_frame], the scale of each row of G, contiguous.
        key_bias: g, float32 [frames, heads x keys_per_frame], contiguous.
        values: U^T, float8_e4m3fn [frames, out width, heads x keys_per_frame], contiguous.
        values_scale: float32 [frames, out width], the scale of each row of U^T, contiguous.
        value_bias: float32 [frames, out width], contiguous.
        keys_per_frame: number of keys of a frame; on a GPU a power of two.
        tokens_per_frame: number of tokens of a latent frame.
        first_token: which token of the chunk is the first one of z.
        residual: None, or [tokens, out width] in `dtype`. The values of a row are adjacent.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        y [tokens, out width], contiguous, in `dtype`.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device, stride or value, or requires a gradient.
    """
    check("z", z, shape=("tokens", "width"), dtype=FP8, layout="contiguous")
    check("z_scale", z_scale, shape=z.shape[:1], dtype=torch.float32, device=z.device, layout="contiguous")
    sizes = Sizes(keys_per_frame, tokens_per_frame, first_token)
    check_absorbed(z, keys, key_bias, values, sizes)
    for name, x, rows in (
        ("keys_scale", keys_scale, keys), ("values_scale", values_scale, values), ("value_bias", value_bias, values)
    ):  # fmt: skip
        check(name, x, shape=rows.shape[:2], dtype=torch.float32, device=z.device, layout="contiguous")
    check_epilogue(z, values[0], Epilogue(residual=residual), dtype)
    return absorbed_audio_attention_fp8_op(
        z, z_scale, keys, keys_scale, key_bias, values, values_scale, value_bias, *sizes, residual, dtype
    )
