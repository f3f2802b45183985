"""The absorbed audio layer in e4m3: on the CPU, as torch operators, and on a GPU.

`interpreted/absorbed_audio_attention_fp8.py` runs the kernels in Triton's interpreter.
"""

# pyright: reportCallIssue=false, reportArgumentType=false

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import absorbed_audio_attention_sm90 as sm90
from kernels.absorb_audio_projections import absorb_reference
from kernels.absorb_audio_projections_fp8 import (
    absorb_audio_projections_fp8,
    absorb_audio_projections_fp8_op,
    absorb_fp8_reference,
    centre,
    launch_absorb_fp8,
)
from kernels.absorbed_audio_attention import Scales, Sizes, absorbed_reference
from kernels.absorbed_audio_attention_fp8 import (
    BACKENDS,
    IN_16_BITS,
    absorbed_audio_attention_fp8,
    absorbed_audio_attention_fp8_op,
    dispatch,
    is_tuned,
)
from kernels.common import FP8
from kernels.frame_attention import frame_kv_ranges, frame_reference
from kernels.layer_norm import quantize_rows
from kernels.linear import dequantize
from kernels.tuning import GPU, TunedConfig, TunedEntry, TunedTable, assume_gpu
from profiling.measure.check import poisoned_memory
from tests.fake_gluon import fake_hopper
from tests.tensors import draw, error

tuning = importlib.import_module("kernels.tuning")

# --- On the CPU -----------------------------------------------------------------------------------------------------


def layer(
    tokens: int,
    tokens_per_frame: int,
    first_token: int,
    width: int,
    keys: int,
    device: str = "cpu",
    common: float = 0.0,
) -> dict[str, Tensor]:
    """Operands of a layer of two heads. `common` is what the keys and values of a frame have in common."""
    heads, head_dim = 2, 16
    frames = -(-(first_token + tokens) // tokens_per_frame)
    shape = frames, keys, heads, head_dim
    names = ("z", "k", "v", "q_weight", "q_bias", "out_weight", "out_bias", "residual")
    shapes = (tokens, width), shape, shape, (32, width), (32,), (width, 32), (width,), (tokens, width)
    found = dict(zip(names, draw(*shapes, seed=tokens, device=device), strict=True))
    for name in ("k", "v"):
        found[name] += common * found[name][:, :1].clone()
    return found | {"q_weight": found["q_weight"] / width**0.5, "out_weight": found["out_weight"] / 32**0.5}


def exact(x: dict[str, Tensor], tokens_per_frame: int, first_token: int = 0) -> Tensor:
    """The layer by its definition in float64, with its residual."""
    wide = {name: tensor.double() for name, tensor in x.items()}
    q = (wide["z"] @ wide["q_weight"].T + wide["q_bias"]).unflatten(1, x["k"].shape[2:])
    attended = frame_reference(q, wide["k"], wide["v"], tokens_per_frame, first_token).flatten(1)
    return wide["residual"] + (attended @ wide["out_weight"].T + wide["out_bias"])


def in_e4m3(x: dict[str, Tensor], tokens_per_frame: int, first_token: int = 0, dtype: Any = torch.float32) -> Tensor:
    """The layer by both operations, with weights that are not quantised."""
    weights = x["q_weight"], x["q_bias"], x["out_weight"], x["out_bias"]
    absorbed = absorb_audio_projections_fp8(x["k"], x["v"], *weights)
    sizes, residual = (x["k"].shape[1], tokens_per_frame, first_token), x["residual"].to(dtype)
    return absorbed_audio_attention_fp8(*quantize_rows(x["z"]), *absorbed, *sizes, residual, dtype)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 45), st.sampled_from([16, 32]))
def test_stays_near_the_layer(tokens, tokens_per_frame, first_token, keys):
    """Rounding z, G, P and U to 4 bits each costs up to 6 %, whichever tokens of a chunk there are."""
    x = layer(tokens, tokens_per_frame, first_token, 24, keys)
    x["residual"].zero_()
    assert error(in_e4m3(x, tokens_per_frame, first_token), exact(x, tokens_per_frame, first_token)) < 8e-2


