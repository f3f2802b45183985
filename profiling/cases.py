"""Every benchmark case, once: for the command line, pytest-benchmark, the audit, the tuner and the GPU phases alike.

A *case* is an operation at a named shape in a dtype: `self_attention/14b-w8/bf16` is the self-attention of one of 8
GPUs that share flashtalk-14b. It knows how its inputs are made, what the right answer is, how many operations and
bytes it needs by formula, and which back-ends compute it: ours (what model/ runs) and *peers* (what a user would run
instead).

    Operation   inputs, reference, FLOPs, bytes, back-ends by dtype
    Shape       name, dimensions, GPUs that share the work, calls a chunk
    Case        an operation at a shape in a dtype; `registry` makes them all

Dimensions come from the model's configuration. A dtype is what matrix products run in: "fp8" cases take bf16 inputs and
are held to the same float reference. FLOPs count a multiply-add as 2; bytes count each operand and result once, those
of products in the case's dtype, the stream between them in at least 16 bits.
"""

import contextlib
import difflib
import fnmatch
import importlib.util
import itertools
import math
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels import attention, conv, cross_attention, linear, norm, resample_conv
from kernels.attention import chunk_attention, chunk_attention_fp8
from kernels.color import lab_statistics, lab_transfer, launch_transfer
from kernels.color import reference as lab_reference
from kernels.conv import causal_conv3d
from kernels.conv import reference as causal_conv3d_reference
from kernels.conv_hopper import WIDEST
from kernels.cross_attention import (
    fold_audio,
    folded_attention,
    frame_attention,
    launch_fold,
    launch_folded,
    launch_frame,
    launch_text_image,
    text_image_attention,
)
from kernels.launch import Choice, Launch, lookup
from kernels.linear_hopper import LONG
from kernels.norm import key_scale, launch_norm_rope
from kernels.pixel_norm import fp8_factor, launch_pixel_norm, pixel_norm
from kernels.pixel_norm import reference as pixel_norm_reference
from kernels.resample_conv import fold_upsampling
from kernels.schedule import spans
from model.config import PRECISIONS, PRESETS, Config, VAEConfig
from model.errors import UserError
from model.vae import TOGETHER, VAE, decode_groups
from profiling import published

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of a case's inputs
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}  # of its matrix operands
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-3, "fp8": 4e-2}  # relative Frobenius error of one operation
FP8_MAX = 448.0  # largest e4m3 value
PROMPT = 20  # tokens of a prompt like the published one
FP8_LEVELS = PRECISIONS["fp8-vae"].fp8_vae

Dims = Mapping[str, int]
Output = Tensor | tuple[Tensor, ...]
Call = Callable[[], Output]


@dataclass(frozen=True)
class Draw:
    """Makes random inputs: normal, never zeros. Without a generator, under a fake-tensor mode, it makes only shapes."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator | None = None

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values of deviation `scale`."""
        x = torch.randn(*shape, device=self.device, dtype=torch.float32, generator=self.generator)
        return (x * scale).to(dtype or self.dtype)


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation.

    `prepare(*inputs)` does what is done once (quantises weights, changes their layout) and returns the call that is
    timed. It may raise anything; an absent module named in `needs` is noted beforehand.
    """

    name: str
    prepare: Callable[..., Call]
    ours: bool = False
    devices: tuple[str, ...] = ("cuda", "cpu")
    needs: str | None = None
    # Of a Triton kernel: what the operation calls on CUDA tensors, for the audit; and for the tuner, the launch
    # parameters worth trying at given dimensions, any of which `prepare(*inputs, launch=...)` takes.
    launcher: Callable[..., object] | None = None
    space: Callable[[Dims], Iterable[dict[str, Any]]] | None = None

    @property
    def installed(self) -> bool:
        """Whether what it needs can be imported."""
        if self.needs is None:
            return True
        try:
            return importlib.util.find_spec(self.needs) is not None
        except ModuleNotFoundError:  # the parent of a dotted name
            return False


@dataclass(frozen=True)
class Operation:
    """What is computed, and by whom."""

    name: str
    inputs: Callable[[Dims, Draw], tuple[Any, ...]]
    reference: Callable[..., Output]  # in the precision of its inputs
    flops: Callable[[Dims], float]
    bytes: Callable[[Dims, int], float]  # dimensions, bytes of a matrix operand
    backends: Mapping[str, Sequence[Backend]]  # dtype -> back-ends
    result: Callable[[Any], Output] = lambda output: output  # what of a back-end's output the reference is held to
    products: bool = True  # whether the FLOPs are matrix products, whose ceiling is measured
    tolerances: Mapping[str, float] = field(default_factory=dict)  # by dtype, where they are not those of TOLERANCES


@dataclass(frozen=True)
class Shape:
    """Named dimensions. `world` GPUs share the work, and one of them makes `calls` such calls in a chunk."""

    name: str
    dims: Dims
    world: int = 1
    calls: float = 0


@dataclass(frozen=True)
class Case:
    """An operation at a shape in a dtype."""

    operation: Operation
    shape: Shape
    dtype: str
    tolerance: float

    @property
    def name(self) -> str:
        """operation/shape/dtype."""
        return f"{self.operation.name}/{self.shape.name}/{self.dtype}"

    @property
    def flops(self) -> float:
        """Useful operations of one call."""
        return self.operation.flops(self.shape.dims)

    @property
    def bytes(self) -> float:
        """Least bytes of one call."""
        return self.operation.bytes(self.shape.dims, ITEM_BYTES[self.dtype])

    @property
    def backends(self) -> Sequence[Backend]:
        """Ours and the peers."""
        return self.operation.backends[self.dtype]

    def inputs(self, device: torch.device, generator: torch.Generator | None) -> tuple[Any, ...]:
        """Fresh random inputs."""
        return self.operation.inputs(self.shape.dims, Draw(device, TORCH_DTYPES[self.dtype], generator))

    def expected(self, inputs: tuple[Any, ...], precision: torch.dtype) -> Output:
        """The reference of these inputs, computed in `precision`."""
        wide = [x.to(precision) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        return self.operation.reference(*wide)


# On the CPU compilation takes seconds a shape; only passes over memory, which it fuses, are worth these.
ANYWHERE = ("cuda", "cpu")
CUDA = ("cuda",)


def once(function: Callable[..., Output]) -> Callable[..., Call]:
    """A `prepare` that has nothing to prepare."""
    return lambda *inputs: partial(function, *inputs)


def compiled(function: Callable[..., Output]) -> Callable[..., Call]:
    """A `prepare` that hands the function to torch.compile."""
    return lambda *inputs: partial(torch.compile(function, dynamic=False), *inputs)


def triton(dtype: str, launcher: Callable[..., Output], space: Callable[[Dims], Iterable[dict[str, Any]]]) -> Backend:
    """A Triton kernel by its launcher, which takes launch parameters. In float32 it is for tests, not to be audited."""

    def prepare(*inputs: Any, launch: Launch | None = None) -> Call:
        return partial(launcher, *inputs, launch=launch)

    return Backend("triton", prepare, True, CUDA, None, launcher if dtype != "fp32" else None, space)


def eager_and_compiled(
    function: Callable[..., Output], devices: tuple[str, ...] = ("cuda",)
) -> tuple[Backend, Backend]:
    """The arithmetic of model/ as it is and, on some devices, as torch.compile makes it."""
    return Backend("eager", once(function), ours=True), Backend("compiled", compiled(function), devices=devices)


# --- Attention ------------------------------------------------------------------------------------------------------


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head: q [queries, head, d], k and v [keys, head, d] -> [queries, head, d]."""
    heads = []
    for h in range(q.shape[1]):
        weights = (q[:, h] @ k[:, h].T * q.shape[2] ** -0.5).softmax(-1)
        heads.append(weights @ v[:, h])
    return torch.stack(heads, dim=1)


def ours(form: str) -> Callable[..., Call]:
    """The `prepare` of one form of kernels/attention.py."""
    return lambda q, k, v, launch=None: partial(launch_attention, form, q, k, v, launch)


def choose(
    operation: str, form: str, dims: Dims, dtype: str, x: Tensor, launch: Launch | None, equal: Sequence[str] = ()
) -> Choice:
    """One form of an operation on x's device, with those launch parameters, or else as it is tuned."""
    tuned = None if launch else lookup(operation, dims, dtype, x.device, (form,), equal)
    return tuned or Choice(form, launch or {})


def choose_attention(form: str, q: Tensor, k: Tensor, dtype: str, launch: Launch | None) -> Choice:
    """That of attention, q and k [tokens, heads, channels]."""
    dims = {"queries": len(q), "keys": len(k), "heads": q.shape[1], "channels": q.shape[2]}
    operation = "self_attention" if q.shape[2] <= attention.WIDE else "wide_attention"
    return choose(operation, form, dims, dtype, q, launch, ("channels",))


