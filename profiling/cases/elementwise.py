"""Cases of memory-bound operations: quantisation, norms, rotary embedding, colour transfer."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from kernels.chunk_attention import chunk_attention
from kernels.chunk_attention_fp8 import chunk_attention_fp8, dequantize
from kernels.lab_transfer import lab_statistics, lab_transfer, launch_lab_transfer
from kernels.lab_transfer import reference as lab_transfer_reference
from kernels.layer_norm import (
    launch_layer_norm,
    launch_layer_norm_fp8,
    launch_layer_norm_int8,
    launch_quantize_rows,
    launch_quantize_rows_int8,
    layer_norm_modulate,
    layer_norm_modulate_fp8,
    layer_norm_modulate_int8,
    quantize_rows,
    quantize_rows_int8,
)
from kernels.rms_norm_rope import (
    key_scale,
    launch_rms_norm_rope,
    launch_rms_norm_rope_fp8,
    reference_fp8,
    rms_norm_rope,
    rms_norm_rope_fp8,
    sample_tokens,
)
from kernels.rms_norm_rope import reference as rms_norm_rope_reference
from kernels.rms_norm_silu import TAIL_OPERATION, launch_rms_norm_silu, rms_norm_silu, with_tail
from kernels.rms_norm_silu import reference as rms_norm_silu_reference
from kernels.tuning import LaunchConfig
from profiling import official_baseline
from profiling.cases.attention import attention_reference, sdpa
from profiling.cases.case import (
    ANYWHERE,
    CUDA,
    Backend,
    Call,
    Dims,
    InputFactory,
    Operation,
    Output,
    compiled,
    kernel_and_library,
    kernel_backend,
    no_setup,
)
from profiling.cases.linear import (
    EPS,
    dequantized,
    norm_modulate,
    quantize_int8_library,
    quantize_library,
    rotate_library,
)


def restored(output: Any) -> Tensor:
    """What an output stands for: itself, or the values that 8 bits and scales represent, rotated back from int8."""
    if not isinstance(output, tuple):
        return output
    return rotate_library(dequantized(output)) if output[0].dtype == torch.int8 else dequantized(output)


def rows_configs(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters: rows per program, warps."""
    for rows, warps in itertools.product((1, 2, 4), (4, 8, 16, 32)):
        yield {"ROWS": rows, "num_warps": warps}


QUANTIZE_ROWS = Operation(
    name="quantize_rows",
    inputs=lambda d, randn: (randn(d["rows"], d["columns"]),),
    reference=lambda x: x,
    flops=lambda d: 3.0 * d["rows"] * d["columns"],
    bytes=lambda d, item: 3.0 * item * d["rows"] * d["columns"],  # bf16 in, e4m3 out
    backends={
        "fp8": (
            Backend("ours", no_setup(quantize_rows), ours=True, devices=("cpu",)),
            kernel_backend("triton", launch_quantize_rows, rows_configs),
            Backend("torch", no_setup(quantize_library)),
            Backend("torch-compiled", compiled(quantize_library), devices=CUDA),
        ),
        "int8": (
            Backend("ours", no_setup(quantize_rows_int8), ours=True, devices=("cpu",)),
            kernel_backend("triton", launch_quantize_rows_int8, rows_configs),
            Backend("torch", no_setup(quantize_int8_library)),
            Backend("torch-compiled", compiled(quantize_int8_library), devices=CUDA),
        ),
    },
    result=restored,
    is_matmul=False,
)


def launch_modulate(
    launch: Callable[..., Output], x: Tensor, shift: Tensor, scale: Tensor, config: LaunchConfig | None = None
) -> Output:
    """LayerNorm and modulation by one of this repository's launchers of the kernel."""
    return launch(x, scale, shift, EPS, 1.0, config)


def norm_quantize(x: Tensor, shift: Tensor, scale: Tensor) -> Output:
    """LayerNorm, modulation and quantisation by PyTorch."""
    return quantize_library(norm_modulate(x, shift, scale))