def test_what_keys_and_values_have_in_common_costs_nothing():
    """The softmax does not see the mean over the keys, and that of the values is a part of the bias."""
    errors = []
    for common in (0.0, 30.0):
        x = layer(120, 12, 0, 64, 32, common=common)
        errors.append((in_e4m3(x, 12) - exact(x, 12)).norm())
    assert 0 < errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize(("common", "low", "high"), [(0.0, 4e-2, 6e-2), (3.0, 1e-3, 1e-2)])
def test_the_error_is_that_of_what_keys_and_values_do_not_share(common: float, low: float, high: float):
    """5 % of the output if they share nothing."""
    x = layer(200, 200, 0, 128, 32, common=common)
    for name in ("residual", "out_bias"):
        x[name].zero_()
    assert low < error(in_e4m3(x, 200), exact(x, 200)) < high


def test_absorbed_values_are_rounded_once():
    """By rows, to e4m3, after the mean over the keys of a head was taken out."""
    x = layer(1, 1, 0, 40, 16)
    weights = x["q_weight"], x["q_bias"], x["out_weight"]
    g8, g_scale, key_bias, u8, u_scale, value_bias = absorb_audio_projections_fp8(
        x["k"], x["v"], *weights, x["out_bias"]
    )
    g, bias, u = absorb_reference(*(t.double() for t in (x["k"], x["v"], *weights)))
    g, u, means = centre(g, u, 2)
    for x8, scale, wide in ((g8, g_scale, g), (u8, u_scale, u)):
        assert x8.dtype == FP8
        torch.testing.assert_close(scale, (wide.abs().amax(2) / 448).float())
        assert error(x8.float() * scale[..., None], wide) < 3e-2
        assert wide.unflatten(1 if wide is g else 2, (2, 16)).mean(2 if wide is g else 3).abs().max() < 1e-12
    torch.testing.assert_close(key_bias, bias.float())
    torch.testing.assert_close(value_bias, (means + x["out_bias"]).float())


def test_absorbs_quantised_weights():
    x = layer(6, 3, 0, 24, 16)
    (q8, q_scale), (w8, w_scale) = quantize_rows(x["q_weight"]), quantize_rows(x["out_weight"])
    absorbed = absorb_audio_projections_fp8(x["k"], x["v"], q8, x["q_bias"], w8, x["out_bias"], q_scale, w_scale)
    plain = dequantize(q8, q_scale), x["q_bias"], dequantize(w8, w_scale), x["out_bias"]
    for got, want in zip(absorbed, absorb_audio_projections_fp8(x["k"], x["v"], *plain), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=0.13, atol=1e-5)  # e4m3 may round to a neighbour


# --- Which form is used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ({}, False),
        ({IN_16_BITS: 2.0}, False),
        ({IN_16_BITS: 2.0, "triton": 3.0}, False),
        ({IN_16_BITS: 2.0, "triton": 1.0}, True),
        ({"triton": 1.0}, True),
    ],
)
def test_the_fastest_measured_form_is_used(seconds: dict[str, float], wanted: bool, monkeypatch: pytest.MonkeyPatch):
    dims = {"tokens": 12096, "tokens_per_frame": 1344, "keys": 32, "heads": 40, "width": 5120}
    backend = min(seconds, key=lambda name: seconds[name], default="")
    entry = TunedEntry("absorbed_audio_attention", "fp8", dims, backend, {}, seconds, "", {})
    gpu = GPU("a card", "9.0", 132)
    monkeypatch.setattr(
        tuning, "_table_of", lambda _: TunedTable(gpu.name, gpu.capability, (entry,) if seconds else ())
    )
    tuning._tuned_config.cache_clear()
    try:
        with assume_gpu(gpu):
            assert is_tuned(6048, 5120, 40, Sizes(32, 672), torch.device("cuda")) is wanted
        assert not is_tuned(6048, 5120, 40, Sizes(32, 672), torch.device("cpu"))
    finally:
        tuning._tuned_config.cache_clear()


