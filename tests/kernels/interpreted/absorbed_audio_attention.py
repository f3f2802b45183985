"""The Triton kernels of the absorbed audio layer against their references in float64."""

# pyright: reportCallIssue=false, reportArgumentType=false

import importlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.absorb_audio_projections import absorb_reference, launch_absorb
from kernels.absorbed_audio_attention import Sizes, absorbed_reference, dispatch
from kernels.tuning import TunedConfig
from tests.tensors import draw, error

EXAMPLES = settings(max_examples=20)


@EXAMPLES
@given(st.integers(1, 3), st.sampled_from([8, 16, 32]), st.integers(1, 3), st.integers(0, 99))
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


SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "OUT_BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.double() for x in tensors]


@EXAMPLES
@given(
    st.integers(1, 70), st.integers(1, 40), st.integers(0, 45), st.sampled_from([(8, 4), (16, 3), (32, 5), (64, 1)]),
    st.integers(1, 30), st.integers(1, 45), st.sampled_from(["", "bias", "residual", "bias residual"]),
    st.sampled_from(["triton", "pointers", "library"]), st.integers(0, 99),
)  # fmt: skip
def test_absorbed_attention(tokens, tokens_per_frame, first_token, keys, width, out_width, what, backend, seed):
    """Tokens that begin and end inside frames; more keys than columns of a tile; widths that blocks do not divide."""
    keys_per_frame, heads = keys
    frames = -(-(first_token + tokens) // tokens_per_frame)
    columns = frames, heads * keys_per_frame
    z, keys, key_bias, values, bias, residual = draw(
        (tokens, width), (*columns, width), columns, (frames, out_width, columns[1]), (out_width,),
        (tokens, out_width + 3), seed=seed,
    )  # fmt: skip
    bias, residual = bias if "bias" in what else None, residual[:, 3:] if "residual" in what else None
    operands, sizes = (z, keys, key_bias, values), Sizes(keys_per_frame, tokens_per_frame, first_token)
    config = SMALL | ({"POINTERS": 1} if backend == "pointers" else {})
    tuned = TunedConfig("library" if backend == "library" else "triton", config)
    y = dispatch(*operands, sizes, bias, residual, tuned=tuned)
    doubles, epilogue = wide(*operands), wide(bias, residual)
    assert error(y, absorbed_reference(*doubles, sizes, *epilogue)) < 1e-5


def test_addresses_that_tma_cannot_read():
    *operands, values = draw((20, 24), (3, 32, 24), (3, 32), (1 + 3 * 40 * 32,), seed=0)
    operands, sizes = (*operands, values[1:].view(3, 40, 32)), Sizes(16, 9, 2)
    y = dispatch(*operands, sizes, None, None, tuned=TunedConfig("triton", SMALL))
    assert error(y, absorbed_reference(*(x.double() for x in operands), sizes)) < 1e-5


def test_rows_of_the_next_frame_are_left_alone(monkeypatch):
    """By tiles in any order: the interpreter runs them one after the other, here those of the last frame first."""
    module = importlib.import_module("kernels.absorbed_audio_attention")
    in_order = module.query_tiles_on
    monkeypatch.setattr(module, "query_tiles_on", lambda *arguments: in_order(*arguments).flip(0))
    operands = draw((20, 24), (3, 32, 24), (3, 32), (3, 40, 32), seed=0)
    sizes = Sizes(16, 9, 2)
    y = dispatch(*operands, sizes, None, None, tuned=TunedConfig("triton", SMALL))
    assert error(y, absorbed_reference(*(x.double() for x in operands), sizes)) < 1e-5
