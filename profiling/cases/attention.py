"""Cases of attention: self-attention of the student and of the VAE, and cross-attention to text, image and audio."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.chunk_attention import chunk_attention, dispatch
from kernels.chunk_attention_fp8 import dispatch_quantized as dispatch_attention_quantized
from kernels.chunk_attention_fp8 import interleave
from kernels.common import DTYPE_NAMES, FP8, FP8_MAX
from kernels.frame_attention import frame_attention, frame_reference, launch_frame
from kernels.scheduler import kv_ranges
from kernels.text_image_attention import (
    dispatch as dispatch_text_image,
)
from kernels.text_image_attention import (
    dispatch_quantized,
    launch_text_image,
    scale_rows,
    text_image_attention,
    text_image_attention_quantized,
    text_image_bound,
    text_image_reference,
)
from kernels.tuning import LaunchConfig, TunedConfig
from profiling.cases.case import (
    CUDA,
    PROMPT_TOKENS,
    Backend,
    Call,
    Dims,
    InputFactory,
    Operation,
    compiled,
    kernel_and_library,
    kernel_backend,
    no_setup,
    resolve_config,
)


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, head by head.

    q is [queries, heads, head_dim], k and v are [keys, heads, head_dim]; the result is like q.
    """
    heads = []
    for h in range(q.shape[1]):
        weights = (q[:, h] @ k[:, h].T * q.shape[2] ** -0.5).softmax(-1)
        heads.append(weights @ v[:, h])
    return torch.stack(heads, dim=1)


def choose_attention(backend: str, q: Tensor, k: Tensor, dtype: str, config: LaunchConfig | None) -> TunedConfig:
    """One back-end of `chunk_attention` with `config`, or else as tuned for q and k [tokens, heads, head_dim]."""
    dims = {"queries": len(q), "keys": len(k), "heads": q.shape[1], "head_dim": q.shape[2]}
    return resolve_config("chunk_attention", backend, dims, dtype, q, config, ("head_dim",))


def launch_attention(backend: str, q: Tensor, k: Tensor, v: Tensor, config: LaunchConfig | None = None) -> Tensor:
    """Attention by one back-end of `chunk_attention`."""
    tuned = choose_attention(backend, q, k, DTYPE_NAMES[q.dtype], config)
    ranges, scale = kv_ranges(len(q), len(k)), q.shape[2] ** -0.5
    return dispatch(q[None], k[None], v[None], None, ranges, scale, q.dtype, tuned)[0][0]


def chunk_attention_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention by the back-end that it selects for this head_dim."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def launch_attention_fp8(backend: str, *operands: Tensor, config: LaunchConfig | None = None) -> Tensor:
    """Attention by one back-end of `chunk_attention_fp8`, whose operands these are."""
    q, q_scale, k, k_scale, v, v_scale = (x[None] for x in operands)
    ranges, scale = kv_ranges(q.shape[1], k.shape[1]), q.shape[3] ** -0.5
    tuned = choose_attention(backend, q[0], k[0], "fp8", config)
    return dispatch(q, k, v, (q_scale, k_scale, v_scale), ranges, scale, torch.bfloat16, tuned)[0][0]