@pytest.mark.parametrize(
    ("tokens", "tokens_per_frame", "first_token", "heads", "width", "out_width", "programs", "consumers",
     "out_consumers", "added", "dtype"),
    [
        (200, 70, 30, 2, 144, 48, 2, 2, 2, True, torch.bfloat16),
        (200, 70, 0, 5, 64, 80, 3, 3, 3, True, torch.float16),
        (130, 40, 10, 3, 48, 64, 1, 3, 2, False, torch.bfloat16),
        (64, 64, 0, 1, 16, 16, 4, 2, 3, True, torch.float16),
    ],
)  # fmt: skip
def test_hopper_kernel_on_the_model_of_hopper(
    tokens, tokens_per_frame, first_token, heads, width, out_width, programs, consumers, out_consumers, added, dtype
):
    """Frames that end inside 64 rows, tokens that begin inside a frame, and fewer columns than a tile has."""
    frames = -(-(first_token + tokens) // tokens_per_frame)
    columns = frames, heads * 32
    z, keys, key_bias, values, value_bias, residual = draw(
        (tokens, width), (*columns, width), columns, (frames, out_width, columns[1]), (frames, out_width),
        (tokens, out_width),
    )  # fmt: skip
    z8, z_scale = quantize_rows(z)
    (keys8, keys_scale), (values8, values_scale) = (quantize_rows(x.flatten(0, 1)) for x in (keys, values))
    keys8, values8, residual = keys8.view(keys.shape), values8.view(values.shape), residual.to(dtype) if added else None
    scales = Scales(z_scale, keys_scale.view(columns) / width**0.5, values_scale.view(frames, -1))
    ranges = frame_kv_ranges(tokens, 1, tokens_per_frame, first_token)
    config = {
        "CONSUMERS": consumers, "STAGES": 2, "OUT_CONSUMERS": out_consumers, "OUT_STAGES": 2, "OUT_BLOCK_N": 64,
        "GROUP_N": 2,
    }  # fmt: skip
    with fake_hopper(sm90, "frame_product_sm90", programs, seed=tokens) as kernel:
        p = sm90.launch_weights(z8, scales.z, keys8, scales.keys, key_bias, ranges, config)
        y = sm90.launch_output(p, values8, scales.values, value_bias, residual, dtype, ranges, config)
    assert kernel.launches == 2
    sizes = Sizes(32, tokens_per_frame, first_token)
    expected = absorbed_reference(z8, keys8, key_bias, values8, sizes, value_bias, residual, scales)
    assert error(y, expected) < 3e-3


def test_hopper_takes_addresses_and_strides_that_tma_can_read():
    """Of every operand that it reads by TMA."""
    z, keys, values, residual = (torch.zeros(200, 64).to(FP8) for _ in range(4))
    residual = residual.half()
    operands = [z, keys, values[None], residual]
    assert sm90.supports(*operands[:3], 32, residual, torch.float16)
    assert not sm90.supports(*operands[:3], 16, residual, torch.float16)
    assert not sm90.supports(*operands[:3], 32, residual, torch.float32)
    for i, x in enumerate(operands):
        shifted = x.flatten()[1 : 1 + 100 * 64].view(*x.shape[:-2], 100, 64)  # contiguous
        z, keys, values, residual = (shifted if i == j else y for j, y in enumerate(operands))
        assert not sm90.supports(z, keys, values, 32, residual, torch.float16)


# --- As torch operators ---------------------------------------------------------------------------------------------


def operands() -> dict[str, Tensor]:
    x = layer(12, 4, 0, 24, 16)
    absorbed = absorb_audio_projections_fp8(x["k"], x["v"], x["q_weight"], x["q_bias"], x["out_weight"], x["out_bias"])
    names = ("keys", "keys_scale", "key_bias", "values", "values_scale", "value_bias")
    return dict(zip(("z", "z_scale", *names), (*quantize_rows(x["z"]), *absorbed), strict=True))


def test_opcheck():
    x = layer(12, 4, 0, 24, 16)
    weights = x["q_weight"], x["q_bias"], x["out_weight"], x["out_bias"]
    torch.library.opcheck(absorb_audio_projections_fp8_op.library_op, (x["k"], x["v"], *weights, None, None))
    # The check of the schema multiplies inputs, which PyTorch cannot do in FP8.
    tests = [name for name in torch.library._OPCHECK_DEFAULT_UTILS if name != "test_schema"]
    arguments = (*operands().values(), 16, 4, 0, x["residual"], torch.float32)
    torch.library.opcheck(absorbed_audio_attention_fp8_op.library_op, arguments, test_utils=tests)


def test_compiles_without_a_graph_break():
    x = layer(12, 4, 0, 24, 16)

    def run(x: dict[str, Tensor]) -> Tensor:
        return in_e4m3(x, 4) * 2

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"z": torch.zeros(12, 24)}, "z: torch.float32, wanted torch.float8_e4m3fn"),
        ({"z_scale": torch.zeros(11)}, "z_scale: shape [11], wanted [12]"),
        ({"keys": torch.zeros(3, 32, 24)}, "keys: torch.float32, wanted torch.float8_e4m3fn"),
        ({"keys_scale": torch.zeros(3, 24)}, "keys_scale: shape [3, 24], wanted [3, 32]"),
        ({"values_scale": torch.zeros(3, 32)}, "values_scale: shape [3, 32], wanted [3, 24]"),
        ({"value_bias": torch.zeros(24)}, "value_bias: shape [24], wanted [3, 24]"),
        ({"residual": torch.zeros(12, 24)}, "residual: torch.float32, wanted torch.bfloat16"),
        ({"dtype": FP8}, "dtype: torch.float8_e4m3fn, wanted"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], words: str):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        absorbed_audio_attention_fp8(**(operands() | changes), keys_per_frame=16, tokens_per_frame=4)
    assert words in str(raised.value)


