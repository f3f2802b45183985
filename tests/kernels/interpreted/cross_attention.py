"""The kernels of attention to few keys against their definition in float64."""

# pyright: reportCallIssue=false, reportArgumentType=false

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cross_attention import (
    absorb_reference,
    absorbed_reference,
    frame_reference,
    launch_absorb,
    launch_absorbed,
    launch_frame,
    launch_text_image,
    text_image_reference,
)
from profiling.measure.check import poisoned_memory

EXAMPLES = settings(deadline=None, max_examples=20)


@pytest.fixture(autouse=True)
def _poisoned():
    """What is not written is NaN."""
    with poisoned_memory():
        yield


def error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm()).item()


def draw(*shapes: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@EXAMPLES
@given(
    st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 2, 32, 33, 34, 65, 67]), st.integers(1, 3),
    st.sampled_from([16, 64]), st.integers(0, 99),
)  # fmt: skip
def test_text_image(tokens, text, image, heads, d, seed):
    operands = draw(*[(n, heads, d) for n in (tokens, text, text, image, image)], seed=seed)
    assert error(launch_text_image(*operands), text_image_reference(*(x.double() for x in operands))) < 1e-5


@EXAMPLES
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 40), st.integers(0, 99))
def test_text_with_padding_collapsed(tokens, real, padding, seed):
    q, text_k, text_v, image_k, image_v = draw(*[(n, 2, 16) for n in (tokens, real + 1, real + 1, 33, 33)], seed=seed)
    text_k, text_v = (torch.cat((x[:real], x[real:].expand(padding, -1, -1))) for x in (text_k, text_v))
    operands = q, text_k, text_v, image_k, image_v
    count = torch.tensor([real], dtype=torch.int32)
    assert error(launch_text_image(*operands, count), text_image_reference(*(x.double() for x in operands))) < 1e-5


def test_text_image_reads_views_where_they_are():
    q = draw((2, 21, 16), seed=0)[0].transpose(0, 1)
    text, image = draw((9, 2, 2, 16), (33, 2, 2, 16), seed=1)
    operands = q, text[:, 0], text[:, 1], image[:, 0], image[:, 1]
    assert error(launch_text_image(*operands), text_image_reference(*(x.double() for x in operands))) < 1e-5


def test_extreme_logits_stay_finite():
    operands = [x * 100 for x in draw(*[(n, 1, 16) for n in (20, 5, 5, 33, 33)], seed=0)]
    o = launch_text_image(*operands)
    assert o.isfinite().all()
    assert error(o, text_image_reference(*(x.double() for x in operands))) < 1e-3


@EXAMPLES
@given(
    st.integers(1, 50), st.integers(1, 20), st.integers(0, 45), st.sampled_from([1, 5, 16, 32, 64]), st.integers(0, 99)
)
def test_frames(tokens, per_frame, first, keys, seed):
    frames = -(-(first + tokens) // per_frame)
    q, k, v = draw((tokens, 2, 16), (frames, keys, 2, 16), (frames, keys, 2, 16), seed=seed)
    expected = frame_reference(q.double(), k.double(), v.double(), per_frame, first)
    assert error(launch_frame(q, k, v, per_frame, first), expected) < 1e-5


@EXAMPLES
@given(st.integers(1, 3), st.sampled_from([16, 32]), st.integers(1, 3), st.integers(0, 99))
def test_fold(frames, keys, heads, seed):
    d, width, out = 16, 40, 24
    kv = draw((frames, keys, 2, heads, d), seed=seed)[0]
    k, v = kv.unbind(2)
    weights = draw((heads * d, width), (heads * d,), (out, heads * d), seed=seed + 1)
    folded = launch_absorb(k, v, *weights)
    expected = absorb_reference(*(x.double() for x in (k, v, *weights)))
    for x, y in zip(folded, expected, strict=True):
        assert x.shape == y.shape
        assert error(x, y) < 1e-5


def test_fold_of_scaled_weights():
    """e4m3 weights stand for themselves times the scales of their rows."""
    k, v, q_weight, q_bias, weight = draw((2, 16, 3, 16), (2, 16, 3, 16), (48, 40), (48,), (24, 48), seed=0)
    q_scale, scale = torch.rand(48) + 0.5, torch.rand(24) + 0.5
    folded = launch_absorb(k, v, q_weight, q_bias, weight, q_scale, scale)
    expected = absorb_reference(
        *(x.double() for x in (k, v, q_weight * q_scale[:, None], q_bias, weight * scale[:, None]))
    )
    for x, y in zip(folded, expected, strict=True):
        assert error(x, y) < 1e-5


@EXAMPLES
@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 45), st.integers(1, 5), st.integers(0, 99))
def test_folded(tokens, per_frame, first, heads, seed):
    group, width, out = 32, 40, 24
    frames = -(-(first + tokens) // per_frame)
    keys = frames, heads * group
    operands = draw((tokens, width), (*keys, width), keys, (*keys, out), seed=seed)
    expected = absorbed_reference(*(x.double() for x in operands), group, per_frame, first)
    assert error(launch_absorbed(*operands, group, per_frame, first), expected) < 1e-5