def launch_attention(form: str, q: Tensor, k: Tensor, v: Tensor, launch: Launch | None = None) -> Tensor:
    """That form."""
    choice, scale = choose_attention(form, q, k, attention.NAMES[q.dtype], launch), q.shape[2] ** -0.5
    return attention.launch(q[None], k[None], v[None], None, spans(len(q), len(k)), scale, q.dtype, choice)[0][0]


def chunk_attention_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention, whichever it takes for so many channels."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def ours_fp8(form: str) -> Callable[..., Call]:
    """The same on e4m3 operands, which are made beforehand."""

    def prepare(q: Tensor, k: Tensor, v: Tensor, launch: Launch | None = None) -> Call:
        return partial(launch_attention_fp8, form, *quantize_attention(q, k, v), launch=launch)

    return prepare


def launch_attention_fp8(form: str, *operands: Tensor, launch: Launch | None = None) -> Tensor:
    """That form of the FP8 attention."""
    q, q_scale, k, k_scale, v, v_scale = (x[None] for x in operands)
    seen, scale = spans(q.shape[1], k.shape[1]), q.shape[3] ** -0.5
    choice = choose_attention(form, q[0], k[0], "fp8", launch)
    return attention.launch(q, k, v, (q_scale, k_scale, v_scale), seen, scale, torch.bfloat16, choice)[0][0]


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
    "self_attention",
    lambda d, draw: tuple(draw(d[n], d["heads"], d["channels"]) for n in ("queries", "keys", "keys")),
    attention_reference,
    lambda d: 4.0 * d["queries"] * d["keys"] * d["heads"] * d["channels"],
    lambda d, item: 2.0 * (d["queries"] + d["keys"]) * d["heads"] * d["channels"] * item,
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
WIDE_ATTENTION = replace(
    SELF_ATTENTION,
    name="wide_attention",
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
    q, text_k, text_v, image_k, image_v = (draw(d[n], d["heads"], d["channels"]) for n in names)
    if not d["collapsed"]:
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
    return (min(PROMPT + 1, d["text"]) if d["collapsed"] else d["text"]) + d["image"]


TEXT_IMAGE_ATTENTION = Operation(
    "text_image_attention",
    text_image_inputs,
    cross_attention.text_image_reference,
    lambda d: 4.0 * d["queries"] * keys_of(d) * d["heads"] * d["channels"],
    lambda d, item: 2.0 * (d["queries"] + keys_of(d)) * d["heads"] * d["channels"] * item,
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
        draw(d["queries"], d["heads"], d["channels"]),
        *(draw(frame_keys(d), d["keys"], d["heads"], d["channels"]) for _ in range(2)),
        d["per_frame"],
    ),
    cross_attention.frame_reference,
    lambda d: 4.0 * d["queries"] * d["keys"] * d["heads"] * d["channels"],
    lambda d, item: 2.0 * (d["queries"] + frame_keys(d) * d["keys"]) * d["heads"] * d["channels"] * item,
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
    width = d["heads"] * d["channels"]
    return (
        draw(d["queries"], width),
        *(draw(frame_keys(d), d["keys"], d["heads"], d["channels"]) for _ in range(2)),
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
    return folded_attention(z, *fold_audio(k, v, q_weight, q_bias, weight), k.shape[1], per_frame)


def launch_audio(
    z: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, weight: Tensor, per_frame: int
) -> Tensor:
    """What `audio_folded` launches."""
    return launch_folded(z, *launch_fold(k, v, q_weight, q_bias, weight), k.shape[1], per_frame)


AUDIO_ATTENTION = Operation(
    "audio_attention",
    audio_inputs,
    partial(audio_layer, cross_attention.frame_reference),
    lambda d: 4.0 * d["queries"] * (d["heads"] * d["channels"]) ** 2 + FRAME_ATTENTION.flops(d),
    lambda d, item: 2.0 * item * (d["queries"] + d["heads"] * d["channels"] + frame_keys(d) * d["keys"])
    * d["heads"] * d["channels"],
    {
        dtype: (
            Backend("direct", once(partial(audio_layer, frame_attention)), ours=True),
            Backend("folded", once(audio_folded), True, ANYWHERE, None, launch_audio if dtype == "bf16" else None),
            Backend("sdpa", once(partial(audio_layer, frame_library))),
        )
        for dtype in ("fp32", "bf16")
    },
)  # fmt: skip


# --- Linear layers --------------------------------------------------------------------------------------------------


def quantize_library(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns] as e4m3 and the float32 scale of each row [rows, 1]: x ~ quantised * scale."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def scaled_mm(x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], bias: Tensor, dtype: torch.dtype) -> Tensor:
    """x w^T + bias of row-quantised x [M, K] and w [N, K], in `dtype`."""
    (xq, xs), (wq, ws) = x, w
    fast = xq.is_cuda
    product: Any = torch._scaled_mm  # pyright: ignore  (private, and there is no other)
    return product(xq, wq.t(), scale_a=xs, scale_b=ws.t(), bias=bias, out_dtype=dtype, use_fast_accum=fast)


def prepare_scaled_mm(x: Tensor, w: Tensor, bias: Tensor) -> Call:
    """The product alone: activations as well as weights are quantised beforehand."""
    xq, wq = quantize_library(x), quantize_library(w)
    return lambda: scaled_mm(xq, wq, bias, x.dtype)


def ours_linear(form: str, fp8: bool) -> Backend:
    """One form of kernels/linear.py; in FP8, activations as well as weights are quantised beforehand."""

    def choose_linear(x: Tensor, w: Tensor, launch: Launch | None) -> Choice:
        dims = {"rows": len(x), "inputs": x.shape[1], "outputs": len(w)}
        return choose("linear", form, dims, "fp8" if fp8 else attention.NAMES[x.dtype], x, launch)

    def launch(x: Tensor, w: Tensor, bias: Tensor, launch: Launch | None = None) -> Tensor:
        choice, epilogue = choose_linear(x, w, launch), linear.Epilogue(bias)
        if not fp8:
            return linear.launch(x, w, None, epilogue, x.dtype, choice)[0]
        (x8, x_scale), (w8, w_scale) = operand(x), operand(w)
        return linear.launch(x8, w8, (x_scale, w_scale), epilogue, x.dtype, choice)[0]

    def prepare(x: Tensor, w: Tensor, bias: Tensor, launch: Launch | None = None) -> Call:
        choice, epilogue = choose_linear(x, w, launch), linear.Epilogue(bias)
        if not fp8:
            return lambda: linear.launch(x, w, None, epilogue, x.dtype, choice)[0]
        (x8, x_scale), (w8, w_scale) = linear.quantize_rows(x), linear.quantize_rows(w)
        return lambda: linear.launch(x8, w8, (x_scale, w_scale), epilogue, x.dtype, choice)[0]

    space = {"gluon": partial(linear_space, fp8), "triton": partial(linear_space_triton, fp8)}.get(form)
    return Backend(form, prepare, True, CUDA, None, launch if space else None, space)


def operand(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for what `quantize_rows` makes of x: for the audit, whose inputs have no values."""
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), dtype=torch.float32)


def linear_space(fp8: bool, dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the form for Hopper; tiles are cut where the last round of programs tells."""
    few = dims["rows"] * dims["outputs"] < 512 * 128 * 256
    promoted = int(fp8 and dims["inputs"] >= LONG)  # a matter of accuracy, not of speed
    for (consumers, block_n, stages), width in itertools.product(((2, 256, 3), (2, 128, 5), (3, 128, 4)), (4, 8, 16)):
        for split in (0, 1) if few else (0,):
            yield {
                "BLOCK_N": block_n, "CONSUMERS": consumers, "STAGES": stages, "GROUP_N": width, "PROMOTED": promoted,
                "SPLIT": split,
            }  # fmt: skip


def linear_space_triton(fp8: bool, dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the form for any GPU: as many bytes of a stage's row in 8 bits as in 16."""
    promoted = int(fp8 and dims["inputs"] >= LONG)
    for block_n, width in itertools.product((128,) if promoted or not fp8 else (128, 256), (4, 8, 16)):
        yield {
            "BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 128 if fp8 else 64, "GROUP_N": width, "PROMOTED": promoted,
            "num_warps": 8, "num_stages": 3 if block_n == 256 else 4,
        }  # fmt: skip


LINEAR = Operation(
    "linear",
    lambda d, draw: (
        draw(d["rows"], d["inputs"]),
        draw(d["outputs"], d["inputs"], scale=d["inputs"] ** -0.5),
        draw(d["outputs"]),
    ),
    F.linear,
    lambda d: 2.0 * d["rows"] * d["inputs"] * d["outputs"],
    lambda d, item: (d["rows"] + d["outputs"]) * d["inputs"] * item + d["rows"] * d["outputs"] * max(item, 2.0),
    {
        "fp32": (Backend("eager", once(F.linear), ours=True),),
        "bf16": (
            *(ours_linear(form, fp8=False) for form in linear.FORMS),
            Backend("eager", once(F.linear), ours=True, devices=("cpu",)),
        ),
        "fp8": (
            *(ours_linear(form, fp8=True) for form in linear.FORMS),
            Backend("scaled-mm-row", prepare_scaled_mm),
        ),
    },
)


def torchao_linear(w: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """torchao's float8 linear layer: weights quantised by row beforehand, activations by row at each call."""
    from torchao.quantization import (  # type: ignore[import-not-found]
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    layer = torch.nn.Linear(w.shape[1], w.shape[0], device=w.device, dtype=w.dtype)
    layer.weight, layer.bias = torch.nn.Parameter(w, requires_grad=False), torch.nn.Parameter(bias, requires_grad=False)
    quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return layer


EPS = 1e-6  # of every layer norm of the student


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm and modulation by torch, in float32, rounded once."""
    return published.layer_norm_modulate(x, shift, scale, EPS)


def norm_linear(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """LayerNorm, modulation, linear layer, and tanh-GELU if asked for: what comes before attention and in the FFN."""
    y = F.linear(norm_modulate(x, shift, scale), w, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def norm_linear_reference(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """`norm_linear` in the precision of its inputs throughout."""
    y = (F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift) @ w.T + bias
    return F.gelu(y, approximate="tanh") if gelu else y


def norm_scaled_mm(x: Tensor, shift: Tensor, scale: Tensor, wq: Tensor, ws: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """`norm_linear` on e4m3 weights, with the activations quantised by row in a pass of their own."""
    y = scaled_mm(quantize_library(norm_modulate(x, shift, scale)), (wq, ws), bias, x.dtype)
    return F.gelu(y, approximate="tanh") if gelu else y


def prepare_norm_scaled_mm(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Call:
    """Unfused row quantisation, `torch._scaled_mm`, compiled pointwise operations around it."""
    return compiled(norm_scaled_mm)(x, shift, scale, *quantize_library(w), bias, gelu)


def prepare_norm_torchao(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Call:
    """The same sequence around torchao's layer, compiled as torchao asks for."""
    layer = torchao_linear(w, bias)

    def run(x: Tensor) -> Tensor:
        y = layer(norm_modulate(x, shift, scale))
        return F.gelu(y, approximate="tanh") if gelu else y

    return compiled(run)(x)


def prepare_norm_linear_fp8(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Call:
    """Ours: two kernels. What GELU makes is handed to the next layer in e4m3, as the model does."""
    w8, w_scale = linear.quantize_rows(w)
    bound = linear.output_bound(w8, w_scale, bias)

    def run() -> Output:
        x8, x_scale = norm.layer_norm_modulate_fp8(x, shift, scale, EPS)
        if gelu:
            return linear.linear_fp8_quantized(x8, x_scale, w8, w_scale, bound, bias, "gelu_tanh")
        return linear.linear_fp8(x8, x_scale, w8, w_scale, bias, dtype=x.dtype)

    return run


def launch_norm_linear(x: Tensor, shift: Tensor, scale: Tensor, w: Tensor, bias: Tensor, gelu: bool) -> Output:
    """What it launches, for Hopper."""
    x8, x_scale = norm.launch_rows(x, (scale, shift, EPS, 1.0), fp8=True)
    w8, w_scale = operand(w)
    bound = x_scale.new_empty(2) if gelu else None
    epilogue, dtype = linear.Epilogue(bias, gelu, bound=bound), torch.float8_e4m3fn if gelu else x.dtype
    return linear.launch(x8, w8, (x_scale, w_scale), epilogue, dtype, Choice("gluon", {}))


def prepare_residual_fp8(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, quantised: bool) -> Call:
    """Ours; `quantised`: y comes in e4m3 from the layer before."""
    (w8, w_scale), (y8, y_scale) = linear.quantize_rows(w), linear.quantize_rows(y)

    def run() -> Output:
        a, scale = (y8, y_scale) if quantised else linear.quantize_rows(y)
        return linear.linear_fp8(a, scale, w8, w_scale, bias, None, gate, x, x.dtype)

    return run


def launch_residual(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, _quantised: bool) -> Output:
    """What it launches, for Hopper."""
    y8, y_scale = norm.launch_rows(y, None, fp8=True)
    w8, w_scale = operand(w)
    epilogue = linear.Epilogue(bias, False, gate, x)
    return linear.launch(y8, w8, (y_scale, w_scale), epilogue, x.dtype, Choice("gluon", {}))


def residual_inputs(d: Dims, draw: Draw) -> tuple[Any, ...]:
    """y [rows, inputs], w, bias, the stream x [rows, outputs] that the result is added to, its gate [outputs].

    At last, whether the layer before hands y over in e4m3: peers quantise it themselves.
    """
    return (
        *LINEAR.inputs(d, draw),
        draw(d["rows"], d["outputs"]),
        draw(d["outputs"], dtype=torch.float32),
        bool(d["quantised"]),
    )


def linear_residual(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, _quantised: bool) -> Tensor:
    """x + gate (y w^T + bias), rounded once."""
    return (x.float() + F.linear(y, w, bias).float() * gate).to(x.dtype)


def residual_scaled_mm(y: Tensor, wq: Tensor, ws: Tensor, bias: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """`linear_residual` on e4m3 weights."""
    return (x.float() + scaled_mm(quantize_library(y), (wq, ws), bias, x.dtype).float() * gate).to(x.dtype)


def prepare_residual_scaled_mm(y: Tensor, w: Tensor, bias: Tensor, x: Tensor, gate: Tensor, _quantised: bool) -> Call:
    """Unfused row quantisation, `torch._scaled_mm`, compiled pointwise operations around it."""
    return compiled(residual_scaled_mm)(y, *quantize_library(w), bias, x, gate)


NORM_LINEAR = Operation(
    "norm_linear",
    lambda d, draw: (
        draw(d["rows"], d["inputs"]),
        *(draw(d["inputs"], scale=0.1, dtype=torch.float32) for _ in range(2)),
        *LINEAR.inputs(d, draw)[1:],
        bool(d["gelu"]),
    ),
    norm_linear_reference,
    LINEAR.flops,
    lambda d, item: d["outputs"] * d["inputs"] * item + d["rows"] * (d["inputs"] + d["outputs"]) * max(item, 2.0),
    {
        "fp32": eager_and_compiled(norm_linear),
        "bf16": eager_and_compiled(norm_linear),
        "fp8": (
            Backend("ours", prepare_norm_linear_fp8, True, ANYWHERE, None, launch_norm_linear),
            Backend("scaled-mm-row", prepare_norm_scaled_mm, devices=("cuda",)),
            Backend("torchao", prepare_norm_torchao, devices=("cuda",), needs="torchao"),
            Backend("bf16-compiled", compiled(norm_linear), devices=("cuda",)),
        ),
    },
    lambda output: dequantized(output) if isinstance(output, tuple) else output,
)

LINEAR_RESIDUAL = Operation(
    "linear_residual",
    residual_inputs,
    lambda y, w, bias, x, gate, _: x + gate * (y @ w.T + bias),
    LINEAR.flops,
    lambda d, item: d["outputs"] * d["inputs"] * item + d["rows"] * (d["inputs"] + 2 * d["outputs"]) * max(item, 2.0),
    {
        "fp32": eager_and_compiled(linear_residual),
        "bf16": eager_and_compiled(linear_residual),
        "fp8": (
            Backend("ours", prepare_residual_fp8, True, ANYWHERE, None, launch_residual),
            Backend("scaled-mm-row", prepare_residual_scaled_mm, devices=("cuda",)),
            Backend("bf16-compiled", compiled(linear_residual), devices=("cuda",)),
        ),
    },
)


# --- Passes over memory ---------------------------------------------------------------------------------------------


def dequantized(output: tuple[Tensor, Tensor]) -> Tensor:
    """What values and the scales of their rows stand for, to be held to what was quantised."""
    quantised, scale = output
    return quantised.float() * scale.view(-1, 1)


def rows_space(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Rows a program, warps."""
    for rows, warps in itertools.product((1, 2, 4), (4, 8, 16)):
        yield {"ROWS": rows, "num_warps": warps}


def launch_quantize(x: Tensor, launch: Launch | None = None) -> Output:
    """Our kernel."""
    return norm.launch_rows(x, None, fp8=True, launch=launch)


QUANTIZE_ROWS = Operation(
    "quantize_rows",
    lambda d, draw: (draw(d["rows"], d["columns"]),),
    lambda x: x,
    lambda d: 3.0 * d["rows"] * d["columns"],
    lambda d, item: 3.0 * item * d["rows"] * d["columns"],  # bf16 in, e4m3 out
    {
        "fp8": (
            Backend("ours", once(linear.quantize_rows), ours=True, devices=("cpu",)),
            triton("fp8", launch_quantize, rows_space),
            Backend("torch", once(quantize_library)),
            Backend("torch-compiled", compiled(quantize_library), devices=CUDA),
        )
    },
    dequantized,
    products=False,
)


def launch_norm(fp8: bool, x: Tensor, shift: Tensor, scale: Tensor, launch: Launch | None = None) -> Output:
    """Our kernel."""
    out, out_scale = norm.launch_rows(x, (scale, shift, EPS, 1.0), fp8, launch)
    return (out, out_scale) if fp8 else out


def norm_quantize(x: Tensor, shift: Tensor, scale: Tensor) -> Output:
    """Norm, modulation and quantisation by torch."""
    return quantize_library(norm_modulate(x, shift, scale))


LAYER_NORM_MODULATE = Operation(
    "layer_norm_modulate",
    lambda d, draw: (
        draw(d["rows"], d["columns"]),
        *(draw(d["columns"], scale=0.1, dtype=torch.float32) for _ in range(2)),
    ),
    lambda x, shift, scale: F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift,
    lambda d: 8.0 * d["rows"] * d["columns"],
    lambda d, item: (item + max(item, 2.0)) * d["rows"] * d["columns"],
    {
        **{
            dtype: (
                Backend("eager", once(norm.layer_norm_modulate), ours=True, devices=("cpu",)),
                triton(dtype, partial(launch_norm, False), rows_space),
                Backend("torch", once(norm_modulate)),
                Backend("torch-compiled", compiled(norm_modulate), devices=ANYWHERE),
            )
            for dtype in ("fp32", "bf16")
        },
        "fp8": (
            Backend("ours", once(norm.layer_norm_modulate_fp8), ours=True, devices=("cpu",)),
            triton("fp8", partial(launch_norm, True), rows_space),
            Backend("torch-compiled", compiled(norm_quantize), devices=CUDA),
        ),
    },
    lambda output: dequantized(output) if isinstance(output, tuple) else output,
    products=False,
)


def rotations(draw: Draw, tokens: int, pairs: int) -> Tensor:
    """Cosines and sines of random angles, float32 [token, pair, 2], as in a rotary table."""
    angles = draw(tokens, pairs, dtype=torch.float32)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def split_qkv(qkv: Tensor, rope: Tensor) -> list[Tensor]:
    """q, k and v [S, head, d] of a fused projection [S, 3 D], in place."""
    return list(qkv.unflatten(1, (3, -1, 2 * rope.shape[1])).unbind(1))


def norm_rope_library(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    """Norm and rotation by torch: q and k, [S, head, d] each."""
    q, k, _ = split_qkv(qkv, rope)
    return published.rms_norm_rope(q, k, q_weight, k_weight, rope, EPS)


def norm_rope_ours(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    """The operation of kernels/norm.py."""
    q, k, _ = split_qkv(qkv, rope)
    return norm.rms_norm_rope(q, k, q_weight, k_weight, rope, EPS)


def norm_rope_launch(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """What it launches."""
    q, k, _ = split_qkv(qkv, rope)
    return launch_norm_rope(q, k, q_weight, k_weight, rope, EPS, launch=launch)


def norm_rope_reference(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
    """The same in the precision of its inputs."""
    q, k, _ = split_qkv(qkv, rope)
    return tuple(norm.reference(q, k, q_weight, k_weight, rope, EPS))


def norm_rope_inputs(d: Dims, draw: Draw) -> tuple[Tensor, ...]:
    """A fused projection, two weights, rotations."""
    return (
        draw(d["tokens"], 3 * d["heads"] * d["channels"]),
        *(1 + draw(d["heads"] * d["channels"], scale=0.1) for _ in range(2)),
        rotations(draw, d["tokens"], d["channels"] // 2),
    )


def norm_rope_space(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Heads a pass, tokens a program."""
    for block_h, tokens, warps in itertools.product((4, 8, 16), (1, 2, 4), (4, 8)):
        yield {"BLOCK_H": block_h, "TOKENS": tokens, "num_warps": warps}


RMS_NORM_ROPE = Operation(
    "rms_norm_rope",
    norm_rope_inputs,
    norm_rope_reference,
    lambda d: 2 * 10.0 * d["tokens"] * d["heads"] * d["channels"],
    lambda d, item: d["tokens"] * d["channels"] * (4.0 * d["heads"] * item + 4),
    {
        dtype: (
            Backend("eager", once(norm_rope_ours), ours=True, devices=("cpu",)),
            triton(dtype, norm_rope_launch, norm_rope_space),
            Backend("torch", once(norm_rope_library)),
            Backend("torch-compiled", compiled(norm_rope_library), devices=ANYWHERE),
        )
        for dtype in ("fp32", "bf16")
    },
    products=False,
)


def norm_rope_fp8(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The operands of FP8 attention; `scale` of the keys if it was made beforehand."""
    q, k, v = split_qkv(qkv, rope)
    scale = key_scale(k_weight, q.shape[1]) if scale is None else scale
    return norm.rms_norm_rope_fp8(q, k, v, q_weight, k_weight, scale, rope, EPS)


def prepare_norm_rope_fp8(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> Call:
    """The keys' scale comes from the weight, once."""
    return partial(
        norm_rope_fp8, qkv, q_weight, k_weight, rope, key_scale(k_weight, qkv.shape[1] // 6 // rope.shape[1])
    )


def launch_norm_rope_fp8(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
    """What it launches."""
    q, k, v = split_qkv(qkv, rope)
    return norm.launch_fp8(q, k, v, q_weight, k_weight, q.new_empty(q.shape[1], dtype=torch.float32), rope, EPS)


def norm_rope_fp8_library(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
    """The definition, in torch."""
    q, k, v = split_qkv(qkv, rope)
    scale = key_scale(k_weight, q.shape[1])
    q8, q_scale, k8, v8, v_scale = norm.reference_fp8(q, k, v, q_weight, k_weight, scale, rope, EPS)
    return q8, q_scale, k8, scale, v8, v_scale


def norm_rope_smoothed(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
    """q, k less the mean of its sample, and v, in the precision of the inputs."""
    q, k, v = split_qkv(qkv, rope)
    q, k = norm.reference(q, k, q_weight, k_weight, rope, EPS)
    return q, k - k[norm.sample(len(k))].mean(0), v


def multiplied_out(output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What the quantised operands stand for."""
    q8, q_scale, k8, k_scale, v8, v_scale = output
    return attention.dequantize(q8, q_scale, k8, k_scale, v8, v_scale, torch.float32)


QUANTIZE_QKV = Operation(
    "quantize_qkv",
    norm_rope_inputs,
    norm_rope_smoothed,
    lambda d: 3 * 10.0 * d["tokens"] * d["heads"] * d["channels"],
    lambda d, item: d["tokens"] * d["channels"] * (9.0 * d["heads"] * item + 4),  # bf16 in, e4m3 out
    {
        "fp8": (
            Backend("ours", prepare_norm_rope_fp8, True, ANYWHERE, None, launch_norm_rope_fp8),
            Backend("torch-compiled", compiled(norm_rope_fp8_library), devices=CUDA),
        )
    },
    multiplied_out,
    products=False,
)


def norm_attention_reference(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> Tensor:
    """Norm, rotation and attention of a fused projection, in the precision of its inputs."""
    q, k, v = split_qkv(qkv, rope)
    q, k = norm.reference(q, k, q_weight, k_weight, rope, EPS)
    return attention_reference(q, k, v)


def norm_attention(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> Tensor:
    """Ours, in 16 bits."""
    q, k, v = split_qkv(qkv, rope)
    q, k = norm.rms_norm_rope(q, k, q_weight, k_weight, rope, EPS)
    return chunk_attention(q, k, v)


def norm_attention_fp8(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, scale: Tensor) -> Tensor:
    """Ours, in FP8 from the norm on."""
    q8, q_scale, k8, k_scale, v8, v_scale = norm_rope_fp8(qkv, q_weight, k_weight, rope, scale)
    return chunk_attention_fp8(q8, q_scale, k8, k_scale, v8, v_scale)


def prepare_norm_attention_fp8(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> Call:
    """The keys' scale comes from the weight, once."""
    scale = key_scale(k_weight, qkv.shape[1] // 6 // rope.shape[1])
    return partial(norm_attention_fp8, qkv, q_weight, k_weight, rope, scale)


def norm_attention_sdpa(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> Tensor:
    """All of it by torch."""
    q, k = norm_rope_library(qkv, q_weight, k_weight, rope)
    return sdpa(SDPBackend.FLASH_ATTENTION, q, k, split_qkv(qkv, rope)[2])


def norm_attention_library(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> Tensor:
    """Compiled norm and rotation, cuDNN's attention."""
    q, k = norm_rope_library(qkv, q_weight, k_weight, rope)
    return sdpa(SDPBackend.CUDNN_ATTENTION, q, k, split_qkv(qkv, rope)[2])


NORM_ATTENTION = Operation(
    "norm_attention",
    norm_rope_inputs,
    norm_attention_reference,
    lambda d: 4.0 * d["tokens"] ** 2 * d["heads"] * d["channels"],
    lambda d, item: d["tokens"] * d["channels"] * d["heads"] * 5.0 * max(item, 2.0),
    {
        "fp32": (Backend("ours", once(norm_attention), ours=True), Backend("sdpa", once(norm_attention_sdpa))),
        "bf16": (
            Backend("ours", once(norm_attention), ours=True, devices=CUDA),
            Backend("torch-cudnn", compiled(norm_attention_library), devices=CUDA),
        ),
        "fp8": (
            Backend("ours", prepare_norm_attention_fp8, ours=True, devices=CUDA),
            Backend("ours-bf16", once(norm_attention), devices=CUDA),
            Backend("torch-cudnn", compiled(norm_attention_library), devices=CUDA),
        ),
    },
    tolerances={"fp8": 6e-2},  # as self_attention's
)


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """The VAE's norm and SiLU by torch: silu(x / ||x|| sqrt(C) gamma), the norm over the C channels of a pixel."""
    return pixel_norm_reference(x, gamma, silu=True)


def pixels(draw: Draw, frames: int, channels: int, rows: int, columns: int) -> Tensor:
    """Random [frame, channel, row, column] in channels-last memory."""
    return draw(frames, rows, columns, channels).permute(0, 3, 1, 2)


def norm_silu_launch(x: Tensor, gamma: Tensor, launch: Launch | None = None) -> Tensor:
    """Our kernel."""
    return launch_pixel_norm(x, gamma, True, launch=launch)


def norm_silu_space(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Pixels a program, warps."""
    for pixels, warps in itertools.product((4, 8, 16, 32), (4, 8)):
        yield {"PIXELS": pixels, "num_warps": warps}


NORM_SILU = Operation(
    "norm_silu",
    lambda d, draw: (
        pixels(draw, d["frames"], d["channels"], d["rows"], d["columns"]),
        1 + draw(d["channels"], scale=0.1),
    ),
    norm_silu,
    lambda d: 8.0 * d["frames"] * d["channels"] * d["rows"] * d["columns"],
    lambda d, item: 2.0 * item * d["frames"] * d["channels"] * d["rows"] * d["columns"],
    {
        dtype: (
            Backend("eager", once(partial(pixel_norm, silu=True)), ours=True, devices=("cpu",)),
            triton(dtype, norm_silu_launch, norm_silu_space),
            Backend("torch", once(norm_silu)),
            Backend("torch-compiled", compiled(norm_silu), devices=ANYWHERE),
        )
        for dtype in ("fp32", "bf16")
    },
    products=False,
)


def launch_lab(pixels: Tensor, mean: Tensor, std: Tensor, launch: Launch | None = None) -> Output:
    """Our kernels; pixels and bytes."""
    return launch_transfer(pixels, mean, std, 1.0, launch)


def prepare_transfer(pixels: Tensor, mean: Tensor, std: Tensor, launch: Launch | None = None) -> Call:
    """Nothing is prepared."""
    return partial(launch_lab, pixels, mean, std, launch)


def lab_space(_dims: Dims) -> Iterator[dict[str, Any]]:
    """Pixels a program, warps."""
    for block, warps in itertools.product((512, 1024, 2048, 4096), (4, 8)):
        yield {"BLOCK": block, "num_warps": warps}


LAB_TRANSFER = Operation(
    "lab_transfer",
    lambda d, draw: (
        draw(d["frames"], 3, d["rows"], d["columns"], scale=0.3).clamp(-1, 1),
        *lab_statistics(draw(1, 3, d["rows"], d["columns"], scale=0.3).clamp(-1, 1)),
    ),
    partial(lab_reference, strength=1.0),
    lambda d: 150.0 * d["frames"] * d["rows"] * d["columns"],
    lambda d, item: 3.0 * item * 3 * d["frames"] * d["rows"] * d["columns"],  # two reads, one write
    {
        "fp32": (
            Backend("eager", once(lab_transfer), ours=True, devices=("cpu",)),
            Backend("triton", prepare_transfer, True, CUDA, None, launch_lab, lab_space),
            Backend("torch", once(partial(lab_reference, strength=1.0))),
            Backend("torch-compiled", compiled(partial(lab_reference, strength=1.0)), devices=ANYWHERE),
        )
    },
    lambda output: output[0] if isinstance(output, tuple) else output,
    products=False,
)


# --- Convolutions ---------------------------------------------------------------------------------------------------


def conv3d_official(x: Tensor, w: Tensor, bias: Tensor, past: Tensor) -> Tensor:
    """The published form: cached frames concatenated, padded, one library convolution, channels first."""
    k = w.shape[3]
    clip = torch.cat([past, x]).transpose(0, 1)[None].contiguous()
    return F.conv3d(F.pad(clip, [k // 2] * 4), w, bias)[0].transpose(0, 1)


def conv3d_channels_last(x: Tensor, w: Tensor, bias: Tensor, past: Tensor) -> Call:
    """The same library convolution on channels-last memory, weights laid out beforehand."""
    last, k = w.contiguous(memory_format=torch.channels_last_3d), w.shape[3]

    def call() -> Tensor:
        clip = torch.cat([past, x])[None].transpose(1, 2)
        return F.conv3d(clip, last, bias, padding=(0, k // 2, k // 2))[0].transpose(0, 1)

    return call


def ours_conv(operation: str, form: str, fp8: bool = False) -> Backend:
    """One form of kernels/conv.py, as it is tuned; FP8 operands are rounded beforehand."""

    def run(
        x: Tensor, past: Tensor, w: Tensor, bias: Tensor, scale: Tensor | None, launch: Launch | None = None
    ) -> Tensor:
        choice = Choice(form, launch) if launch else conv.tuned(operation, x, len(w), (form,)) or Choice(form, {})
        return conv.launch(x, past, w, bias, None, scale, choice)

    def prepare(x: Tensor, w: Tensor, bias: Tensor, past: Tensor, launch: Launch | None = None) -> Call:
        x, past, w, scale = conv_operands(x, past, w, fp8)
        return partial(run, x, past, w, bias, scale, launch)

    def launcher(x: Tensor, w: Tensor, bias: Tensor, past: Tensor, launch: Launch | None = None) -> Tensor:
        return run(*conv_shapes(x, past, w, bias, fp8), launch)

    space = partial(conv_space, fp8, 1 if operation == "time_conv" else 3) if form == "gluon" else None
    return Backend(form, prepare, True, CUDA, None, launcher if form == "gluon" else None, space)


def conv_operands(x: Tensor, past: Tensor, w: Tensor, fp8: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, past, weights laid out, and their scale in FP8, where all three are rounded."""
    if not fp8:
        return x, past, w.contiguous(memory_format=torch.channels_last_3d), None
    factor = FP8_MAX / float(max(x.abs().max(), past.abs().max()))
    x, past = ((t * factor).to(torch.float8_e4m3fn) for t in (x, past))
    return x, past, *conv.quantize_conv(w, factor)


def conv_shapes(
    x: Tensor, past: Tensor, w: Tensor, bias: Tensor, fp8: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What `conv_operands` makes, and the bias, of tensors without values."""
    dtype = torch.float8_e4m3fn if fp8 else x.dtype
    last = torch.empty_like(w, dtype=dtype, memory_format=torch.channels_last_3d)
    scale = w.new_empty(len(w), dtype=torch.float32) if fp8 else None
    return torch.empty_like(x, dtype=dtype), torch.empty_like(past, dtype=dtype), last, bias, scale


def conv_space(fp8: bool, k: int, dims: Dims) -> Iterator[dict[str, Any]]:
    """Launch parameters of the form for Hopper: tiles that divide the channels, as many stages as shared memory has.

    Rows of channels that reach beyond the last one cost multiplications with zeros, but copies are fewer and longer.
    """
    for left, right, row_bytes, stages, tall, lines in (
        (128, 64, 128, 3, 0, 8), (128, 64, 64, 6, 0, 8), (128, 64, 64, 2, 1, 8), (128, 0, 128, 4, 0, 8),
        (128, 0, 64, 4, 1, 8), (64, 32, 128, 5, 0, 8), (64, 32, 128, 2, 1, 8), (64, 32, 64, 10, 0, 8),
        (64, 32, 64, 5, 1, 8), (64, 32, 32, 11, 1, 8), (64, 32, 64, 3, 1, 16), (64, 32, 64, 5, 0, 16),
        (64, 32, 128, 2, 0, 16), (16, 0, 128, 5, 1, 8), (16, 0, 64, 9, 1, 8), (16, 0, 64, 5, 1, 16),
    ):  # fmt: skip
        block_k, outputs = row_bytes if fp8 else row_bytes // 2, dims["outputs"]
        waste = -dims["channels"] % block_k / dims["channels"]
        if (
            (outputs <= 16) == (left == 16)
            and (left == 16 or outputs % (left + right) == 0)
            and block_k >= 32
            and waste < 0.5
            and (k > 1 or not tall)
        ):
            tile = {"LEFT": left, "RIGHT": right, "LINES": lines}
            yield tile | {"BLOCK_K": block_k, "STAGES": stages, "TALL": tall}


def convolution(name: str, k: int) -> Operation:
    """The causal convolution with a kernel of 3 x k x k."""
    taps = 3.0 * k * k
    peers = (
        Backend("conv3d-channels-last", conv3d_channels_last, devices=("cuda",)),
        Backend("conv3d-official", once(conv3d_official)),
    )
    return Operation(
        name,
        lambda d, draw: (
            pixels(draw, d["frames"], d["channels"], d["rows"], d["columns"]),
            draw(d["outputs"], d["channels"], 3, k, k, scale=(taps * d["channels"]) ** -0.5),
            draw(d["outputs"]),
            pixels(draw, 2, d["channels"], d["rows"], d["columns"]),
        ),
        causal_conv3d_reference,
        lambda d: 2.0 * taps * d["channels"] * d["outputs"] * d["frames"] * d["rows"] * d["columns"],
        lambda d, item: (
            item * (d["rows"] * d["columns"] * ((d["frames"] + 2) * d["channels"] + d["frames"] * d["outputs"]))
            + taps * item * d["channels"] * d["outputs"]
        ),
        {
            "fp32": (Backend("eager", once(causal_conv3d), ours=True), *peers),
            "bf16": (ours_conv(name, "gluon"), ours_conv(name, "library"), *peers),
            "fp8": (ours_conv(name, "gluon", fp8=True), peers[0]),
        },
    )


CAUSAL_CONV3D, TIME_CONV = convolution("causal_conv3d", 3), convolution("time_conv", 1)


def conv_norm(x: Tensor, w: Tensor, bias: Tensor, past: Tensor, gamma: Tensor) -> Tensor:
    """The VAE's norm and SiLU of a causal convolution, in two passes."""
    return norm_silu(causal_conv3d_reference(x, w, bias, past), gamma)


def ours_conv_norm(form: str, fp8: bool) -> Backend:
    """The norm on the convolution's way out, or apart; in FP8 the result is e4m3, with what undoes its factor.

    "eager" is the operation as a CPU has it.
    """

    def run(
        x: Tensor, past: Tensor, w: Tensor, bias: Tensor, scale: Tensor | None, gamma: Tensor, factor: float | None,
        launch: Launch | None = None,
    ) -> Tensor:  # fmt: skip
        if form == "eager":
            return causal_conv3d(x, w, bias, past, None, scale, gamma, factor)
        choice = Choice(form, launch) if launch else conv.tuned("conv_norm", x, len(w), (form,)) or Choice(form, {})
        return conv.launch_normed(x, past, w, bias, scale, gamma, factor, choice)

    def prepare(
        x: Tensor, w: Tensor, bias: Tensor, past: Tensor, gamma: Tensor, launch: Launch | None = None
    ) -> Call:  # fmt: skip
        x, past, w, scale = conv_operands(x, past, w, fp8)
        factor = fp8_factor(gamma) if fp8 else None
        call = partial(run, x, past, w, bias, scale, gamma, factor, launch)
        if factor is None:
            return call
        undo = torch.tensor(1 / factor)
        return lambda: (call(), undo)

    def launcher(
        x: Tensor, w: Tensor, bias: Tensor, past: Tensor, gamma: Tensor, launch: Launch | None = None
    ) -> Tensor:  # fmt: skip
        return run(*conv_shapes(x, past, w, bias, fp8), gamma, 1.0 if fp8 else None, launch)

    if form != "fused":
        return Backend(form, prepare, True, CUDA if form == "apart" else ("cpu",))
    return Backend(form, prepare, True, CUDA, None, launcher, partial(conv_norm_space, fp8))


def conv_norm_space(fp8: bool, dims: Dims) -> Iterator[dict[str, Any]]:
    """Of `conv_space`, tiles that have all output channels."""
    return (launch for launch in conv_space(fp8, 3, dims) if launch["LEFT"] + launch["RIGHT"] >= dims["outputs"])


CONV_NORM = replace(
    CAUSAL_CONV3D,
    name="conv_norm",
    inputs=lambda d, draw: (*CAUSAL_CONV3D.inputs(d, draw), 1 + draw(d["outputs"], scale=0.1)),
    reference=conv_norm,
    backends={
        "bf16": (
            *(ours_conv_norm(form, fp8=False) for form in ("fused", "apart", "eager")),
            Backend("torch-compiled", compiled(conv_norm), devices=ANYWHERE),
        ),
        "fp8": tuple(ours_conv_norm(form, fp8=True) for form in ("fused", "apart", "eager")),
    },
    result=lambda output: output if isinstance(output, Tensor) else output[0].float() * output[1],
    tolerances={"fp8": 6e-2},  # of e4m3 in and out
)


def upsample_conv(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """Nearest 2x up-sampling, then a 3 x 3 convolution: [T, C, H, W] -> [T, O, 2 H, 2 W]."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), w, bias, padding=1)


def downsample_conv(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """A row and a column of zeros added, then a 3 x 3 convolution of stride 2: [T, C, H, W] -> [T, O, H / 2, W / 2]."""
    return F.conv2d(F.pad(x, (0, 1, 0, 1)), w, bias, stride=2)


def laid_out(operation: str, w: Tensor) -> Tensor:
    """Weights as the operation takes them: folded, or in channels-last memory."""
    last = torch.channels_last
    return fold_upsampling(w) if operation == "upsample_conv" else w.contiguous(memory_format=last)


def ours_resampling(operation: str, form: str) -> Backend:
    """One form of kernels/resample_conv.py, as it is tuned; weights are laid out beforehand."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, launch: Launch | None = None) -> Tensor:
        choice = Choice(form, launch) if launch else conv.tuned(operation, x, len(bias), (form,)) or Choice(form, {})
        return resample_conv.launch(operation, x, weight, bias, choice)

    def prepare(x: Tensor, w: Tensor, bias: Tensor, launch: Launch | None = None) -> Call:
        return partial(run, x, laid_out(operation, w), bias, launch)

    def prepare_library(x: Tensor, w: Tensor, bias: Tensor) -> Call:
        return partial(resample_conv.FORMS[operation][form], x, laid_out(operation, w), bias)

    def launcher(x: Tensor, w: Tensor, bias: Tensor, launch: Launch | None = None) -> Tensor:
        return run(x, laid_out(operation, w), bias, launch)

    if form == "library":
        return Backend(form, prepare_library, ours=True)
    return Backend(form, prepare, True, CUDA, None, launcher, partial(resampling_space, operation))


def resampling_space(operation: str, dims: Dims) -> Iterator[dict[str, Any]]:
    """As `conv_space`; blocks of channels end with the pixel where pixels are taken by twos."""
    for launch in conv_space(False, 2, dims):
        if operation == "upsample_conv" or (dims["channels"] % launch["BLOCK_K"] == 0 and not launch["TALL"]):
            yield launch


def resampling(operation: str, function: Callable[..., Tensor], taps: float, scale: float) -> Operation:
    """A 3 x 3 convolution that doubles or halves: taps a pixel of x; scale: pixels of y for each."""
    return Operation(
        operation,
        lambda d, draw: (
            pixels(draw, d["frames"], d["channels"], d["rows"], d["columns"]),
            draw(d["outputs"], d["channels"], 3, 3, scale=(9 * d["channels"]) ** -0.5),
            draw(d["outputs"]),
        ),
        function,
        lambda d: 2.0 * taps * d["channels"] * d["outputs"] * d["frames"] * d["rows"] * d["columns"],
        lambda d, item: (
            item * (d["frames"] * d["rows"] * d["columns"] * (d["channels"] + scale * d["outputs"]))
            + 9.0 * item * d["channels"] * d["outputs"]
        ),
        {
            dtype: (
                *((ours_resampling(operation, "gluon"),) if dtype == "bf16" else ()),
                ours_resampling(operation, "library"),
                Backend("torch", once(function)),
                Backend("torch-compiled", compiled(function), devices=CUDA),
            )
            for dtype in ("fp32", "bf16")
        },
    )


# As four phases of 2 x 2 taps on the small image; nine taps on the large one would be 9 / 4 of it.
UPSAMPLE_CONV = resampling("upsample_conv", upsample_conv, 16, 4)
DOWNSAMPLE_CONV = resampling("downsample_conv", downsample_conv, 9 / 4, 1 / 4)

# --- The whole VAE --------------------------------------------------------------------------------------------------


def vae_of(config: VAEConfig, values: Tensor) -> VAE:
    """A VAE whose weights are the normal `values`, scaled so that what passes through keeps its size."""
    with torch.device("meta"):
        vae = VAE(config)
    vae.to_empty(device=values.device).to(values.dtype)
    taken = 0
    for name, parameter in vae.named_parameters():
        own = values[taken : taken + parameter.numel()].view_as(parameter)
        taken += parameter.numel()
        if name.endswith("weight"):
            parameter.data = own * (parameter.numel() / len(parameter)) ** -0.5
        else:
            parameter.data = (1 if name.endswith("gamma") else 0) + 0.1 * own
    return vae


@cache
def vae_size(config: VAEConfig, half: str | None = None) -> int:
    """Numbers in its parameters, or in those that one half of it uses."""
    used = {None: "", "decode": ("conv2.", "decoder."), "encode": ("encoder.", "conv1.")}[half]
    with torch.device("meta"):
        return sum(parameter.numel() for name, parameter in VAE(config).named_parameters() if name.startswith(used))


@cache
def vae_flops(config: VAEConfig, half: str, frames: int, rows: int, columns: int) -> float:
    """Of the published form: zero frames and doubled images are multiplied."""
    with torch.device("meta"), published.published(), FlopCounterMode(display=False) as counter:
        coded(half, VAE(config), torch.empty(frames, config.z_dim if half == "decode" else 3, rows, columns))
    return counter.get_total_flops()


def vae_bytes(config: VAEConfig, half: str, dims: Dims, item: int) -> float:
    """Of latents, frames and weights, once."""
    time, area = config.temporal_stride, config.spatial_stride**2
    count, size = dims["frames"], dims["rows"] * dims["columns"]
    if half == "decode":
        latents, frames = count * size, (1 + time * (count - 1)) * size * area
    else:
        latents, frames = (1 + (count - 1) // time) * size // area, count * size
    return item * (vae_size(config, half) + config.z_dim * latents + 3.0 * frames)


def coded(half: str, vae: VAE, x: Tensor) -> Tensor:
    """Frames of latents, or latents of frames, step by step."""
    return torch.cat(list(getattr(vae, half)(x)))


def whole_vae(config: VAEConfig, half: str) -> Operation:
    """`VAE.decode` or `VAE.encode` of a clip."""
    decodes = half == "decode"

    def inputs(d: Dims, draw: Draw) -> tuple[Tensor, Tensor]:
        x = draw(d["frames"], config.z_dim if decodes else 3, d["rows"], d["columns"])
        return x if decodes else (0.3 * x).clamp(-1, 1), draw(vae_size(config))

    def prepare_ours(levels: Sequence[int], x: Tensor, values: Tensor) -> Call:
        vae = vae_of(config, values)
        vae.lay_out()
        vae.quantize(levels)
        return partial(coded, half, vae, x)

    def as_published(vae: VAE, x: Tensor) -> Tensor:
        with published.published():
            return coded(half, vae, x)

    def reference(x: Tensor, values: Tensor) -> Tensor:
        return as_published(vae_of(config, values), x)

    @cache
    def compiled_vae(device: torch.device, dtype: torch.dtype) -> VAE:
        vae = VAE(config).to(device, dtype)
        (vae.decoder if decodes else vae.encoder).compile(dynamic=False)
        return vae

    def prepare_compiled(x: Tensor, values: Tensor) -> Call:
        # One module for all sets of inputs, with the last one's weights: compiling takes a minute.
        vae = compiled_vae(x.device, x.dtype)
        vae.load_state_dict(vae_of(config, values).state_dict())
        return partial(as_published, vae, x)

    # Only the decoder has levels in FP8.
    in_fp8 = (Backend("ours-fp8", partial(prepare_ours, FP8_LEVELS), True, CUDA),) if decodes else ()
    return Operation(
        f"vae_{half}",
        inputs,
        reference,
        lambda d: vae_flops(config, half, d["frames"], d["rows"], d["columns"]),
        partial(vae_bytes, config, half),
        {
            dtype: (
                Backend("ours", partial(prepare_ours, ()), ours=True),
                *(in_fp8 if dtype == "bf16" else ()),
                Backend("published", lambda x, values: partial(as_published, vae_of(config, values), x)),
                Backend("published-compiled", prepare_compiled, devices=CUDA),
            )
            for dtype in ("fp32", "bf16")
        },
        # Twice what was seen on a CPU, widths 32 and 96: sixty layers in bf16 0.016 and 0.0094, a level in FP8 0.036.
        tolerances={"bf16": 0.07 if decodes else 0.02},
    )


# --- Shapes ---------------------------------------------------------------------------------------------------------


def tile_grid(world: int, rows: int, columns: int) -> tuple[int, int]:
    """Into how many rows and columns of equal tiles `world` GPUs split a latent, as square as can be."""
    ways = [
        (g, world // g) for g in range(1, world + 1) if world % g == 0 and rows % g == 0 and columns % (world // g) == 0
    ]
    if not ways:
        raise ValueError(f"world: {world} GPUs cannot split {rows} x {columns} evenly")
    return min(ways, key=lambda way: abs(rows / way[0] - columns / way[1]))


def student_shapes(config: Config, world: int, tag: str) -> Iterator[tuple[Operation, Shape]]:
    """The student's operations on one of `world` GPUs: heads split inside self-attention, tokens everywhere else."""
    dit = config.dit
    tokens, per_frame = math.prod(config.grid), math.prod(config.grid[1:])
    rows, layers = tokens // world, dit.num_layers * config.chunk.sample_steps

    def shape(calls: int, suffix: str = "", /, **dims: int) -> Shape:
        return Shape(tag + suffix, dims, world, calls * layers)

    heads = {"heads": dit.num_heads, "channels": dit.head_dim}
    yield SELF_ATTENTION, shape(1, queries=tokens, keys=tokens, heads=dit.num_heads // world, channels=dit.head_dim)
    text_image = {"queries": rows, "text": dit.text_len, "image": dit.img_tokens, **heads}
    yield TEXT_IMAGE_ATTENTION, shape(1, collapsed=0, **text_image)
    yield TEXT_IMAGE_ATTENTION, shape(0, "-prompt", collapsed=1, **text_image)
    audio = {"queries": rows, "per_frame": per_frame, "keys": dit.context_tokens, **heads}
    yield FRAME_ATTENTION, shape(1, **audio)
    yield AUDIO_ATTENTION, shape(0, **audio)  # its linear layers and attention are counted as such
    wide, narrow = dit.ffn_dim, dit.dim
    # Output projections and queries of three attentions: o; cross q, o; audio q, o.
    for name, calls, inputs, outputs in (
        ("qkv", 1, narrow, 3 * narrow), ("out", 5, narrow, narrow), ("up", 1, narrow, wide), ("down", 1, wide, narrow)
    ):  # fmt: skip
        yield LINEAR, shape(calls, f"-{name}", rows=rows, inputs=inputs, outputs=outputs)
    # Whole sequences, of which the linear layer and the passes around it are parts: no calls of their own.
    for name, inputs, outputs, gelu in (("qkv", narrow, 3 * narrow, 0), ("up", narrow, wide, 1)):
        yield NORM_LINEAR, shape(0, f"-{name}", rows=rows, inputs=inputs, outputs=outputs, gelu=gelu)
    for name, inputs, quantised in (("out", narrow, 0), ("down", wide, 1)):
        yield LINEAR_RESIDUAL, shape(0, f"-{name}", rows=rows, inputs=inputs, outputs=narrow, quantised=quantised)
    yield LAYER_NORM_MODULATE, shape(4, rows=rows, columns=narrow)  # two modulated, two affine ones
    yield RMS_NORM_ROPE, shape(1, tokens=rows, **heads)
    yield QUANTIZE_QKV, shape(0, tokens=rows, **heads)
    if world == 1:
        yield NORM_ATTENTION, shape(0, tokens=rows, **heads)
    yield QUANTIZE_ROWS, shape(0, "-narrow", rows=rows, columns=narrow)
    yield QUANTIZE_ROWS, shape(0, "-wide", rows=rows, columns=wide)
    if world > 1:  # ring attention: a rank's queries, everybody's keys
        yield SELF_ATTENTION, shape(0, "-ring", queries=rows, keys=tokens, **heads)


def vae_shapes(config: Config, world: int, tag: str) -> Iterator[tuple[Operation, Shape]]:
    """The VAE's operations at the decoder's four levels, on one tile of the picture; and on one GPU all of them.

    Calls are frames over frames a call, decode of a chunk and re-encode of its motion frames together; a level's
    first convolution, which may have other input channels, counts as one of the rest. Convolutions of several latents
    at a time, where the decoder takes them so, are a shape of their own.
    """
    vae, chunk = config.vae, config.chunk
    latents, _, rows, columns = config.latent_shape
    down, right = tile_grid(world, rows, columns)
    frames, scale = 1, 1
    widths = [vae.dim * mult for mult in reversed(vae.dim_mult)]
    temporal = (*reversed(vae.temperal_downsample), False)
    motion = (chunk.motion_frames_num - 1) // vae.temporal_stride
    groups = decode_groups(latents, chunk.unseen_frames, vae.temporal_stride)
    sizes = [group.latents.stop - group.latents.start for group in groups]
    for level, (width, doubles) in enumerate(zip(widths, temporal, strict=True)):
        decoded, encoded = (1 / frames + latents - 1), (1 / frames + motion)
        middle = 4 if level == 0 else 0
        together = sizes.count(TOGETHER) if any(temporal[level:]) else 0
        convolutions = 2 * (vae.num_res_blocks + 1) + middle
        in_pairs = convolutions * together
        convolutions = convolutions * (decoded - TOGETHER * together) + (2 * vae.num_res_blocks + middle) * encoded
        name = f"{tag}-level{level}"
        dims = {"frames": frames, "channels": width, "rows": rows * scale // down, "columns": columns * scale // right}
        yield CAUSAL_CONV3D, Shape(name, dims | {"outputs": width}, world, convolutions)
        if in_pairs:
            pair = dims | {"frames": TOGETHER * frames, "outputs": width}
            yield CAUSAL_CONV3D, Shape(f"{name}-pair", pair, world, in_pairs)
        yield NORM_SILU, Shape(name, dims, world, convolutions)
        if width <= WIDEST:  # half of the two above, together: no calls of its own
            yield CONV_NORM, Shape(name, dims | {"outputs": width}, world)
        if level == 0:
            tokens = dims["rows"] * dims["columns"]
            one = {"queries": tokens, "keys": tokens, "heads": 1, "channels": width}
            yield WIDE_ATTENTION, Shape(name, one, world, decoded + encoded)
        if level + 1 < len(widths):
            frames *= 2 if doubles else 1
            if doubles:
                yield TIME_CONV, Shape(name, dims | {"outputs": 2 * width}, world, latents - 1)
            up = dims | {"frames": frames, "outputs": width // 2}
            yield UPSAMPLE_CONV, Shape(name, up, world, 1 / frames + latents - 1)
            scale *= 2
            large = {"frames": frames, "rows": 2 * dims["rows"], "columns": 2 * dims["columns"]}
            own = {"channels": widths[level + 1], "outputs": widths[level + 1]}
            yield DOWNSAMPLE_CONV, Shape(name, large | own, world, 1 / frames + motion)
        else:
            ends = {k: v for k, v in dims.items() if k not in ("frames", "channels")}
            yield CAUSAL_CONV3D, Shape(f"{tag}-head", dims | {"outputs": 3}, world, decoded)
            shown = Shape(tag, ends | {"frames": frames}, world, chunk.new_frames / frames)
            yield LAB_TRANSFER, shown
    if world == 1:
        # Three latents: a clip's first, its second, and one like all that follow.
        yield whole_vae(vae, "decode"), Shape(tag, {"frames": 3, "rows": rows, "columns": columns})
        pictures = {"frames": chunk.motion_frames_num, "rows": chunk.height, "columns": chunk.width}
        yield whole_vae(vae, "encode"), Shape(tag, pictures)


@dataclass(frozen=True)
class Family:
    """How a preset is measured: its tag in shape names, its world sizes, its dtypes (or those an operation has)."""

    tag: str
    worlds: tuple[int, ...]
    dtypes: tuple[str, ...]


DEFAULTS = {"cuda": ["*/14b-*"], "cpu": ["*/tiny-w1*"]}  # the cases made for a device

FAMILIES = {
    "tiny": Family("tiny", (1, 2), ("fp32",)),
    "flashtalk-14b": Family("14b", (1, 2, 4, 8), ("bf16", "fp8")),
}


def preset_cases(preset: str) -> Iterator[Case]:
    """All cases of a preset, at every world size it is measured at."""
    config, family = PRESETS[preset], FAMILIES[preset]
    for world in family.worlds:
        tag = f"{family.tag}-w{world}"
        for operation, shape in (*student_shapes(config, world, tag), *vae_shapes(config, world, tag)):
            for dtype in [d for d in family.dtypes if d in operation.backends] or list(operation.backends):
                yield Case(operation, shape, dtype, operation.tolerances.get(dtype, TOLERANCES[dtype]))


def own_cases(file: Path) -> list[Case]:
    """The `CASES` of a Python file: work in progress, tests. Raises `UserError` if it gives none, or one name twice."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is no result
            cases = list(runpy.run_path(str(file))["CASES"])
    except Exception as error:  # a file of the user's may raise anything
        raise UserError(f"--cases {file} gives no CASES: {type(error).__name__} {error}") from error
    for case in cases:
        if not isinstance(case, Case):
            raise UserError(f"--cases {file}: CASES holds {case!r:.60}, wanted profiling.cases.Case")
        if twice := _twice(backend.name for backend in case.backends):
            raise UserError(f"--cases {file}: {case.name} has two back-ends called {twice}")
    if twice := _twice(case.name for case in cases):
        raise UserError(f"--cases {file}: two cases are called {twice}")
    return cases


def _twice(names: Iterable[str]) -> str | None:
    """The first name that comes a second time."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def registry(extra: Path | None = None) -> dict[str, Case]:
    """All cases by name, with those of the Python file `extra`; raises `UserError` if it has a name of ours."""
    cases = {case.name: case for preset in FAMILIES for case in preset_cases(preset)}
    for case in own_cases(extra) if extra else ():
        if case.name in cases:
            raise UserError(f"--cases {extra}: the registry has a {case.name} of its own")
        cases[case.name] = case
    return cases


def chosen(patterns: Sequence[str], device: torch.device, extra: Path | None) -> list[Case]:
    """What a command on that device is asked for; without patterns `extra`'s own, or else those made for the device."""
    if extra is not None and not patterns:
        return own_cases(extra)
    return select(registry(extra), patterns or DEFAULTS[device.type], DEFAULTS[device.type])


def select(cases: Mapping[str, Case], patterns: Sequence[str], preferred: Sequence[str] = ()) -> list[Case]:
    """Those whose name matches one of the shell patterns; a pattern without a wildcard may be a part of the name.

    Such a part means cases that match `preferred`, patterns of those made for the device, if there are any: no one asks
    a CPU for the shapes of eight GPUs by naming an operation.

    Raises `UserError` for a pattern that matches none, with the names nearest to it.
    """
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        if any(c in pattern for c in "*?["):
            names = fnmatch.filter(cases, pattern)
        else:
            names = [name for name in cases if pattern in name]
            near = [name for name in names if any(fnmatch.fnmatch(name, p) for p in preferred)]
            names = near if near and pattern not in names else names
        if not names:
            close = ", ".join(difflib.get_close_matches(pattern, cases, n=3, cutoff=0.3)) or "none"
            raise UserError(f"there is no case {pattern}; nearest: {close} (bench --list names all)")
        chosen |= {name: cases[name] for name in names}
    return list(chosen.values())
