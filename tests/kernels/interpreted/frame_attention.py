"""The Triton kernel as frame attention launches it, against its reference in float64."""

# pyright: reportCallIssue=false, reportArgumentType=false

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.frame_attention import frame_reference, launch_frame
from profiling.measure.check import poisoned_memory


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that a kernel does not write is NaN."""
    with poisoned_memory():
        yield


def error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm()).item()


def draw(*shapes: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@settings(max_examples=20)
@given(
    st.integers(1, 50), st.integers(1, 20), st.integers(0, 45), st.sampled_from([1, 5, 16, 32, 64]), st.integers(0, 99)
)
def test_frames(tokens, tokens_per_frame, first_token, keys, seed):
    frames = -(-(first_token + tokens) // tokens_per_frame)
    q, k, v = draw((tokens, 2, 16), (frames, keys, 2, 16), (frames, keys, 2, 16), seed=seed)
    expected = frame_reference(q.double(), k.double(), v.double(), tokens_per_frame, first_token)
    assert error(launch_frame(q, k, v, tokens_per_frame, first_token), expected) < 1e-5
