"""The audio layer with absorbed projections: on the CPU, as torch operators, and on a GPU.

`interpreted/absorbed_audio_attention.py` runs the kernels in Triton's interpreter.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import tuning
from kernels.absorb_audio_projections import absorb_audio_projections, absorb_audio_projections_op, launch_absorb
from kernels.absorbed_audio_attention import (
    Sizes,
    absorbed_audio_attention,
    absorbed_audio_attention_op,
    dispatch,
    launch_absorbed,
    multiply_library,
)
from kernels.common import FP8
from kernels.frame_attention import frame_attention, frame_kv_ranges, frame_reference
from kernels.linear import dequantize, quantize_rows
from kernels.tuning import GPU, TunedConfig, assume_gpu
from profiling.fake_gpu import FakeCudaMode
from profiling.measure.check import poisoned_memory
from tests.tensors import draw, error

# --- On the CPU -----------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 45), st.sampled_from([8, 16, 32]))
def test_absorbed_layer_is_the_layer(tokens, tokens_per_frame, first_token, keys):
    """The layer is projection, attention, projection."""
    heads, head_dim, width = 2, 16, 24
    frames = -(-(first_token + tokens) // tokens_per_frame)
    z, k, v = draw((tokens, width), (frames, keys, heads, head_dim), (frames, keys, heads, head_dim))
    q_weight, q_bias, out_weight = draw((heads * head_dim, width), (heads * head_dim,), (width, heads * head_dim))
    q = (z.double() @ q_weight.double().T + q_bias.double()).unflatten(1, (heads, head_dim))
    attended = frame_reference(q, k.double(), v.double(), tokens_per_frame, first_token)
    expected = attended.flatten(1) @ out_weight.double().T
    absorbed = absorb_audio_projections(k, v, q_weight, q_bias, out_weight)
    y = absorbed_audio_attention(z, *absorbed, keys, tokens_per_frame, first_token)
    assert error(y, expected) < 1e-5
    bias, residual = draw((width,), (tokens, width))
    y = absorbed_audio_attention(z, *absorbed, keys, tokens_per_frame, first_token, bias, residual)
    assert error(y, residual + (expected + bias)) < 1e-5


@pytest.mark.parametrize("tokens", [6, 5])  # whole frames, and one that is shorter
@pytest.mark.parametrize("size", [1, 1000])
def test_the_library_rounds_what_it_adds_and_the_result(tokens, size):
    """In 16 bits: the sum of residual and bias, then that with the product. Rounding to bfloat16 errs by up to 2^-8."""
    p, values, residual, bias = (x.bfloat16() for x in draw((tokens, 32), (2, 8, 32), (tokens, 8), (8,)))
    residual *= size
    ranges = frame_kv_ranges(tokens, 1, 3, 0)
    y = multiply_library(p, values, ranges, bias, residual, None, None, {})
    added = residual.double() + bias.double()
    for start, end, frame, _ in ranges:
        exact = added[start:end] + p[start:end].double() @ values[frame].double().T
        bound = 2**-8 * (added[start:end].abs() + exact.abs())
        assert ((y[start:end].double() - exact).abs() <= 1.01 * bound).all()


def test_absorbs_quantised_weights():
    layer = audio_layer()
    k, v, q_weight, q_bias, out_weight = (layer[name] for name in ("k", "v", "q_weight", "q_bias", "out_weight"))
    (q8, q_scale), (w8, scale) = quantize_rows(q_weight), quantize_rows(out_weight)
    absorbed = absorb_audio_projections(k, v, q8, q_bias, w8, q_scale, scale)
    expected = absorb_audio_projections(k, v, dequantize(q8, q_scale), q_bias, dequantize(w8, scale))
    for x, y in zip(absorbed, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_parameters_by_compute_capability_replace_defaults(monkeypatch):
    module, launched = import_module("kernels.absorbed_audio_attention"), []
    monkeypatch.setattr(tuning, "_untuned", lambda: {("absorbed_audio_attention", "bf16", "8.0"): {"BLOCK_K": 32}})
    monkeypatch.setattr(module, "launch_weights", lambda *arguments: launched.append(arguments[-1]))
    monkeypatch.setitem(module.BACKENDS, "library", lambda *_: None)
    for capability in ("8.0", "8.6"):
        with assume_gpu(GPU("any", capability, 80)), FakeCudaMode():
            z, keys = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for shape in ((6, 8), (2, 32, 8)))
            dispatch(z, keys, keys, keys.mT.contiguous(), Sizes(16, 3), None, None)
    assert launched[0] == launched[1] | {"BLOCK_K": 32} != launched[1]


# --- As torch operators ---------------------------------------------------------------------------------------------


def audio_layer() -> dict[str, Tensor]:
    names = ("z", "k", "v", "q_weight", "q_bias", "out_weight")
    shapes = (12, 24), (3, 16, 2, 16), (3, 16, 2, 16), (32, 24), (32,), (24, 32)
    return dict(zip(names, draw(*shapes), strict=True))


def test_opcheck():
    layer = audio_layer()
    arguments = [layer[name] for name in ("k", "v", "q_weight", "q_bias", "out_weight")]
    torch.library.opcheck(absorb_audio_projections_op.library_op, (*arguments, None, None))
    absorbed = absorb_audio_projections(*arguments)
    torch.library.opcheck(absorbed_audio_attention_op.library_op, (layer["z"], *absorbed, 16, 4, 0, None, None))
    epilogue = draw((24,), (12, 24))
    torch.library.opcheck(absorbed_audio_attention_op.library_op, (layer["z"], *absorbed, 16, 4, 0, *epilogue))


def test_compiles_without_a_graph_break():
    layer = audio_layer()

    def run(z: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, out_weight: Tensor) -> Tensor:
        q = (z @ q_weight.T + q_bias).view(len(z), 2, 16)
        absorbed = absorb_audio_projections(k, v, q_weight, q_bias, out_weight)
        y = absorbed_audio_attention(z, *absorbed, 16, 4)
        return y + frame_attention(q, k, v, 4).flatten(1) @ out_weight.T

    torch.testing.assert_close(
        torch.compile(run, fullgraph=True, backend="aot_eager")(**layer), run(**layer), rtol=1e-4, atol=1e-4
    )


Q, Z = torch.zeros(6, 2, 16), torch.zeros(6, 5)
K, WEIGHT, BIAS = torch.zeros(3, 16, 2, 16), torch.zeros(32, 5), torch.zeros(32)
KEYS, KEY_BIAS = torch.zeros(3, 32, 5), torch.zeros(3, 32)
ABSORBED = Z, KEYS, KEY_BIAS, KEYS.mT.contiguous()


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (absorb_audio_projections, (Q, Q, Q[0], Q, Q), "k: shape [6, 2, 16], wanted [frames, keys, heads, head_dim]"),
        (launch_absorb, (K[:, :3], K[:, :3], Q[0], Q, Q), "k: 3 keys a frame, wanted a power of two"),
        (absorb_audio_projections, (K.mT, K.mT, WEIGHT, BIAS, Q), "k: strides (512, 32, 1, 16)"),
        (absorb_audio_projections, (K, K.transpose(1, 3), WEIGHT, BIAS, Q), "v: strides (512, 1, 16, 32)"),
        (absorb_audio_projections, (K, K, WEIGHT[:30], BIAS, Q), "q_weight: shape [30, 5], wanted [32, width]"),
        (
            absorb_audio_projections,
            (K, K, WEIGHT, BIAS, WEIGHT.T, BIAS),
            "q_weight: torch.float32, wanted torch.float8_e4m3fn",
        ),
        (
            absorb_audio_projections,
            (K, K, WEIGHT, BIAS, WEIGHT.T.to(FP8), None, torch.zeros(5, 2)[:, 0]),
            "out_scale: strides (2,)",
        ),
        (absorbed_audio_attention, (Z, KEYS[..., :4], Q, Q, 16, 2), "keys: shape [3, 32, 4], wanted [3, 32, 5]"),
        (absorbed_audio_attention, (Z, KEYS[0, 0], Q, Q, 16, 2), "keys: shape [5], wanted [frames, a multiple of 16"),
        (absorbed_audio_attention, (*ABSORBED, 0, 2), "keys_per_frame: 0, wanted at least 1"),
        (launch_absorbed, (Z, KEYS[:, :24], KEY_BIAS, KEYS, 24, 2), "keys_per_frame: 24 keys a frame, wanted a power"),
        (absorbed_audio_attention, (Z, KEYS[:, :30], Q, Q, 16, 2), "keys: shape [3, 30, 5], wanted"),
        (
            absorbed_audio_attention,
            (Z, KEYS, KEY_BIAS, KEYS, 16, 2),
            "values: shape [3, 32, 5], wanted [3, out width",
        ),
        (absorbed_audio_attention, (Z, KEYS.mT.contiguous().mT, KEY_BIAS, KEYS, 16, 2), "keys: strides (160, 1, 32)"),
        (absorbed_audio_attention, (*ABSORBED, 16, 1), "keys: 3 frames, tokens up to 6 need 6"),
        (absorbed_audio_attention, (*ABSORBED, 16, 2, 0, BIAS), "bias: shape [32], wanted [5]"),
        (
            absorbed_audio_attention,
            (*ABSORBED, 16, 2, 0, None, Z.half()),
            "residual: torch.float16, wanted",
        ),
        (absorbed_audio_attention, (*ABSORBED, 16, 2, 0, None, Z[:3]), "residual: shape [3, 5], wanted [6, 5]"),
    ],
)
def test_bad_arguments(function: Any, arguments: Any, words: str):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        function(*arguments)
    assert words in str(raised.value)


# --- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "tokens_per_frame", "first_token"), [(1, 1, 0), (700, 336, 100), (1512, 1344, 3024)]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)])
@pytest.mark.parametrize("backend", ["triton", "library"])
def test_gpu_absorbed_layer(backend, tokens, tokens_per_frame, first_token, dtype, bound):
    heads, head_dim, keys, width = 3, 128, 32, 384
    frames = -(-(first_token + tokens) // tokens_per_frame)
    options: Any = {"dtype": dtype, "device": "cuda"}
    shape = frames, keys, heads, head_dim
    z, k, v = draw((tokens, width), shape, shape, **options)
    shapes = (heads * head_dim, width), (heads * head_dim,), (width, heads * head_dim)
    q_weight, q_bias, out_weight = draw(*shapes, **options)
    q_weight, out_weight = q_weight / width**0.5, out_weight / (heads * head_dim) ** 0.5
    bias, residual = draw((width,), (tokens, width), **options)
    sizes = Sizes(keys, tokens_per_frame, first_token)
    with poisoned_memory():
        absorbed = absorb_audio_projections(k, v, q_weight, q_bias, out_weight)
        y = dispatch(z, *absorbed, sizes, bias, residual, tuned=TunedConfig(backend, {}))
    q = (z.double() @ q_weight.double().T + q_bias.double()).unflatten(1, (heads, head_dim))
    attended = frame_reference(q, k.double(), v.double(), tokens_per_frame, first_token)
    assert error(y, residual.double() + (attended.flatten(1) @ out_weight.double().T + bias.double())) < 2 * bound
