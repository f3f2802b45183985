"""Attention of latent frames to their audio: on the CPU, as a torch operator, and on a GPU.

`interpreted/frame_attention.py` runs the kernel in Triton's interpreter.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.chunk_attention import reference as attention_reference
from kernels.frame_attention import frame_attention, frame_attention_op, frame_kv_ranges, frame_reference
from profiling.measure.check import poisoned_memory
from tests.tensors import draw, error

# --- On the CPU -----------------------------------------------------------------------------------------------------


def test_frame_kv_ranges():
    assert frame_kv_ranges(10, 32, 4, 0) == ((0, 4, 0, 32), (4, 8, 32, 64), (8, 10, 64, 96))
    assert frame_kv_ranges(5, 32, 4, 6) == ((0, 2, 32, 64), (2, 5, 64, 96))
    assert frame_kv_ranges(2, 32, 4, 5) == ((0, 2, 32, 64),)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 45), st.sampled_from([1, 32]))
def test_frames(tokens, tokens_per_frame, first_token, keys):
    frames = -(-(first_token + tokens) // tokens_per_frame)
    q, k, v = draw((tokens, 2, 64), (frames, keys, 2, 64), (frames, keys, 2, 64))
    expected = torch.cat(
        [
            attention_reference(
                q[i, None].double(), *(x[(first_token + i) // tokens_per_frame].double() for x in (k, v))
            )[0]
            for i in range(tokens)
        ]
    )
    assert error(frame_attention(q, k, v, tokens_per_frame, first_token), expected) < 1e-5


# --- As a torch operator --------------------------------------------------------------------------------------------


def test_opcheck():
    operands = draw((7, 2, 16), (2, 16, 2, 16), (2, 16, 2, 16))
    torch.library.opcheck(frame_attention_op.library_op, (*operands, 4, 1))


def test_compiles_without_a_graph_break():
    operands = draw((12, 2, 16), (3, 16, 2, 16), (3, 16, 2, 16))
    whole = torch.compile(frame_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*operands, 4), frame_attention(*operands, 4))


Q, K = torch.zeros(6, 2, 16), torch.zeros(3, 16, 2, 16)
UNEVEN = torch.zeros(3, 20, 2, 16)[:, :16]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((Q, K[0], K[0], 2), "k: shape [16, 2, 16], wanted [frames, keys, 2, 16]"),
        ((Q, K[:, :, :1], K, 2), "k: shape [3, 16, 1, 16], wanted [frames, keys, 2, 16]"),
        ((Q, K, K[:2], 2), "v: shape [2, 16, 2, 16], wanted [3, 16, 2, 16]"),
        ((Q, K, K, 1), "k: 3 frames, tokens up to 6 need 6"),
        ((Q, K, K, 2, 1), "k: 3 frames, tokens up to 7 need 4"),
        ((Q, K, K, 0), "tokens_per_frame: 0"),
        ((Q, K, K, 2, -1), "first_token: -1"),
        ((Q, UNEVEN, K, 2), "k: strides (640, 32, 16, 1), wanted frames 512"),
    ],
)
def test_bad_arguments(arguments: Any, words: str):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        frame_attention(*arguments)
    assert words in str(raised.value)


# --- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "tokens_per_frame", "first_token"), [(1, 1, 0), (700, 336, 100), (1512, 1344, 3024)]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)])
def test_gpu_frames(tokens, tokens_per_frame, first_token, dtype, bound):
    heads, head_dim, keys = 3, 128, 32
    frames = -(-(first_token + tokens) // tokens_per_frame)
    shape = frames, keys, heads, head_dim
    q, k, v = draw((tokens, heads, head_dim), shape, shape, dtype=dtype, device="cuda")
    with poisoned_memory():
        o = frame_attention(q, k, v, tokens_per_frame, first_token)
    assert error(o, frame_reference(q.double(), k.double(), v.double(), tokens_per_frame, first_token)) < bound