def norm_quantize_int8(x: Tensor, shift: Tensor, scale: Tensor) -> Output:
    """LayerNorm, modulation, rotation and quantisation by PyTorch."""
    return quantize_int8_library(norm_modulate(x, shift, scale))


LAYER_NORM_MODULATE = Operation(
    name="layer_norm_modulate",
    inputs=lambda d, randn: (
        randn(d["rows"], d["columns"]),
        *(randn(d["columns"], scale=0.1, dtype=torch.float32) for _ in range(2)),
    ),
    reference=lambda x, shift, scale: F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift,
    flops=lambda d: 8.0 * d["rows"] * d["columns"],
    bytes=lambda d, item: (item + max(item, 2.0)) * d["rows"] * d["columns"],
    backends={
        **kernel_and_library(
            layer_norm_modulate, partial(launch_modulate, launch_layer_norm), rows_configs, norm_modulate
        ),
        "fp8": (
            Backend("ours", no_setup(layer_norm_modulate_fp8), ours=True, devices=("cpu",)),
            kernel_backend("triton", partial(launch_modulate, launch_layer_norm_fp8), rows_configs),
            Backend("torch-compiled", compiled(norm_quantize), devices=CUDA),
        ),
        "int8": (
            Backend("ours", no_setup(layer_norm_modulate_int8), ours=True, devices=("cpu",)),
            kernel_backend("triton", partial(launch_modulate, launch_layer_norm_int8), rows_configs),
            Backend("torch-compiled", compiled(norm_quantize_int8), devices=CUDA),
        ),
    },
    result=restored,
    is_matmul=False,
)


def rotations(randn: InputFactory, tokens: int, pairs: int) -> Tensor:
    """Cosines and sines of random angles, float32 [token, pair, 2], as in a rotary embedding's table."""
    angles = randn(tokens, pairs, dtype=torch.float32)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def split_qkv(qkv: Tensor, rope: Tensor) -> list[Tensor]:
    """Views of q, k and v [tokens, heads, head_dim] in a fused projection [tokens, 3 * heads * head_dim]."""
    return list(qkv.unflatten(1, (3, -1, 2 * rope.shape[1])).unbind(1))