def test_bad_arguments_of_the_absorption():
    x = layer(1, 1, 0, 24, 16)
    weights = x["q_weight"], x["q_bias"], x["out_weight"]
    with pytest.raises(ValueError, match=r"^out_bias: shape \[32\], wanted \[24\]$"):
        absorb_audio_projections_fp8(x["k"], x["v"], *weights, x["q_bias"])
    with pytest.raises(ValueError, match=r"^k: 3 keys a frame, wanted a power of two$"):
        launch_absorb_fp8(x["k"][:, :3], x["v"][:, :3], *weights, x["out_bias"])


# --- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "tokens_per_frame", "first_token"), [(1, 1, 0), (700, 336, 100), (1512, 1344, 3024)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gpu_equals_the_reference(tokens, tokens_per_frame, first_token, dtype, backend):
    """The absorption to one step of e4m3, and the attention to that of its weights."""
    x = layer(tokens, tokens_per_frame, first_token, 384, 32, "cuda")
    weights = x["q_weight"], x["q_bias"], x["out_weight"], x["out_bias"]
    with poisoned_memory():
        absorbed = absorb_audio_projections_fp8(x["k"], x["v"], *weights)
        z8, z_scale = quantize_rows(x["z"])
        keys, keys_scale, key_bias, values, values_scale, value_bias = absorbed
        y = dispatch(
            z8, keys, key_bias, values, Sizes(32, tokens_per_frame, first_token), value_bias, x["residual"].to(dtype),
            Scales(z_scale, keys_scale, values_scale), dtype, TunedConfig(backend, {}),
        )  # fmt: skip
    for got, want in zip(absorbed, absorb_fp8_reference(x["k"], x["v"], *weights), strict=True):
        assert error(got.float(), want.float()) < 1e-2
    assert error(y, exact(x, tokens_per_frame, first_token)) < 6e-2
