"""The Triton kernels of the absorbed audio layer against their references in float64."""

# pyright: reportCallIssue=false, reportArgumentType=false

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.absorbed_audio_attention import absorb_reference, absorbed_reference, launch_absorb, launch_absorbed
from tests.tensors import draw, error

EXAMPLES = settings(max_examples=20)


@EXAMPLES
@given(st.integers(1, 3), st.sampled_from([16, 32]), st.integers(1, 3), st.integers(0, 99))
def test_absorb(frames, keys, heads, seed):
    head_dim, width, out_width = 16, 40, 24
    k, v = draw((frames, keys, 2, heads, head_dim), seed=seed)[0].unbind(2)
    shapes = (heads * head_dim, width), (heads * head_dim,), (out_width, heads * head_dim)
    weights = draw(*shapes, seed=seed + 1)
    absorbed = launch_absorb(k, v, *weights)
    expected = absorb_reference(*(x.double() for x in (k, v, *weights)))
    for x, y in zip(absorbed, expected, strict=True):
        assert x.shape == y.shape
        assert error(x, y) < 1e-5


def test_absorb_weights_with_scales():
    """Weights with scales mean the weights times the scales of their rows."""
    k, v, q_weight, q_bias, out_weight = draw((2, 16, 3, 16), (2, 16, 3, 16), (48, 40), (48,), (24, 48), seed=0)
    q_scale, out_scale = torch.rand(48) + 0.5, torch.rand(24) + 0.5
    absorbed = launch_absorb(k, v, q_weight, q_bias, out_weight, q_scale, out_scale)
    operands = k, v, q_weight * q_scale[:, None], q_bias, out_weight * out_scale[:, None]
    expected = absorb_reference(*(x.double() for x in operands))
    for x, y in zip(absorbed, expected, strict=True):
        assert error(x, y) < 1e-5


@EXAMPLES
@given(st.integers(1, 70), st.integers(1, 40), st.integers(0, 45), st.integers(1, 5), st.integers(0, 99))
def test_absorbed_attention(tokens, tokens_per_frame, first_token, heads, seed):
    keys_per_frame, width, out_width = 32, 40, 24
    frames = -(-(first_token + tokens) // tokens_per_frame)
    columns = frames, heads * keys_per_frame
    operands = draw((tokens, width), (*columns, width), columns, (*columns, out_width), seed=seed)
    sizes = keys_per_frame, tokens_per_frame, first_token
    assert error(launch_absorbed(*operands, *sizes), absorbed_reference(*(x.double() for x in operands), *sizes)) < 1e-5
