"""Attention: among a chunk's tokens, to text and image, to audio, and the VAE's of one wide head."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import chunk_attention as attention
from kernels import cross_attention
from kernels.chunk_attention import chunk_attention
from kernels.cross_attention import (
    absorb_audio_projections,
    absorbed_audio_attention,
    frame_attention,
    launch_absorb,
    launch_absorbed,
    launch_frame,
    launch_text_image,
    text_image_attention,
)
from kernels.scheduler import kv_ranges
from kernels.tuning import LaunchConfig, TunedConfig
from profiling.cases.case import (
    ANYWHERE,
    CUDA,
    FP8_MAX,
    PROMPT,
    Backend,
    Call,
    Dims,
    Draw,
    Operation,
    choose,
    compiled,
    once,
    triton,
)


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head: q [queries, head, d], k and v [keys, head, d] -> [queries, head, d]."""
    heads = []
    for h in range(q.shape[1]):
        weights = (q[:, h] @ k[:, h].T * q.shape[2] ** -0.5).softmax(-1)
        heads.append(weights @ v[:, h])
    return torch.stack(heads, dim=1)


def ours(form: str) -> Callable[..., Call]:
    """The `prepare` of one form of kernels/chunk_attention.py."""
    return lambda q, k, v, config=None: partial(launch_attention, form, q, k, v, config)


def choose_attention(form: str, q: Tensor, k: Tensor, dtype: str, config: LaunchConfig | None) -> TunedConfig:
    """That of attention, q and k [tokens, heads, channels]."""
    dims = {"queries": len(q), "keys": len(k), "heads": q.shape[1], "head_dim": q.shape[2]}
    return choose("chunk_attention", form, dims, dtype, q, config, ("head_dim",))


def launch_attention(form: str, q: Tensor, k: Tensor, v: Tensor, config: LaunchConfig | None = None) -> Tensor:
    """That form."""
    choice, scale = choose_attention(form, q, k, attention.DTYPE_NAMES[q.dtype], config), q.shape[2] ** -0.5
    return attention.dispatch(q[None], k[None], v[None], None, kv_ranges(len(q), len(k)), scale, q.dtype, choice)[0][0]


def chunk_attention_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention, whichever it takes for so many channels."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def ours_fp8(form: str) -> Callable[..., Call]:
    """The same on e4m3 operands, which are made beforehand."""

    def prepare(q: Tensor, k: Tensor, v: Tensor, config: LaunchConfig | None = None) -> Call:
        return partial(launch_attention_fp8, form, *quantize_attention(q, k, v), config=config)

    return prepare


def launch_attention_fp8(form: str, *operands: Tensor, config: LaunchConfig | None = None) -> Tensor:
    """That form of the FP8 attention."""
    q, q_scale, k, k_scale, v, v_scale = (x[None] for x in operands)
    seen, scale = kv_ranges(q.shape[1], k.shape[1]), q.shape[3] ** -0.5
    choice = choose_attention(form, q[0], k[0], "fp8", config)
    return attention.dispatch(q, k, v, (q_scale, k_scale, v_scale), seen, scale, torch.bfloat16, choice)[0][0]


def quantize_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Operands of `chunk_attention_fp8`, scaled by their largest values: per token and head, head, head and channel."""
    q_scale, k_scale, v_scale = q.abs().amax(2).float(), k.abs().amax((0, 2)).float(), v.abs().amax(0).float()
    q_scale, k_scale, v_scale = (x.clamp(min=1e-12) / FP8_MAX for x in (q_scale, k_scale, v_scale))
    order = torch.from_numpy(attention.interleave(len(v))).to(v.device)
    values = F.pad(v / v_scale, (0, 0, 0, 0, 0, len(order) - len(v)))[order].permute(1, 2, 0).contiguous()
    scaled = (q / q_scale[..., None], k / k_scale[:, None], values)
    q8, k8, v8 = (x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn) for x in scaled)
    return q8, q_scale, k8, k_scale, v8, v_scale


def attention_space(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the form for Hopper."""
    for stages in (2, 3, 4):
        yield {"BLOCK_N": 128, "STAGES": stages}


