"""The Triton kernels of the absorbed audio layer in e4m3 against their references in float64.

Triton's interpreter cannot round to e4m3, so operands and results are float32 here, and scales are all that remains.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.absorb_audio_projections import absorb_reference
from kernels.absorb_audio_projections_fp8 import centre, launch_absorb_fp8
from kernels.absorbed_audio_attention import Scales, Sizes, absorbed_reference, dispatch
from kernels.common import FP8_MAX
from kernels.tuning import TunedConfig
from tests.tensors import draw, error

EXAMPLES = settings(max_examples=20)
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "OUT_BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}


@EXAMPLES
@given(
    st.integers(1, 5), st.sampled_from([8, 16, 32]), st.integers(1, 3), st.integers(1, 45), st.integers(1, 45),
    st.booleans(), st.sampled_from([16, 32, 64]), st.integers(0, 99),
)  # fmt: skip
def test_absorb(frames, keys, heads, width, out_width, scaled, rows, seed):
    """Any number of frames beside those that a program takes at once, and columns that blocks do not divide."""
    head_dim = 16
    k, v = draw((frames, keys, 2, heads, head_dim), seed=seed)[0].unbind(2)
    shapes = (heads * head_dim, width), (heads * head_dim,), (out_width, heads * head_dim), (out_width,)
    weights = draw(*shapes, seed=seed + 1)
    scales = draw(shapes[1], shapes[3], seed=seed + 2) if scaled else []
    config = {"ROWS": rows, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    g8, g_scale, key_bias, u8, u_scale, value_bias = launch_absorb_fp8(k, v, *weights, *scales, config=config)

    q_weight, q_bias, out_weight, out_bias = (x.double() for x in weights)
    if scaled:
        q_weight, out_weight = q_weight * scales[0].double()[:, None], out_weight * scales[1].double()[:, None]
    g, bias, u = absorb_reference(k.double(), v.double(), q_weight, q_bias, out_weight)
    g, u, means = centre(g, u, heads)
    for x8, scale, x in ((g8, g_scale, g), (u8, u_scale, u)):
        assert x8.shape == x.shape
        assert error(x8 * scale[..., None], x) < 1e-5
        assert error(scale, x.abs().amax(2) / FP8_MAX) < 1e-5
        assert x8.abs().max() <= FP8_MAX
    assert error(key_bias, bias) < 1e-5
    assert error(value_bias, means + out_bias) < 1e-5


@EXAMPLES
@given(
    st.integers(1, 70), st.integers(1, 40), st.integers(0, 45), st.integers(1, 4), st.integers(1, 30),
    st.integers(1, 45), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_attention(tokens, tokens_per_frame, first_token, heads, width, out_width, added, pointers, seed):
    keys_per_frame, frames = 32, -(-(first_token + tokens) // tokens_per_frame)
    columns, out = (frames, heads * keys_per_frame), (frames, out_width)
    z, keys, key_bias, values, bias, residual = draw(
        (tokens, width), (*columns, width), columns, (*out, columns[1]), out, (tokens, out_width), seed=seed
    )
    torch.manual_seed(seed)
    scales = Scales(*(torch.rand(shape) + 0.1 for shape in ((tokens,), columns, out)))
    sizes, residual = Sizes(keys_per_frame, tokens_per_frame, first_token), residual if added else None
    config = TunedConfig("triton", SMALL | ({"POINTERS": 1} if pointers else {}))
    y = dispatch(z, keys, key_bias, values, sizes, bias, residual, scales, torch.float32, config)
    doubles = [x if x is None else x.double() for x in (z, keys, key_bias, values, bias, residual)]
    expected = absorbed_reference(*doubles[:4], sizes, *doubles[4:], Scales(*(x.double() for x in scales)))
    assert error(y, expected) < 1e-5
