"""Audio cross-attention: the tokens of each latent frame attend to the audio keys of that frame.

    o[i] = softmax(q[i] k[f]^T / sqrt(head_dim)) v[f]        f is the latent frame of token i

On GPUs it uses the Triton kernel of kernels/chunk_attention.py, with one key range for each frame.

Source: SingleStreamAttention of SoulX-FlashTalk.
"""

# Launch parameters are constants to Triton, plain numbers to Python.
# pyright: reportArgumentType=false

import torch
import triton
from torch import Tensor

from kernels.chunk_attention import launch_triton, sdpa
from kernels.chunk_attention import reference as attention_reference
from kernels.common import DTYPE_NAMES, check, define_op
from kernels.scheduler import KVRanges
from kernels.tuning import LaunchConfig, launch_config, tuned_config

# Launch parameters where nothing was tuned. BLOCK_N follows from the number of keys of a frame.
FP32_CONFIG: LaunchConfig = {"BLOCK_M": 32, "num_warps": 4, "num_stages": 2}
BF16_CONFIG: LaunchConfig = {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1}


# --- Reference ------------------------------------------------------------------------------------------------------


def frame_kv_ranges(tokens: int, keys_per_frame: int, tokens_per_frame: int, first_token: int) -> KVRanges:
    """The keys, counted over all frames, that tokens from `first_token` of a chunk on attend to."""
    first_frame, last_frame = first_token // tokens_per_frame, (first_token + tokens - 1) // tokens_per_frame
    return tuple(
        (
            max(0, frame * tokens_per_frame - first_token),
            min(tokens, (frame + 1) * tokens_per_frame - first_token),
            frame * keys_per_frame,
            (frame + 1) * keys_per_frame,
        )
        for frame in range(first_frame, last_frame + 1)
    )


def frame_reference(q: Tensor, k: Tensor, v: Tensor, tokens_per_frame: int, first_token: int = 0) -> Tensor:
    """`frame_attention` by definition, in q's precision, with the same arguments."""
    ranges = frame_kv_ranges(len(q), k.shape[1], tokens_per_frame, first_token)
    return attention_reference(q, k.flatten(0, 1), v.flatten(0, 1), ranges)[0]


# --- Launcher -------------------------------------------------------------------------------------------------------


def launch_frame(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    first_token: int = 0,
    config: LaunchConfig | None = None,
) -> Tensor:
    """`frame_attention` by the Triton kernel of `chunk_attention`; `config` replaces default launch parameters."""
    keys_per_frame = k.shape[1]
    parameters = launch_config(
        "frame_attention", _dims(q, k, tokens_per_frame), DTYPE_NAMES[q.dtype], q.device,
        default=FP32_CONFIG if q.dtype == torch.float32 else BF16_CONFIG, given=config, match_exactly=("head_dim",),
    )  # fmt: skip
    parameters["BLOCK_N"] = min(128, max(16, triton.next_power_of_2(keys_per_frame)))
    ranges = frame_kv_ranges(len(q), keys_per_frame, tokens_per_frame, first_token)
    k, v = (x.flatten(0, 1)[None] for x in (k, v))
    return launch_triton(q[None], k, v, None, ranges, q.shape[2] ** -0.5, q.dtype, parameters)[0][0]


def _dims(q: Tensor, k: Tensor, tokens_per_frame: int) -> dict[str, int]:
    queries, heads, head_dim = q.shape
    return {
        "queries": queries,
        "tokens_per_frame": tokens_per_frame,
        "keys": k.shape[1],
        "heads": heads,
        "head_dim": head_dim,
    }


# --- Operation ------------------------------------------------------------------------------------------------------


def _frames_as_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention of whole frames."""
    return sdpa(q.unflatten(0, (len(k), -1)), k, v).flatten(0, 1)


def _frame_cpu(q: Tensor, k: Tensor, v: Tensor, tokens_per_frame: int, first_token: int) -> Tensor:
    if len(q) == len(k) * tokens_per_frame:
        return _frames_as_batch(q, k, v)
    outputs = [
        sdpa(q[None, start:end], k[None, frame], v[None, frame])[0]
        for start, end, frame, _ in frame_kv_ranges(len(q), 1, tokens_per_frame, first_token)
    ]
    return torch.cat(outputs)


def _frame_cuda(q: Tensor, k: Tensor, v: Tensor, tokens_per_frame: int, first_token: int) -> Tensor:
    tuned = tuned_config("frame_attention", _dims(q, k, tokens_per_frame), DTYPE_NAMES[q.dtype], q.device)
    if len(q) == len(k) * tokens_per_frame and tuned is not None and tuned.backend.startswith("sdpa"):
        return _frames_as_batch(q, k, v)
    return launch_frame(q, k, v, tokens_per_frame, first_token)


# The fake is written out because key ranges are computed from numbers, which symbolic shapes are not.
frame_attention_op = define_op(
    "frame_attention", cpu=_frame_cpu, cuda=_frame_cuda, fake=lambda q, *_: q.new_empty(q.shape)
)


def frame_attention(q: Tensor, k: Tensor, v: Tensor, tokens_per_frame: int, first_token: int = 0) -> Tensor:
    """Attention of each token to the keys of its latent frame f: softmax(q k[f]^T / sqrt(head_dim)) v[f].

    Args:
        q: [tokens, heads, head_dim], contiguous along head_dim; float32, float16 or bfloat16. Consecutive tokens of a
            chunk, which may begin and end inside a frame, as with sequence parallelism.
        k: [frames, keys, heads, head_dim], contiguous along head_dim, with the keys of all frames evenly spaced in
            memory; q's dtype and device. Frame 0 is the frame of token 0 of the chunk.
        v: like k.
        tokens_per_frame: number of tokens of a latent frame.
        first_token: which token of the chunk is the first one of q.

    Returns:
        o, contiguous, with the shape and dtype of q.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device, stride or value, or requires a gradient.
    """
    check("q", q, shape=("tokens", "heads", "head_dim"), dtype=DTYPE_NAMES, layout="rows")
    check("k", k, shape=("frames", "keys", *q.shape[1:]), dtype=q.dtype, device=q.device, layout="rows")
    check("v", v, shape=k.shape, dtype=q.dtype, device=q.device, layout="rows")
    check_frames("k", len(k), len(q), tokens_per_frame, first_token)
    for name, x in (("k", k), ("v", v)):
        if len(x) > 1 and x.stride(0) != x.shape[1] * x.stride(1):
            raise ValueError(f"{name}: strides {x.stride()}, wanted frames {x.shape[1] * x.stride(1)} apart")
    return frame_attention_op(q, k, v, tokens_per_frame, first_token)


def check_frames(name: str, frames: int, tokens: int, tokens_per_frame: int, first_token: int) -> None:
    """Raises ValueError, in one line that begins with the argument's name, unless `frames` frames hold the tokens."""
    if tokens_per_frame < 1:
        raise ValueError(f"tokens_per_frame: {tokens_per_frame}, wanted at least 1")
    if first_token < 0:
        raise ValueError(f"first_token: {first_token}, wanted at least 0")
    token_end = first_token + tokens
    if token_end > frames * tokens_per_frame:
        raise ValueError(f"{name}: {frames} frames, tokens up to {token_end} need {-(-token_end // tokens_per_frame)}")