def norm_rope_library(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    """RMSNorm and rotary embedding of q and k by PyTorch."""
    q, k, _ = split_qkv(qkv, rope)
    return official_baseline.rms_norm_rope(q, k, q_weight, k_weight, rope, EPS)


def norm_rope_ours(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    """RMSNorm and rotary embedding of q and k by this repository's operation."""
    q, k, _ = split_qkv(qkv, rope)
    return rms_norm_rope(q, k, q_weight, k_weight, rope, EPS)


def norm_rope_launch(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor]:
    """RMSNorm and rotary embedding of q and k by this repository's kernel."""
    q, k, _ = split_qkv(qkv, rope)
    return launch_rms_norm_rope(q, k, q_weight, k_weight, rope, EPS, config=config)


def norm_rope_reference(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
    """RMSNorm and rotary embedding of q and k in the precision of the inputs."""
    q, k, _ = split_qkv(qkv, rope)
    return rms_norm_rope_reference(q, k, q_weight, k_weight, rope, EPS)


def norm_rope_inputs(d: Dims, randn: InputFactory) -> tuple[Tensor, ...]:
    """A fused projection, the weights of q and k, and a rotary table."""
    return (
        randn(d["tokens"], 3 * d["heads"] * d["head_dim"]),
        *(1 + randn(d["heads"] * d["head_dim"], scale=0.1) for _ in range(2)),
        rotations(randn, d["tokens"], d["head_dim"] // 2),
    )


def norm_rope_configs(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters: heads per iteration, tokens per program, warps."""
    for block_h, tokens, warps in itertools.product((4, 8, 16), (1, 2, 4), (4, 8)):
        yield {"BLOCK_H": block_h, "TOKENS": tokens, "num_warps": warps}


RMS_NORM_ROPE = Operation(
    name="rms_norm_rope",
    inputs=norm_rope_inputs,
    reference=norm_rope_reference,
    flops=lambda d: 2 * 10.0 * d["tokens"] * d["heads"] * d["head_dim"],
    bytes=lambda d, item: d["tokens"] * d["head_dim"] * (4.0 * d["heads"] * item + 4),
    backends=kernel_and_library(norm_rope_ours, norm_rope_launch, norm_rope_configs, norm_rope_library),
    is_matmul=False,
)


def norm_rope_fp8(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The operands of FP8 attention; `scale` is that of the keys, if computed beforehand."""
    q, k, v = split_qkv(qkv, rope)
    scale = key_scale(k_weight, q.shape[1]) if scale is None else scale
    return rms_norm_rope_fp8(q, k, v, q_weight, k_weight, scale, rope, EPS)


def prepare_norm_rope_fp8(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> Call:
    """Computes the keys' scale, which depends on the weight only, beforehand."""
    return partial(
        norm_rope_fp8, qkv, q_weight, k_weight, rope, key_scale(k_weight, qkv.shape[1] // 6 // rope.shape[1])
    )


def launch_norm_rope_fp8(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
    """The operands of FP8 attention by this repository's kernels."""
    q, k, v = split_qkv(qkv, rope)
    return launch_rms_norm_rope_fp8(
        q, k, v, q_weight, k_weight, q.new_empty(q.shape[1], dtype=torch.float32), rope, EPS
    )


def norm_rope_fp8_library(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
    """The operands of FP8 attention by the reference, in PyTorch."""
    q, k, v = split_qkv(qkv, rope)
    scale = key_scale(k_weight, q.shape[1])
    q8, q_scale, k8, v8, v_scale = reference_fp8(q, k, v, q_weight, k_weight, scale, rope, EPS)
    return q8, q_scale, k8, scale, v8, v_scale


def norm_rope_smoothed(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
    """q, k without the mean key of the sampled tokens, and v, in the precision of the inputs."""
    q, k, v = split_qkv(qkv, rope)
    q, k = rms_norm_rope_reference(q, k, q_weight, k_weight, rope, EPS)
    return q, k - k[sample_tokens(len(k))].mean(0), v


def dequantized_operands(output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The float32 values that the quantised operands represent."""
    q8, q_scale, k8, k_scale, v8, v_scale = output
    return dequantize(q8, q_scale, k8, k_scale, v8, v_scale, torch.float32)


RMS_NORM_ROPE_FP8 = Operation(
    name="rms_norm_rope_fp8",
    inputs=norm_rope_inputs,
    reference=norm_rope_smoothed,
    flops=lambda d: 3 * 10.0 * d["tokens"] * d["heads"] * d["head_dim"],
    bytes=lambda d, item: d["tokens"] * d["head_dim"] * (9.0 * d["heads"] * item + 4),  # bf16 in, e4m3 out
    backends={
        "fp8": (
            Backend("ours", prepare_norm_rope_fp8, ours=True, devices=ANYWHERE, launcher=launch_norm_rope_fp8),
            Backend("torch-compiled", compiled(norm_rope_fp8_library), devices=CUDA),
        )
    },
    result=dequantized_operands,
    is_matmul=False,
)


def norm_attention_reference(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> Tensor:
    """RMSNorm, rotary embedding and attention of a fused projection, in the precision of its inputs."""
    q, k, v = split_qkv(qkv, rope)
    q, k = rms_norm_rope_reference(q, k, q_weight, k_weight, rope, EPS)
    return attention_reference(q, k, v)


def norm_attention(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> Tensor:
    """RMSNorm, rotary embedding and attention by this repository, in 16 bits."""
    q, k, v = split_qkv(qkv, rope)
    q, k = rms_norm_rope(q, k, q_weight, k_weight, rope, EPS)
    return chunk_attention(q, k, v)


def norm_attention_fp8(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, scale: Tensor) -> Tensor:
    """RMSNorm, rotary embedding and attention by this repository, in FP8 from the norm on."""
    q8, q_scale, k8, k_scale, v8, v_scale = norm_rope_fp8(qkv, q_weight, k_weight, rope, scale)
    return chunk_attention_fp8(q8, q_scale, k8, k_scale, v8, v_scale)


def prepare_norm_attention_fp8(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> Call:
    """Computes the keys' scale, which depends on the weight only, beforehand."""
    scale = key_scale(k_weight, qkv.shape[1] // 6 // rope.shape[1])
    return partial(norm_attention_fp8, qkv, q_weight, k_weight, rope, scale)


def norm_attention_sdpa(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> Tensor:
    """RMSNorm, rotary embedding and FlashAttention by PyTorch."""
    q, k = norm_rope_library(qkv, q_weight, k_weight, rope)
    return sdpa(SDPBackend.FLASH_ATTENTION, q, k, split_qkv(qkv, rope)[2])


def norm_attention_library(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> Tensor:
    """RMSNorm and rotary embedding by PyTorch, attention by cuDNN."""
    q, k = norm_rope_library(qkv, q_weight, k_weight, rope)
    return sdpa(SDPBackend.CUDNN_ATTENTION, q, k, split_qkv(qkv, rope)[2])


NORM_ATTENTION = Operation(
    name="norm_attention",
    inputs=norm_rope_inputs,
    reference=norm_attention_reference,
    flops=lambda d: 4.0 * d["tokens"] ** 2 * d["heads"] * d["head_dim"],
    bytes=lambda d, item: d["tokens"] * d["head_dim"] * d["heads"] * 5.0 * max(item, 2.0),
    backends={
        "fp32": (Backend("ours", no_setup(norm_attention), ours=True), Backend("sdpa", no_setup(norm_attention_sdpa))),
        "bf16": (
            Backend("ours", no_setup(norm_attention), ours=True, devices=CUDA),
            Backend("torch-cudnn", compiled(norm_attention_library), devices=CUDA),
        ),
        "fp8": (
            Backend("ours", prepare_norm_attention_fp8, ours=True, devices=CUDA),
            Backend("ours-bf16", no_setup(norm_attention), devices=CUDA),
            Backend("torch-cudnn", compiled(norm_attention_library), devices=CUDA),
        ),
    },
    tolerances={"fp8": 6e-2},  # as chunk_attention's
)


def rms_norm_silu_library(x: Tensor, gamma: Tensor) -> Tensor:
    """The VAE's norm and SiLU by PyTorch: silu(x / ||x|| * sqrt(C) * gamma), the norm over a pixel's C channels."""
    return rms_norm_silu_reference(x, gamma)


def pixels(randn: InputFactory, frames: int, channels: int, rows: int, columns: int) -> Tensor:
    """Random [frames, channels, rows, columns] in channels-last memory."""
    return randn(frames, rows, columns, channels).permute(0, 3, 1, 2)


def norm_silu_configs(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters: pixels per program, warps."""
    for pixels, warps in itertools.product((4, 8, 16, 32), (4, 8)):
        yield {"PIXELS": pixels, "num_warps": warps}


RMS_NORM_SILU = Operation(
    name="rms_norm_silu",
    inputs=lambda d, randn: (
        pixels(randn, d["frames"], d["channels"], d["rows"], d["columns"]),
        1 + randn(d["channels"], scale=0.1),
    ),
    reference=rms_norm_silu_library,
    flops=lambda d: 8.0 * d["frames"] * d["channels"] * d["rows"] * d["columns"],
    bytes=lambda d, item: 2.0 * item * d["frames"] * d["channels"] * d["rows"] * d["columns"],
    backends=kernel_and_library(rms_norm_silu, launch_rms_norm_silu, norm_silu_configs, rms_norm_silu_library),
    is_matmul=False,
)

PAST_FRAMES = 2  # that a convolution of the VAE in time keeps of its input


def tail_like(y: Tensor) -> Tensor:
    """Memory for the last frames of y."""
    return torch.empty_like(y[-PAST_FRAMES:])


def with_last_frames(y: Tensor) -> tuple[Tensor, Tensor]:
    """y, and its last frames again."""
    return y, y[-PAST_FRAMES:]


def norm_silu_tail_ours(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The VAE's norm and SiLU by this repository's operation, which writes the last frames twice."""
    tail = tail_like(x)
    return rms_norm_silu(x, gamma, tail=tail), tail


def norm_silu_tail_launch(
    x: Tensor, gamma: Tensor, tail: Tensor, config: LaunchConfig | None = None
) -> tuple[Tensor, Tensor]:
    """The same by this repository's kernel."""
    return launch_rms_norm_silu(x, gamma, tail=tail, config=config), tail


def norm_silu_tail_copied(x: Tensor, gamma: Tensor) -> Call:
    """The kernel without a tail, and then a copy of the last frames."""
    tail = tail_like(x)
    return lambda: (with_tail(launch_rms_norm_silu(x, gamma), tail), tail)


RMS_NORM_SILU_TAIL = replace(
    RMS_NORM_SILU,
    name=TAIL_OPERATION,
    reference=lambda x, gamma: with_last_frames(rms_norm_silu_library(x, gamma)),
    bytes=lambda d, item: RMS_NORM_SILU.bytes(d, item) * (1 + min(PAST_FRAMES, d["frames"]) / (2 * d["frames"])),
    backends={
        dtype: (
            Backend("eager", no_setup(norm_silu_tail_ours), ours=True, devices=("cpu",)),
            kernel_backend(
                "fused",
                norm_silu_tail_launch,
                norm_silu_configs,
                operands=lambda x, gamma: (x, gamma, tail_like(x)),
                audited=dtype != "fp32",
            ),
            Backend("separate", norm_silu_tail_copied, ours=True, devices=CUDA),
        )
        for dtype in ("fp32", "bf16")
    },
)


def launch_lab(pixels: Tensor, mean: Tensor, std: Tensor, config: LaunchConfig | None = None) -> Output:
    """Colour transfer at full strength by this repository's kernels."""
    return launch_lab_transfer(pixels, mean, std, 1.0, None, config)


def lab_configs(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters: pixels per program, warps."""
    for block, warps in itertools.product((512, 1024, 2048, 4096), (4, 8)):
        yield {"BLOCK": block, "num_warps": warps}


LAB_TRANSFER = Operation(
    name="lab_transfer",
    inputs=lambda d, randn: (
        randn(d["frames"], 3, d["rows"], d["columns"], scale=0.3).clamp(-1, 1),
        *lab_statistics(randn(1, 3, d["rows"], d["columns"], scale=0.3).clamp(-1, 1)),
    ),
    reference=partial(lab_transfer_reference, strength=1.0),
    flops=lambda d: 150.0 * d["frames"] * d["rows"] * d["columns"],
    bytes=lambda d, item: 3.0 * item * 3 * d["frames"] * d["rows"] * d["columns"],  # two reads, one write
    backends={
        "fp32": (
            Backend("eager", no_setup(lab_transfer), ours=True, devices=("cpu",)),
            kernel_backend("triton", launch_lab, lab_configs),
            Backend("torch", no_setup(partial(lab_transfer_reference, strength=1.0))),
            Backend("torch-compiled", compiled(partial(lab_transfer_reference, strength=1.0)), devices=ANYWHERE),
        )
    },
    result=lambda output: output[0] if isinstance(output, tuple) else output,
    is_matmul=False,
)