def quantize_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The operands of `chunk_attention_fp8`, scaled by their largest values.

    q has a scale for each token and head, k for each head, v for each head and channel.
    """
    q_scale, k_scale, v_scale = q.abs().amax(2).float(), k.abs().amax((0, 2)).float(), v.abs().amax(0).float()
    q_scale, k_scale, v_scale = (x.clamp(min=1e-12) / FP8_MAX for x in (q_scale, k_scale, v_scale))
    order = torch.from_numpy(interleave(len(v))).to(v.device)
    values = F.pad(v / v_scale, (0, 0, 0, 0, 0, len(order) - len(v)))[order].permute(1, 2, 0).contiguous()
    scaled = (q / q_scale[..., None], k / k_scale[:, None], values)
    q8, k8, v8 = (x.clamp(-FP8_MAX, FP8_MAX).to(FP8) for x in scaled)
    return q8, q_scale, k8, k_scale, v8, v_scale


def empty_attention_operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Empty tensors like the results of `quantize_attention`."""
    (queries, heads, head_dim), keys = q.shape, len(k)
    q8, k8 = (torch.empty_like(x, dtype=FP8) for x in (q, k))
    v8 = v.new_empty(heads, head_dim, -(-keys // 16) * 16, dtype=FP8)
    q_scale, k_scale, v_scale = (
        q.new_empty(n, dtype=torch.float32) for n in ((queries, heads), (heads,), (heads, head_dim))
    )
    return q8, q_scale, k8, k_scale, v8, v_scale


def fp8_attention_backend(name: str, configs: Callable[[Dims], Iterator[dict[str, Any]]] | None = None) -> Backend:
    """One back-end of `chunk_attention_fp8`."""
    launcher = partial(launch_attention_fp8, name)
    return kernel_backend(name, launcher, configs, quantize_attention, empty_attention_operands)


def attention_configs(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the Hopper kernel in FP8."""
    for stages in (2, 3, 4):
        yield {"BLOCK_N": 128, "STAGES": stages}


def attention_configs_16(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the Hopper kernel in 16 bits, where shared memory holds two stages of 128 keys."""
    yield {"BLOCK_N": 128, "STAGES": 2}
    yield {"BLOCK_N": 64, "STAGES": 4}


def attention_configs_triton(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the Triton kernel, for GPUs other than Hopper."""
    for block_m, block_n, warps, stages in (
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 32, 4, 3),
        (64, 128, 4, 3),
        (64, 128, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 2),
    ):
        yield {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention by one of its back-ends, which read the operands through their strides, without a copy."""
    with sdpa_kernel(backend):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """FlashAttention-2 of the package flash-attn."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    return lambda: flash_attn_func(q[None], k[None], v[None])[0]


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """FlashAttention-4 of the package flash-attn-4, which also runs on Hopper."""
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    def call() -> Tensor:
        out = flash_attn_func(q[None], k[None], v[None])
        return (out[0] if isinstance(out, tuple) else out)[0]

    return call


def sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """SageAttention: q k^T in int8, p v in FP16 or FP8, depending on version and device."""
    from sageattention import sageattn  # type: ignore[import-not-found]

    return lambda: sageattn(q[None], k[None], v[None], tensor_layout="NHD")[0]


_ATTENTION_PEERS = (
    Backend("sdpa-cudnn", no_setup(partial(sdpa, SDPBackend.CUDNN_ATTENTION)), devices=("cuda",)),
    Backend("sdpa-flash", no_setup(partial(sdpa, SDPBackend.FLASH_ATTENTION))),
    Backend("sdpa-efficient", no_setup(partial(sdpa, SDPBackend.EFFICIENT_ATTENTION)), devices=("cuda",)),
    Backend("flash-attn", flash_attn, devices=("cuda",), needs="flash_attn"),
    Backend("flash-attn-4", flash_attn_4, devices=("cuda",), needs="flash_attn.cute"),
)

SELF_ATTENTION = Operation(
    name="chunk_attention",
    inputs=lambda d, randn: tuple(randn(d[n], d["heads"], d["head_dim"]) for n in ("queries", "keys", "keys")),
    reference=attention_reference,
    flops=lambda d: 4.0 * d["queries"] * d["keys"] * d["heads"] * d["head_dim"],
    bytes=lambda d, item: 2.0 * (d["queries"] + d["keys"]) * d["heads"] * d["head_dim"] * item,
    backends={
        "fp32": (Backend("eager", no_setup(chunk_attention), ours=True), _ATTENTION_PEERS[1]),
        "bf16": (
            kernel_backend("gluon", partial(launch_attention, "gluon"), attention_configs_16),
            kernel_backend("triton", partial(launch_attention, "triton"), attention_configs_triton),
            *_ATTENTION_PEERS,
        ),
        "fp8": (
            fp8_attention_backend("gluon", attention_configs),
            fp8_attention_backend("triton", attention_configs_triton),
            Backend("sageattention", sage_attention, devices=("cuda",), needs="sageattention"),
            *_ATTENTION_PEERS[:2],
        ),
    },
    # Against unrounded inputs: q k^T in e4m3 has an error of 3.7 % of a logit's deviation of 1, the weights and v have
    # 2.6 % each.
    tolerances={"fp8": 6e-2},
)


def quantized_attention(backend: str, *operands: Tensor, config: LaunchConfig | None = None) -> tuple[Tensor, ...]:
    """Attention with an e4m3 output by one back-end of `chunk_attention_fp8_quantized`, whose operands these are."""
    q, k = operands[0], operands[2]
    dims = {"queries": len(q), "keys": len(k), "heads": q.shape[1], "head_dim": q.shape[2]}
    tuned = resolve_config("chunk_attention_fp8_quantized", backend, dims, "fp8", q, config, ("head_dim",))
    return dispatch_attention_quantized(*operands, tuned=tuned)


def quantized_attention_backend(name: str) -> Backend:
    """One back-end of `chunk_attention_fp8_quantized`."""

    def prepare(*inputs: Tensor, config: LaunchConfig | None = None) -> Call:
        return partial(quantized_attention, name, *quantize_attention(*inputs), config=config)

    def launch(*inputs: Tensor, config: LaunchConfig | None = None) -> tuple[Tensor, ...]:
        return quantized_attention(name, *empty_attention_operands(*inputs), config=config)

    if name != "fused":
        return Backend(name, prepare, ours=True, devices=CUDA)
    return Backend(name, prepare, ours=True, devices=CUDA, launcher=launch, configs=attention_configs, gluon=True)


def dequantized_attention(output: tuple[Tensor, Tensor]) -> Tensor:
    """The float32 values of an output [tokens, heads, head_dim] with a scale for each token."""
    values, scale = output
    return values.float() * scale[:, None, None]


def prepare_attention_rows(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """cuDNN's attention in 16 bits, and then row quantisation, compiled."""

    def quantize(o: Tensor) -> tuple[Tensor, Tensor]:
        scale = o.float().abs().amax((1, 2)).clamp(min=1e-12) / FP8_MAX
        return (o / scale[:, None, None]).to(FP8), scale

    compiled_quantize = torch.compile(quantize, dynamic=False)
    return lambda: compiled_quantize(sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v))


QUANTIZED_ATTENTION = Operation(
    name="chunk_attention_fp8_quantized",
    inputs=SELF_ATTENTION.inputs,
    reference=attention_reference,
    flops=SELF_ATTENTION.flops,
    bytes=SELF_ATTENTION.bytes,
    backends={
        "fp8": (
            *(quantized_attention_backend(name) for name in ("fused", "separate")),
            Backend("sdpa-cudnn", prepare_attention_rows, devices=CUDA),
        )
    },
    result=dequantized_attention,
    tolerances={"fp8": 7e-2},  # 6 % as of SELF_ATTENTION, and 2.6 % of the output's rounding
)


def large_head_configs(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the Triton kernel for a head_dim above 128."""
    for block_m, block_n, warps, stages in (
        (64, 32, 4, 2),
        (64, 32, 8, 2),
        (64, 32, 8, 3),
        (64, 64, 8, 1),
        (128, 32, 8, 2),
    ):
        yield {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


# Self-attention of the VAE has one head of all channels, for which there is neither a Hopper nor an FP8 kernel.
VAE_ATTENTION = replace(
    SELF_ATTENTION,
    name="chunk_attention",
    backends={
        "fp32": SELF_ATTENTION.backends["fp32"],
        "bf16": (
            kernel_backend("triton", partial(launch_attention, "triton"), large_head_configs),
            Backend("sdpa", no_setup(chunk_attention_sdpa), devices=CUDA),
        ),
    },
)


def text_image_configs(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of text and image attention. 168 registers per thread allow three blocks of four warps."""
    for block_m, block_n, warps, stages in itertools.product((64, 128), (32, 64), (4, 8), (1, 2)):
        if block_m == 16 * warps:
            parameters = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
            yield parameters
            if warps == 4:
                yield {**parameters, "maxnreg": 168}


def frame_configs(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of frame attention, where the keys of a frame are one tile."""
    for block_m, warps in ((64, 4), (128, 4), (128, 8)):
        yield {"BLOCK_M": block_m, "num_warps": warps, "num_stages": 1}


def text_image_inputs(d: Dims, randn: InputFactory) -> tuple[Any, ...]:
    """q, keys and values of text and image. With dedup_padding, the text keys from PROMPT_TOKENS on are equal."""
    names = ("queries", "text", "text", "image", "image")
    q, text_k, text_v, image_k, image_v = (randn(d[n], d["heads"], d["head_dim"]) for n in names)
    if not d["dedup_padding"]:
        return q, text_k, text_v, image_k, image_v, None
    count = min(PROMPT_TOKENS, d["text"] - 1)
    for x in (text_k, text_v):
        x[count:] = x[count].clone()
    return q, text_k, text_v, image_k, image_v, torch.full((1,), count, dtype=torch.int32, device=q.device)


def text_image_sdpa(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, _num_text_tokens: Tensor | None
) -> Tensor:
    """The sum of two calls of PyTorch's attention, to all keys."""
    q, text_k, text_v, image_k, image_v = (x.transpose(0, 1)[None] for x in (q, text_k, text_v, image_k, image_v))
    attend = F.scaled_dot_product_attention
    return (attend(q, text_k, text_v) + attend(q, image_k, image_v))[0].transpose(0, 1)


def num_text_image_keys(d: Dims) -> int:
    """The number of text and image keys that must be read: with dedup_padding, one for the padding."""
    return (min(PROMPT_TOKENS + 1, d["text"]) if d["dedup_padding"] else d["text"]) + d["image"]


def text_image_config(
    operation: str, backend: str, dtype: str, inputs: tuple[Any, ...], config: LaunchConfig | None
) -> TunedConfig:
    """One back-end of attention to text and image with `config`, or else as tuned for the inputs."""
    q, text_k, _, image_k, _, num_text_tokens = inputs[:6]
    dims = {"queries": len(q), "text": len(text_k), "image": len(image_k), "heads": q.shape[1], "head_dim": q.shape[2]}
    dims["dedup_padding"] = int(num_text_tokens is not None)
    return resolve_config(operation, backend, dims, dtype, q, config, ("head_dim",))


def launch_text_image_backend(backend: str, *inputs: Any, config: LaunchConfig | None = None) -> Tensor:
    """Attention to text and image by one back-end of the operation."""
    tuned = text_image_config("text_image_attention", backend, DTYPE_NAMES[inputs[0].dtype], inputs, config)
    return dispatch_text_image(*inputs, q_scale=None, tuned=tuned)


def text_image_configs_sm90(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the Hopper kernel: a prompt of 20 tokens fits in one tile of the text, or in two."""
    yield {"BLOCK_T": 32, "STAGES": 1}
    yield {"BLOCK_T": 16, "STAGES": 2}


TEXT_IMAGE_BACKENDS = kernel_and_library(
    text_image_attention, launch_text_image, text_image_configs, text_image_sdpa, "sdpa", CUDA
)
TEXT_IMAGE_ATTENTION = Operation(
    name="text_image_attention",
    inputs=text_image_inputs,
    reference=text_image_reference,
    flops=lambda d: 4.0 * d["queries"] * num_text_image_keys(d) * d["heads"] * d["head_dim"],
    bytes=lambda d, item: 2.0 * (d["queries"] + num_text_image_keys(d)) * d["heads"] * d["head_dim"] * item,
    backends={
        "fp32": TEXT_IMAGE_BACKENDS["fp32"],
        "bf16": (
            TEXT_IMAGE_BACKENDS["bf16"][0],
            kernel_backend("gluon", partial(launch_text_image_backend, "gluon"), text_image_configs_sm90),
            kernel_backend("triton", partial(launch_text_image_backend, "triton"), text_image_configs),
            *TEXT_IMAGE_BACKENDS["bf16"][2:],
        ),
    },
)


def text_image_scaled_inputs(d: Dims, randn: InputFactory) -> tuple[Any, ...]:
    """`text_image_inputs`, and 1 / rms of the rows of q, whose channels are 16 times as large."""
    q, *rest = text_image_inputs(d, randn)
    q = 16 * q
    return q, *rest, (q.float().square().mean((1, 2)) + 1e-6).rsqrt()


def text_image_quantized(backend: str, *inputs: Any, config: LaunchConfig | None = None) -> tuple[Tensor, ...]:
    """e4m3 output of attention to text and image by one back-end; the last input is the bound of the output."""
    *kv, num_text_tokens, q_scale, o_bound = inputs
    if backend == "eager":
        return text_image_attention_quantized(*kv, o_bound=o_bound, num_text_tokens=num_text_tokens, q_scale=q_scale)
    tuned = text_image_config("text_image_attention_quantized", backend, "fp8", inputs, config)
    return dispatch_quantized(*kv, o_bound=o_bound, num_text_tokens=num_text_tokens, q_scale=q_scale, tuned=tuned)


def text_image_quantized_backend(name: str) -> Backend:
    """One back-end of `text_image_attention_quantized`; the bound of the output is computed beforehand."""

    def operands(*inputs: Any) -> tuple[Any, ...]:
        return *inputs, text_image_bound(inputs[2], inputs[4])

    def prepare(*inputs: Any, config: LaunchConfig | None = None) -> Call:
        return partial(text_image_quantized, name, *operands(*inputs), config=config)

    def launch(*inputs: Any, config: LaunchConfig | None = None) -> tuple[Tensor, ...]:
        return text_image_quantized(name, *operands(*inputs), config=config)

    if name != "fused":
        return Backend(name, prepare, ours=True, devices=CUDA if name == "separate" else ("cpu",))
    configs = text_image_configs_sm90
    return Backend(name, prepare, ours=True, devices=CUDA, launcher=launch, configs=configs, gluon=True)


def text_image_quantized_sdpa(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor
) -> tuple[Tensor, Tensor]:
    """PyTorch's attention to text and image, and row quantisation."""
    o = text_image_sdpa(q, text_k, text_v, image_k, image_v, None).float()
    scale = o.abs().amax((1, 2)).clamp(min=1e-12) / FP8_MAX
    return (o / scale[:, None, None]).to(FP8), scale


def prepare_text_image_sdpa(q: Tensor, *inputs: Any) -> Call:
    """Compiled; the queries are normalised beforehand."""
    *kv, _num_text_tokens, q_scale = inputs
    return compiled(text_image_quantized_sdpa)(scale_rows(q, q_scale), *kv)


TEXT_IMAGE_QUANTIZED = Operation(
    name="text_image_attention_quantized",
    inputs=text_image_scaled_inputs,
    reference=text_image_reference,
    flops=TEXT_IMAGE_ATTENTION.flops,
    bytes=lambda d, _item: (3.0 * d["queries"] + 4.0 * num_text_image_keys(d)) * d["heads"] * d["head_dim"],
    backends={
        "fp8": (
            *(text_image_quantized_backend(name) for name in ("eager", "fused", "separate")),
            Backend("sdpa-compiled", prepare_text_image_sdpa, devices=CUDA),
        )
    },
    result=dequantized_attention,
)


def frame_sdpa(q: Tensor, k: Tensor, v: Tensor, tokens_per_frame: int) -> Tensor:
    """One call of PyTorch's attention with the frames as its batch. A shorter last frame is padded."""
    missing = len(k) * tokens_per_frame - len(q)
    whole = F.pad(q, (0, 0, 0, 0, 0, missing)) if missing else q  # padding by 0 would copy
    q4, k4, v4 = (x.transpose(1, 2) for x in (whole.unflatten(0, (len(k), -1)), k, v))
    return F.scaled_dot_product_attention(q4, k4, v4).transpose(1, 2).flatten(0, 1)[: len(q)]


def num_frames(d: Dims) -> int:
    """The number of frames that contain the queries."""
    return -(-d["queries"] // d["tokens_per_frame"])


FRAME_ATTENTION = Operation(
    name="frame_attention",
    inputs=lambda d, randn: (
        randn(d["queries"], d["heads"], d["head_dim"]),
        *(randn(num_frames(d), d["keys"], d["heads"], d["head_dim"]) for _ in range(2)),
        d["tokens_per_frame"],
    ),
    reference=frame_reference,
    flops=lambda d: 4.0 * d["queries"] * d["keys"] * d["heads"] * d["head_dim"],
    bytes=lambda d, item: 2.0 * (d["queries"] + num_frames(d) * d["keys"]) * d["heads"] * d["head_dim"] * item,
    backends=kernel_and_library(frame_attention, launch_frame, frame_configs, frame_sdpa, "sdpa", CUDA),
)
