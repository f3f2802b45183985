"""Attention to text and image: on the CPU, as a torch operator, and on a GPU.

`interpreted/text_image_attention.py` runs the kernel in Triton's interpreter.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.chunk_attention import reference as attention_reference
from kernels.text_image_attention import text_image_attention, text_image_attention_op, text_image_reference
from profiling.measure.check import poisoned_memory
from tests.tensors import draw, error


def text_image(
    tokens: int, num_text_tokens: int, text: int, image: int, heads: int = 2, head_dim: int = 64, **options: Any
) -> tuple[list[Tensor], Tensor]:
    """Operands whose text keys are equal from `num_text_tokens` on, and that number as a tensor."""
    lengths = (tokens, num_text_tokens + 1, num_text_tokens + 1, image, image)
    q, k, v, image_k, image_v = draw(*[(n, heads, head_dim) for n in lengths], **options)
    padding = text - num_text_tokens
    k, v = (torch.cat((x[:num_text_tokens], x[num_text_tokens:].expand(padding, -1, -1))) for x in (k, v))
    return [q, k, v, image_k, image_v], torch.tensor([num_text_tokens], dtype=torch.int32, device=q.device)


# --- On the CPU -----------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 20), st.integers(1, 40))
def test_text_image(tokens, num_text_tokens, padding, image):
    operands, count = text_image(tokens, num_text_tokens, num_text_tokens + padding, image)
    expected = text_image_reference(*(x.double() for x in operands))
    assert error(text_image_attention(*operands, count), expected) < 1e-5
    assert error(text_image_attention(*operands), expected) < 1e-5


def test_two_softmaxes_are_not_one():
    operands, _ = text_image(5, 4, 6, 7)
    q, k, v, image_k, image_v = operands
    one = attention_reference(q, torch.cat((k, image_k)), torch.cat((v, image_v)))[0]
    assert error(text_image_attention(*operands), one) > 0.1


# --- As a torch operator --------------------------------------------------------------------------------------------


def test_opcheck():
    operands, count = text_image(5, 4, 6, 7)
    torch.library.opcheck(text_image_attention_op.library_op, (*operands, count))
    torch.library.opcheck(text_image_attention_op.library_op, (*operands, None))


def test_compiles_without_a_graph_break():
    operands, count = text_image(5, 4, 6, 7)
    whole = torch.compile(text_image_attention, fullgraph=True)
    torch.testing.assert_close(whole(*operands, count), text_image_attention(*operands, count))


Q, K = torch.zeros(6, 2, 16), torch.zeros(4, 2, 16)
STRIDED_HEADS = torch.zeros(4, 4, 16)[:, ::2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((Q, K, K[:3], K, K), "text_v: shape [3, 2, 16], wanted [4, 2, 16]"),
        ((Q, K, K, K[:, :1], K[:, :1]), "image_k: shape [4, 1, 16], wanted [image keys, 2, 16]"),
        ((Q, K[:0], K[:0], K, K), "text_k: shape [0, 2, 16], wanted [text keys, 2, 16]"),
        ((Q[:0], K, K, K, K), "q: shape [0, 2, 16], wanted [tokens, heads, head_dim]"),
        ((Q.double(), K, K, K, K), "q: torch.float64, wanted torch.float32"),
        ((Q, K.half(), K, K, K), "text_k: torch.float16, wanted torch.float32"),
        ((Q, K, K, K.to("meta"), K), "image_k: on meta, wanted cpu"),
        ((Q, K, STRIDED_HEADS, K, K), "text_v: heads 32 apart, wanted 16 as in text_k"),
        ((Q, K, K, K, K, torch.tensor([1])), "num_text_tokens: torch.int64, wanted torch.int32"),
        ((Q, K, K, K, K, torch.zeros(2).int()), "num_text_tokens: shape [2], wanted [1]"),
        ((Q.clone().requires_grad_(), K, K, K, K), "q: requires a gradient"),
        ((Q.transpose(1, 2).contiguous().transpose(1, 2), K, K, K, K), "q: strides (32, 1, 2) for shape [6, 2, 16]"),
    ],
)
def test_bad_arguments(arguments: Any, words: str):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        text_image_attention(*arguments)
    assert words in str(raised.value)


# --- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "num_text_tokens", "text", "image"), [(1, 1, 1, 1), (300, 20, 512, 257), (129, 512, 512, 64)]
)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)])
def test_gpu_text_image(tokens, num_text_tokens, text, image, head_dim, dtype, bound):
    count = min(num_text_tokens, text - 1)
    operands, count = text_image(tokens, count, text, image, 3, head_dim, dtype=dtype, device="cuda")
    expected = text_image_reference(*(x.double() for x in operands))
    with poisoned_memory():
        assert error(text_image_attention(*operands, count), expected) < bound
        assert error(text_image_attention(*operands), expected) < bound
