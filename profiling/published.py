"""The student as published code runs it: PyTorch's operations wherever model/ calls those of kernels/.

The baseline that whole chunks are held to. Under torch.compile its norms, rotation and residuals are fused, as anyone
would have it; attention is PyTorch's, audio's projections are not folded.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from torch import Tensor

from model import dit, linear
from model.dit import rotate


@contextmanager
def published() -> Iterator[None]:
    """While the body runs, the student computes by PyTorch alone."""
    with ExitStack() as stack:
        for module, functions in _FORMS.items():
            for function in functions:
                stack.enter_context(patch.object(module, function.__name__, function))
        yield


def rms_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `kernels.norm.rms_norm_rope`."""
    q, k = (
        rotate(F.rms_norm(x.flatten(1), weight.shape, weight, eps).unflatten(1, x.shape[1:]), rope)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return q, k


def chunk_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `kernels.attention.chunk_attention`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


def text_image_attention(
    q: Tensor, text_k: Tensor, text_v: Tensor, image_k: Tensor, image_v: Tensor, _real: Tensor
) -> Tensor:
    """As `kernels.cross_attention.text_image_attention`; all keys, padding too."""
    return chunk_attention(q, text_k, text_v) + chunk_attention(q, image_k, image_v)


def frame_attention(q: Tensor, k: Tensor, v: Tensor, per_frame: int, first: int = 0) -> Tensor:
    """As `kernels.cross_attention.frame_attention`: the frames are a batch."""
    q = F.pad(q, (0, 0, 0, 0, first, 0)).unflatten(0, (len(k), per_frame))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)[first:]


def fold_audio(
    k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, weight: Tensor, *_no_scales: None
) -> tuple[Any, Any, Any]:
    """Folds nothing: what `folded_attention` needs."""
    return (k, v), (q_weight, q_bias), weight


def folded_attention(
    z: Tensor, keys: Any, before: Any, after: Tensor, _group: int, per_frame: int, first: int = 0
) -> Tensor:
    """Projection, attention, projection."""
    k, v = keys
    q = F.linear(z, *before).unflatten(1, k.shape[2:])
    return F.linear(frame_attention(q, k, v, per_frame, first).flatten(1), after)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `kernels.norm.layer_norm`."""
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """As `kernels.norm.layer_norm_modulate`."""
    return (F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


_FORMS = {
    dit: (
        rms_norm_rope,
        chunk_attention,
        text_image_attention,
        frame_attention,
        fold_audio,
        folded_attention,
        layer_norm,
        layer_norm_modulate,
    ),
    linear: (layer_norm, layer_norm_modulate),
}
