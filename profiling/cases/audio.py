"""Cases of the audio layer with absorbed projections: the absorption, the attention after it, and both in turn."""

# A case's inputs are unpacked into arguments.
# pyright: reportCallIssue=false

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.absorb_audio_projections import absorb_audio_projections, absorb_reference, launch_absorb
from kernels.absorb_audio_projections_fp8 import centre, launch_absorb_fp8
from kernels.absorbed_audio_attention import (
    Scales,
    Sizes,
    absorbed_audio_attention,
    absorbed_reference,
    dims_of,
    dispatch,
)
from kernels.absorbed_audio_attention_fp8 import IN_16_BITS
from kernels.absorbed_audio_attention_fp8 import dispatch as dispatch_fp8
from kernels.frame_attention import frame_attention, frame_reference
from kernels.layer_norm import quantize_rows
from kernels.tuning import LaunchConfig, TunedConfig
from profiling.cases.attention import FRAME_ATTENTION, frame_sdpa, num_frames
from profiling.cases.case import (
    ANYWHERE,
    CUDA,
    Backend,
    Dims,
    InputFactory,
    Operation,
    kernel_backend,
    no_setup,
    resolve_config,
)
from profiling.cases.linear import empty_operand

# --- The whole layer --------------------------------------------------------------------------------------------------


def audio_inputs(d: Dims, randn: InputFactory) -> tuple[Any, ...]:
    """z, keys and values of the frames, weight and bias of the query projection, weight of the output projection."""
    width = d["heads"] * d["head_dim"]
    return (
        randn(d["queries"], width),
        *(randn(num_frames(d), d["keys"], d["heads"], d["head_dim"]) for _ in range(2)),
        randn(width, width, scale=width**-0.5),
        randn(width),
        randn(width, width, scale=width**-0.5),
        d["tokens_per_frame"],
    )


def audio_layer(
    attend: Callable[..., Tensor],
    z: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    out_weight: Tensor,
    tokens_per_frame: int,
) -> Tensor:
    """The audio layer with `attend` between its projections."""
    q = F.linear(z, q_weight, q_bias).unflatten(1, k.shape[2:])
    return F.linear(attend(q, k, v, tokens_per_frame).flatten(1), out_weight)


def absorbed_audio_layer(
    z: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, out_weight: Tensor, tokens_per_frame: int
) -> Tensor:
    """The audio layer with its projections absorbed into keys and values at each call."""
    absorbed = absorb_audio_projections(k, v, q_weight, q_bias, out_weight)
    return absorbed_audio_attention(z, *absorbed, k.shape[1], tokens_per_frame)


def launch_absorbed_audio_layer(
    z: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, out_weight: Tensor, tokens_per_frame: int
) -> Tensor:
    """The launches of `absorbed_audio_layer` for the audit, with our kernel for the second product too."""
    absorbed, sizes = launch_absorb(k, v, q_weight, q_bias, out_weight), Sizes(k.shape[1], tokens_per_frame)
    return dispatch(z, *absorbed, sizes, None, None, tuned=TunedConfig("triton", {}))


AUDIO_ATTENTION = Operation(
    name="audio_layer",
    inputs=audio_inputs,
    reference=partial(audio_layer, frame_reference),
    flops=lambda d: 4.0 * d["queries"] * (d["heads"] * d["head_dim"]) ** 2 + FRAME_ATTENTION.flops(d),
    bytes=lambda d, item: (
        2.0
        * item
        * (d["queries"] + d["heads"] * d["head_dim"] + num_frames(d) * d["keys"])
        * d["heads"]
        * d["head_dim"]
    ),
    backends={
        dtype: (
            Backend("direct", no_setup(partial(audio_layer, frame_attention)), ours=True),
            Backend(
                "absorbed",
                no_setup(absorbed_audio_layer),
                ours=True,
                devices=ANYWHERE,
                launcher=launch_absorbed_audio_layer if dtype == "bf16" else None,
            ),
            Backend("sdpa", no_setup(partial(audio_layer, frame_sdpa))),
        )
        for dtype in ("fp32", "bf16")
    },
)


# --- The absorption ---------------------------------------------------------------------------------------------------


def absorb_inputs(d: Dims, randn: InputFactory) -> tuple[Tensor, ...]:
    """Keys and values of the frames, weight and bias of the query projection, weight of the output projection."""
    width = d["heads"] * d["head_dim"]
    return (
        *(randn(d["frames"], d["keys"], d["heads"], d["head_dim"]) for _ in range(2)),
        randn(width, width, scale=width**-0.5),
        randn(width),
        randn(width, width, scale=width**-0.5),
    )


