"""The Triton kernel of the causal convolution against its definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.conv import launch_triton, reference
from profiling.bench import poisoned_memory

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}


@pytest.fixture(autouse=True)
def _poisoned():
    """What is not written is NaN."""
    with poisoned_memory():
        yield


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(3, 3), (3, 1), (1, 3), (1, 1)]), st.integers(1, 3), st.sampled_from([1, 3, 5, 16, 17, 33]),
    st.sampled_from([1, 3, 5, 17, 33]), st.integers(1, 5), st.integers(1, 5), st.sampled_from([0, 1, 2]), st.booleans(),
    st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_kernel_and_length_of_the_past(kernel, frames, inputs, outputs, rows, columns, before, biased, added,
                                           scaled, seed):  # fmt: skip
    """Sizes of one pixel, channels that no tile divides, no, one or two frames before."""
    torch.manual_seed(seed)
    kt, k = kernel
    before = min(before, kt - 1)
    x, past = channels_last(frames, inputs, rows, columns), channels_last(before, inputs, rows, columns)
    weight, scale = torch.randn(outputs, inputs, kt, k, k), torch.rand(outputs) if scaled else None
    bias, residual = torch.randn(outputs), channels_last(frames, outputs, rows, columns)
    given = (x, past, weight, bias if biased else None, residual if added else None, scale)
    y = launch_triton(*given, launch=SMALL)
    zeros = torch.zeros(kt - 1 - before, inputs, rows, columns)
    filters = weight.double() * (1 if scale is None else scale.double().view(-1, 1, 1, 1, 1))
    expected = reference(x.double(), filters, bias.double() * biased, torch.cat([zeros, past]).double())
    expected = expected + residual.double() * added
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    padded = torch.cat([zeros, past]).contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, launch_triton(x, padded, *given[2:], launch=SMALL))  # zeros before are none


@settings(deadline=None, max_examples=8)
@given(
    st.sampled_from([(3, 3), (3, 1)]), st.lists(st.integers(1, 3), min_size=2, max_size=4), st.integers(1, 5),
    st.integers(1, 5), st.integers(0, 99),
)  # fmt: skip
def test_pieces_equal_the_whole_bit_for_bit(kernel, lengths, rows, columns, seed):
    """However a clip is cut, every sum is of the same products.

    Of whole numbers: their sums are exact in any order, and the interpreter's library orders them as it likes.
    """
    torch.manual_seed(seed)
    weight, bias = torch.randn(5, 17, kernel[0], kernel[1], kernel[1]).mul(4).round(), torch.randn(5).round()
    clip = channels_last(sum(lengths), 17, rows, columns).mul(4).round()
    pieces, end = [], 0
    for length in lengths:
        past, x = clip[max(0, end - 2) : end], clip[end : end + length]  # of 0, 1 or 2 frames
        pieces.append(launch_triton(x, past, weight, bias, None, launch=SMALL))
        end += length
    assert torch.equal(torch.cat(pieces), launch_triton(clip, clip[:0], weight, bias, None, launch=SMALL))