def attention_space_16(_dims: Dims) -> Iterator[dict[str, Any]]:
    """The same in 16 bits, where shared memory holds two stages of 128 keys."""
    yield {"BLOCK_N": 128, "STAGES": 2}
    yield {"BLOCK_N": 64, "STAGES": 4}


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention by one of its back-ends, which take heads in front of tokens as strides have it."""
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
    """SageAttention: q k^T in int8, p v in fp16 or fp8, by version and device."""
    from sageattention import sageattn  # type: ignore[import-not-found]

    return lambda: sageattn(q[None], k[None], v[None], tensor_layout="NHD")[0]


def audit_attention_fp8(form: str) -> Callable[..., Tensor]:
    """The launcher of an FP8 form, for inputs that have no values to be scaled by."""

    def launcher(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (queries, heads, d), keys = q.shape, len(k)
        q8, k8 = (torch.empty_like(x, dtype=torch.float8_e4m3fn) for x in (q, k))
        v8 = v.new_empty(heads, d, -(-keys // 16) * 16, dtype=torch.float8_e4m3fn)
        q_scale, k_scale, v_scale = (
            q.new_empty(n, dtype=torch.float32) for n in ((queries, heads), (heads,), (heads, d))
        )
        return launch_attention_fp8(form, q8, q_scale, k8, k_scale, v8, v_scale)

    return launcher


_ATTENTION_PEERS = (
    Backend("sdpa-cudnn", once(partial(sdpa, SDPBackend.CUDNN_ATTENTION)), devices=("cuda",)),
    Backend("sdpa-flash", once(partial(sdpa, SDPBackend.FLASH_ATTENTION))),
    Backend("sdpa-efficient", once(partial(sdpa, SDPBackend.EFFICIENT_ATTENTION)), devices=("cuda",)),
    Backend("flash-attn", flash_attn, devices=("cuda",), needs="flash_attn"),
    Backend("flash-attn-4", flash_attn_4, devices=("cuda",), needs="flash_attn.cute"),
)

SELF_ATTENTION = Operation(
    "chunk_attention",
    lambda d, draw: tuple(draw(d[n], d["heads"], d["head_dim"]) for n in ("queries", "keys", "keys")),
    attention_reference,
    lambda d: 4.0 * d["queries"] * d["keys"] * d["heads"] * d["head_dim"],
    lambda d, item: 2.0 * (d["queries"] + d["keys"]) * d["heads"] * d["head_dim"] * item,
    {
        "fp32": (Backend("eager", once(chunk_attention), ours=True), _ATTENTION_PEERS[1]),
        "bf16": (
            Backend("gluon", ours("gluon"), True, CUDA, None, partial(launch_attention, "gluon"), attention_space_16),
            Backend("triton", ours("triton"), True, CUDA, None, partial(launch_attention, "triton")),
            *_ATTENTION_PEERS,
        ),
        "fp8": (
            Backend("gluon", ours_fp8("gluon"), True, CUDA, None, audit_attention_fp8("gluon"), attention_space),
            Backend("triton", ours_fp8("triton"), True, CUDA, None, audit_attention_fp8("triton")),
            Backend("sageattention", sage_attention, devices=("cuda",), needs="sageattention"),
            *_ATTENTION_PEERS[:2],
        ),
    },
    # Of unrounded inputs: q k^T in e4m3 is off by 3.7 % of a logit's deviation of 1, the weights and v by 2.6 % each.
    tolerances={"fp8": 6e-2},
)


def wide_space(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Tiles and stages of the Triton kernel for more than 128 channels."""
    for block_m, block_n, warps, stages in (
        (64, 32, 4, 2),
        (64, 32, 8, 2),
        (64, 32, 8, 3),
        (64, 64, 8, 1),
        (128, 32, 8, 2),
    ):
        yield {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


# The VAE's, of one head of all channels: no kernel for Hopper, none of 8 bits.
VAE_ATTENTION = replace(
    SELF_ATTENTION,
    name="chunk_attention",
    backends={
        "fp32": SELF_ATTENTION.backends["fp32"],
        "bf16": (
            Backend("triton", ours("triton"), True, CUDA, None, partial(launch_attention, "triton"), wide_space),
            Backend("sdpa", once(chunk_attention_library), devices=CUDA),
        ),
    },
)


def text_image_space(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Tiles, warps and stages; 168 registers a thread leave room for three blocks of four warps."""
    for block_m, block_n, warps, stages in itertools.product((64, 128), (32, 64), (4, 8), (1, 2)):
        if block_m == 16 * warps:
            parameters = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
            yield parameters
            if warps == 4:
                yield {**parameters, "maxnreg": 168}


def frame_space(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Tiles and warps; a frame's keys are one tile."""
    for block_m, warps in ((64, 4), (128, 4), (128, 8)):
        yield {"BLOCK_M": block_m, "num_warps": warps, "num_stages": 1}


def text_image_inputs(d: Dims, draw: Draw) -> tuple[Any, ...]:
    """q, keys and values of text and image; if collapsed, how many text keys come before equal ones: PROMPT."""
    names = ("queries", "text", "text", "image", "image")
    q, text_k, text_v, image_k, image_v = (draw(d[n], d["heads"], d["head_dim"]) for n in names)
    if not d["dedup_padding"]:
        return q, text_k, text_v, image_k, image_v, None
    real = min(PROMPT, d["text"] - 1)
    for x in (text_k, text_v):
        x[real:] = x[real].clone()
    return q, text_k, text_v, image_k, image_v, torch.full((1,), real, dtype=torch.int32, device=q.device)


def text_image_library(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, _real: Tensor | None
) -> Tensor:
    """Two calls of torch's attention, all keys, summed."""
    q, text_k, text_v, image_k, image_v = (x.transpose(0, 1)[None] for x in (q, text_k, text_v, image_k, image_v))
    attend = F.scaled_dot_product_attention
    return (attend(q, text_k, text_v) + attend(q, image_k, image_v))[0].transpose(0, 1)


def keys_of(d: Dims) -> int:
    """Text and image keys, those of the padding once."""
    return (min(PROMPT + 1, d["text"]) if d["dedup_padding"] else d["text"]) + d["image"]


TEXT_IMAGE_ATTENTION = Operation(
    "text_image_attention",
    text_image_inputs,
    cross_attention.text_image_reference,
    lambda d: 4.0 * d["queries"] * keys_of(d) * d["heads"] * d["head_dim"],
    lambda d, item: 2.0 * (d["queries"] + keys_of(d)) * d["heads"] * d["head_dim"] * item,
    {
        dtype: (
            Backend("eager", once(text_image_attention), ours=True, devices=("cpu",)),
            triton(dtype, launch_text_image, text_image_space),
            Backend("sdpa", once(text_image_library)),
            Backend("sdpa-compiled", compiled(text_image_library), devices=CUDA),
        )
        for dtype in ("fp32", "bf16")
    },
)


def frame_library(q: Tensor, k: Tensor, v: Tensor, per_frame: int) -> Tensor:
    """One call of torch's attention with the frames as its batch; a last, shorter frame is padded."""
    missing = len(k) * per_frame - len(q)
    whole = F.pad(q, (0, 0, 0, 0, 0, missing)) if missing else q  # padding by nothing would copy
    q4, k4, v4 = (x.transpose(1, 2) for x in (whole.unflatten(0, (len(k), -1)), k, v))
    return F.scaled_dot_product_attention(q4, k4, v4).transpose(1, 2).flatten(0, 1)[: len(q)]


def frame_keys(d: Dims) -> int:
    """Frames that the queries lie in."""
    return -(-d["queries"] // d["per_frame"])


FRAME_ATTENTION = Operation(
    "frame_attention",
    lambda d, draw: (
        draw(d["queries"], d["heads"], d["head_dim"]),
        *(draw(frame_keys(d), d["keys"], d["heads"], d["head_dim"]) for _ in range(2)),
        d["per_frame"],
    ),
    cross_attention.frame_reference,
    lambda d: 4.0 * d["queries"] * d["keys"] * d["heads"] * d["head_dim"],
    lambda d, item: 2.0 * (d["queries"] + frame_keys(d) * d["keys"]) * d["heads"] * d["head_dim"] * item,
    {
        dtype: (
            Backend("eager", once(frame_attention), ours=True, devices=("cpu",)),
            triton(dtype, launch_frame, frame_space),
            Backend("sdpa", once(frame_library)),
            Backend("sdpa-compiled", compiled(frame_library), devices=CUDA),
        )
        for dtype in ("fp32", "bf16")
    },
)


def audio_inputs(d: Dims, draw: Draw) -> tuple[Any, ...]:
    """z, the frames' keys and values, weight and bias of the projection before, weight of the one after."""
    width = d["heads"] * d["head_dim"]
    return (
        draw(d["queries"], width),
        *(draw(frame_keys(d), d["keys"], d["heads"], d["head_dim"]) for _ in range(2)),
        draw(width, width, scale=width**-0.5),
        draw(width),
        draw(width, width, scale=width**-0.5),
        d["per_frame"],
    )


def audio_layer(
    attend: Callable[..., Tensor],
    z: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    weight: Tensor,
    per_frame: int,
) -> Tensor:
    """Projection, `attend`, projection."""
    q = F.linear(z, q_weight, q_bias).unflatten(1, k.shape[2:])
    return F.linear(attend(q, k, v, per_frame).flatten(1), weight)


def audio_folded(
    z: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, weight: Tensor, per_frame: int
) -> Tensor:
    """The same, the projections folded into keys and values at each call."""
    return absorbed_audio_attention(z, *absorb_audio_projections(k, v, q_weight, q_bias, weight), k.shape[1], per_frame)


def launch_audio(
    z: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, weight: Tensor, per_frame: int
) -> Tensor:
    """What `audio_folded` launches."""
    return launch_absorbed(z, *launch_absorb(k, v, q_weight, q_bias, weight), k.shape[1], per_frame)


AUDIO_ATTENTION = Operation(
    "audio_layer",
    audio_inputs,
    partial(audio_layer, cross_attention.frame_reference),
    lambda d: 4.0 * d["queries"] * (d["heads"] * d["head_dim"]) ** 2 + FRAME_ATTENTION.flops(d),
    lambda d, item: 2.0 * item * (d["queries"] + d["heads"] * d["head_dim"] + frame_keys(d) * d["keys"])
    * d["heads"] * d["head_dim"],
    {
        dtype: (
            Backend("direct", once(partial(audio_layer, frame_attention)), ours=True),
            Backend("folded", once(audio_folded), True, ANYWHERE, None, launch_audio if dtype == "bf16" else None),
            Backend("sdpa", once(partial(audio_layer, frame_library))),
        )
        for dtype in ("fp32", "bf16")
    },
)  # fmt: skip