def absorb_configs(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the absorption: columns of a program, warps."""
    for block_n, warps in itertools.product((64, 128, 256), (4, 8)):
        yield {"BLOCK_N": block_n, "num_warps": warps, "num_stages": 2}


def absorb_configs_fp8(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the absorption to e4m3: rows and columns that are multiplied at once, warps, stages."""
    for rows, block_n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        yield {"ROWS": rows, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


ABSORB = Operation(
    name="absorb_audio_projections",
    inputs=absorb_inputs,
    reference=absorb_reference,
    flops=lambda d: 4.0 * d["frames"] * d["keys"] * (d["heads"] * d["head_dim"]) ** 2,
    bytes=lambda d, item: 2.0 * item * d["heads"] ** 2 * d["head_dim"] * (d["head_dim"] + d["frames"] * d["keys"]),
    backends={
        "fp32": (Backend("eager", no_setup(absorb_audio_projections), ours=True),),
        "bf16": (
            kernel_backend("triton", launch_absorb, absorb_configs),
            Backend("torch", no_setup(absorb_reference), devices=CUDA),
        ),
    },
)


def absorbed_centred(k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, out_weight: Tensor) -> tuple[Tensor, ...]:
    """What the results of the absorption to e4m3 stand for, in the precision of the inputs."""
    keys, key_bias, values = absorb_reference(k, v, q_weight, q_bias, out_weight)
    keys, values, means = centre(keys, values, k.shape[2])
    return keys, key_bias, values, means


def quantized_projections(
    k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, out_weight: Tensor
) -> tuple[Tensor, ...]:
    """The operands of `launch_absorb_fp8`, with e4m3 weights and without a bias of the output projection."""
    (q8, q_scale), (out8, out_scale) = quantize_rows(q_weight), quantize_rows(out_weight)
    return k, v, q8, q_bias, out8, torch.zeros_like(q_bias), q_scale, out_scale


def empty_projections(k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, out_weight: Tensor) -> tuple[Tensor, ...]:
    """Empty tensors like the results of `quantized_projections`."""
    (q8, q_scale), (out8, out_scale) = (empty_operand("fp8", w) for w in (q_weight, out_weight))
    return k, v, q8, q_bias, out8, q_bias, q_scale, out_scale


def dequantized_absorbed(output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The float32 values that the results of the absorption to e4m3 stand for."""
    keys, keys_scale, key_bias, values, values_scale, means = output
    keys, values = (x.float() * scale[..., None] for x, scale in ((keys, keys_scale), (values, values_scale)))
    return keys, key_bias, values, means


ABSORB_FP8 = Operation(
    name="absorb_audio_projections_fp8",
    inputs=absorb_inputs,
    reference=absorbed_centred,
    flops=ABSORB.flops,
    bytes=ABSORB.bytes,
    backends={
        "fp8": (
            kernel_backend("triton", launch_absorb_fp8, absorb_configs_fp8, quantized_projections, empty_projections),
        )
    },
    result=dequantized_absorbed,
)


# --- The attention after it -------------------------------------------------------------------------------------------


def absorbed_inputs(d: Dims, randn: InputFactory) -> tuple[Any, ...]:
    """z, G, g, U^T, bias, residual, tokens and keys of a frame; logits have a deviation of 1 before g is added."""
    tokens, width, columns = d["tokens"], d["width"], d["heads"] * d["keys"]
    frames = -(-tokens // d["tokens_per_frame"])
    return (
        randn(tokens, width),
        randn(frames, columns, width, scale=width**-0.5),
        randn(frames, columns, dtype=torch.float32),
        randn(frames, width, columns),
        randn(width),
        randn(tokens, width),
        d["tokens_per_frame"],
        d["keys"],
    )


def absorbed_attention(*operands: Any) -> Tensor:
    """`absorbed_audio_attention` of a case's inputs."""
    *absorbed, bias, residual, tokens_per_frame, keys = operands
    return absorbed_audio_attention(*absorbed, keys, tokens_per_frame, bias=bias, residual=residual)


def absorbed_attention_reference(*operands: Any) -> Tensor:
    """The same by definition, in the precision of the inputs."""
    *absorbed, bias, residual, tokens_per_frame, keys = operands
    return absorbed_reference(*absorbed, Sizes(keys, tokens_per_frame), bias, residual)


def absorbed_attention_torch(*operands: Any) -> Tensor:
    """The same by batched products of PyTorch. A shorter last frame is padded."""
    z, keys, key_bias, values, bias, residual, tokens_per_frame, keys_per_frame = operands
    missing = len(keys) * tokens_per_frame - len(z)
    whole = F.pad(z, (0, 0, 0, missing)) if missing else z  # padding by 0 would copy
    logits = torch.baddbmm(key_bias[:, None].to(z.dtype), whole.unflatten(0, (len(keys), -1)), keys.mT)
    p = logits.unflatten(2, (-1, keys_per_frame)).softmax(3).flatten(2)
    return residual + (torch.bmm(p, values.mT).flatten(0, 1)[: len(z)] + bias)


def launch_absorbed(backend: str, dtype: str, *operands: Any, config: LaunchConfig | None = None) -> Tensor:
    """The attention by one back-end of `absorbed_audio_attention`, in 16 bits or, with scales, in e4m3."""
    z, keys, key_bias, values, bias, residual, tokens_per_frame, keys_per_frame, *scales = operands
    sizes = Sizes(keys_per_frame, tokens_per_frame)
    dims = dims_of(*z.shape, keys.shape[1] // keys_per_frame, sizes)
    tuned = resolve_config("absorbed_audio_attention", backend, dims, dtype, z, config)
    operands = z, keys, key_bias, values, sizes, bias, residual
    if not scales:
        return dispatch(*operands, tuned=tuned)
    return dispatch_fp8(*operands, Scales(*scales), residual.dtype, tuned)


def quantized_operands(*operands: Any) -> tuple[Any, ...]:
    """The operands of the attention in e4m3 and their scales, with a bias for each frame."""
    return _in_e4m3(quantize_rows, *operands)


def empty_operands(*operands: Any) -> tuple[Any, ...]:
    """Empty tensors like the results of `quantized_operands`."""
    return _in_e4m3(partial(empty_operand, "fp8"), *operands)


def _in_e4m3(quantize: Callable[[Tensor], tuple[Tensor, Tensor]], *operands: Any) -> tuple[Any, ...]:
    z, keys, key_bias, values, bias, residual, *sizes = operands
    z8, z_scale = quantize(z)
    (keys8, keys_scale), (values8, values_scale) = (quantize(x.flatten(0, 1)) for x in (keys, values))
    scales = z_scale, keys_scale.view(keys.shape[:2]), values_scale.view(values.shape[:2])
    by_frame = bias.float().expand(len(values), -1).contiguous()
    return z8, keys8.view(keys.shape), key_bias, values8.view(values.shape), by_frame, residual, *sizes, *scales


def absorbed_configs(dtype: str, _dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of both products; a row of a stage has 128 bytes."""
    block_k = 128 if dtype == "fp8" else 64
    for block_n, out_block_n, warps, stages in itertools.product((64, 128), (128, 256), (4, 8), (3, 4)):
        yield {
            "BLOCK_M": 128, "BLOCK_N": block_n, "OUT_BLOCK_N": out_block_n, "BLOCK_K": block_k, "num_warps": warps,
            "num_stages": stages,
        }  # fmt: skip


def absorbed_configs_sm90(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the Hopper kernel, whose second product may have wider tiles."""
    shapes = ((3, 128, 4), (2, 128, 5), (2, 256, 3))
    for (consumers, _, stages), (out_consumers, out_block_n, out_stages), group in itertools.product(
        shapes[:2], shapes, (4, 8, 16)
    ):
        yield {
            "CONSUMERS": consumers, "STAGES": stages, "OUT_CONSUMERS": out_consumers, "OUT_BLOCK_N": out_block_n,
            "OUT_STAGES": out_stages, "GROUP_N": group,
        }  # fmt: skip


def absorbed_backend(name: str, dtype: str) -> Backend:
    """One back-end of `absorbed_audio_attention`; in FP8, the operands are quantised beforehand."""
    quantised = (quantized_operands, empty_operands) if dtype == "fp8" else (lambda *operands: operands, None)
    launcher = partial(launch_absorbed, name, dtype)
    configs = {"triton": partial(absorbed_configs, dtype), "gluon": absorbed_configs_sm90}.get(name)
    return kernel_backend(name, launcher, configs, *quantised, audited=dtype != "fp32" and name != "library")


ABSORBED_AUDIO_ATTENTION = Operation(
    name="absorbed_audio_attention",
    inputs=absorbed_inputs,
    reference=absorbed_attention_reference,
    flops=lambda d: 4.0 * d["tokens"] * d["heads"] * d["keys"] * d["width"],
    bytes=lambda d, item: (
        d["width"] * item * (d["tokens"] + 2 * -(-d["tokens"] // d["tokens_per_frame"]) * d["heads"] * d["keys"])
        + 2.0 * d["width"] * d["tokens"] * max(item, 2.0)
    ),
    backends={
        "fp32": (
            Backend("eager", no_setup(absorbed_attention), ours=True, devices=("cpu",)),
            absorbed_backend("triton", "fp32"),
            Backend("torch", no_setup(absorbed_attention_torch)),
        ),
        "bf16": (
            absorbed_backend("triton", "bf16"),
            absorbed_backend("library", "bf16"),
            Backend("torch", no_setup(absorbed_attention_torch)),
        ),
        "fp8": (
            absorbed_backend("gluon", "fp8"),
            absorbed_backend("triton", "fp8"),
            Backend(IN_16_BITS, no_setup(absorbed_attention), ours=True),
        ),
    },
    # Logits are 3.7 % off, weights 2.6 %, values 2.6 %; half of the result is the residual.
    tolerances={"fp8": 6e-2},
)
