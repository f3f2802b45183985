"""The Triton kernel of attention to text and image against its reference in float64."""

# pyright: reportCallIssue=false, reportArgumentType=false

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.text_image_attention import launch_text_image, text_image_reference
from tests.tensors import draw, error

EXAMPLES = settings(max_examples=20)
POINTERS = st.sampled_from([0, 1])  # else descriptors


@EXAMPLES
@given(
    st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 2, 32, 33, 34, 65, 67]), st.integers(1, 3),
    st.sampled_from([16, 64]), POINTERS, st.integers(0, 99),
)  # fmt: skip
def test_text_image(tokens, text, image, heads, head_dim, pointers, seed):
    operands = draw(*[(n, heads, head_dim) for n in (tokens, text, text, image, image)], seed=seed)
    o = launch_text_image(*operands, config={"POINTERS": pointers})
    assert error(o, text_image_reference(*(x.double() for x in operands))) < 1e-5


@EXAMPLES
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), POINTERS, st.integers(0, 99))
def test_deduplicated_padding(tokens, num_text_tokens, padding, pointers, seed):
    lengths = (tokens, num_text_tokens + 1, num_text_tokens + 1, 33, 33)
    q, k, v, image_k, image_v = draw(*[(n, 2, 16) for n in lengths], seed=seed)
    k, v = (torch.cat((x[:num_text_tokens], x[num_text_tokens:].expand(padding, -1, -1))) for x in (k, v))
    operands = q, k, v, image_k, image_v
    count = torch.tensor([num_text_tokens], dtype=torch.int32)
    o = launch_text_image(*operands, count, config={"POINTERS": pointers})
    assert error(o, text_image_reference(*(x.double() for x in operands))) < 1e-5


@EXAMPLES
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 70), st.integers(0, 99))
def test_factors_of_rows(tokens, text, image, seed):
    operands = draw(*[(n, 2, 16) for n in (tokens, text, text, image, image)], seed=seed)
    (q_scale,) = draw((tokens,), seed=seed)
    q_scale.abs_()
    expected = text_image_reference(*(x.double() for x in operands), None, q_scale.double())
    assert error(launch_text_image(*operands, None, q_scale), expected) < 1e-5


@pytest.mark.parametrize("pointers", [0, 1])
def test_views_are_read_without_a_copy(pointers):
    q = draw((2, 21, 16), seed=0)[0].transpose(0, 1)
    text, image = draw((9, 2, 2, 16), (33, 2, 2, 16), seed=1)
    operands = q, text[:, 0], text[:, 1], image[:, 0], image[:, 1]
    o = launch_text_image(*operands, config={"POINTERS": pointers})
    assert error(o, text_image_reference(*(x.double() for x in operands))) < 1e-5


def test_rows_that_tma_cannot_read():
    """Neither the addresses nor the strides between tokens are multiples of 16 bytes."""
    q, *keys = draw((21, 2, 16), (9, 133), (9, 133), (33, 133), (33, 133), seed=0)
    operands = q, *(x[:, 1:33].unflatten(1, (2, 16)) for x in keys)
    assert error(launch_text_image(*operands), text_image_reference(*(x.double() for x in operands))) < 1e-5


def test_extreme_logits_stay_finite():
    operands = [x * 100 for x in draw(*[(n, 1, 16) for n in (20, 5, 5, 33, 33)], seed=0)]
    o = launch_text_image(*operands)
    assert o.isfinite().all()
    assert error(o, text_image_reference(*(x.double() for x in operands))) < 1e-3
