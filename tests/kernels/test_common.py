"""What all operations share: argument checks, the definition of ops, and their promises to `torch.compile`."""

import ast
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction

from kernels import common, resample_conv2d
from kernels.common import FP8, OPS, Layout, Op, check, define_op
from kernels.tuning import GPU, assume_gpu
from profiling.cases import registry
from profiling.fake_gpu import FakeCudaMode, compiling_for

absorb_audio_projections = importlib.import_module("kernels.absorb_audio_projections")
absorb_audio_projections_fp8 = importlib.import_module("kernels.absorb_audio_projections_fp8")
absorbed_audio_attention = importlib.import_module("kernels.absorbed_audio_attention")
absorbed_audio_attention_fp8 = importlib.import_module("kernels.absorbed_audio_attention_fp8")
causal_conv3d = importlib.import_module("kernels.causal_conv3d")
chunk_attention = importlib.import_module("kernels.chunk_attention")
chunk_attention_fp8 = importlib.import_module("kernels.chunk_attention_fp8")
frame_attention = importlib.import_module("kernels.frame_attention")
lab_transfer = importlib.import_module("kernels.lab_transfer")
layer_norm = importlib.import_module("kernels.layer_norm")
linear = importlib.import_module("kernels.linear")
rms_norm_rope = importlib.import_module("kernels.rms_norm_rope")
rms_norm_silu = importlib.import_module("kernels.rms_norm_silu")
text_image_attention = importlib.import_module("kernels.text_image_attention")

# --- check ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((2, 3), True),
        (("rows", 3), True),
        (("rows", "columns"), True),
        ((2, 4), False),
        ((2,), False),
        ((2, 3, 1), False),
        (("rows", 4), False),
    ],
)
def test_shapes_are_numbers_or_words(shape: Sequence[int | str], fits: bool) -> None:
    if fits:
        check("x", torch.zeros(2, 3), shape=shape)
    else:
        with pytest.raises(ValueError, match=r"^x: shape \[2, 3\], wanted \["):
            check("x", torch.zeros(2, 3), shape=shape)


def test_a_word_stands_for_at_least_one() -> None:
    with pytest.raises(ValueError, match=r"^q: shape \[0, 3\], wanted \[tokens, 3\]$"):
        check("q", torch.zeros(0, 3), shape=("tokens", 3))
    check("q", torch.zeros(0, 3), shape=(0, 3))


LAYOUTS: dict[Layout, tuple[list[Tensor], list[Tensor]]] = {
    "rows": (
        [torch.zeros(4, 6), torch.zeros(4, 6)[:, :3], torch.zeros(4, 2, 6)[:, 0], torch.zeros(6, 1, 4)[:, :, :1]],
        [torch.zeros(4, 6).T, torch.zeros(6)[::2]],
    ),
    "tokens": (
        [torch.zeros(4, 2, 6), torch.zeros(4, 3, 2, 6)[:, 1], torch.zeros(4, 2, 6)[::2]],
        [torch.zeros(4, 2, 6)[..., :3], torch.zeros(4, 6, 2).transpose(1, 2)],
    ),
    "contiguous": ([torch.zeros(4, 6), torch.zeros(())], [torch.zeros(4, 6)[:, :3], torch.zeros(4, 2, 6)[:, 0]]),
    "channels_last": (
        [torch.zeros(2, 4, 5, 3).permute(0, 3, 1, 2), torch.zeros(2, 1, 4, 5)],
        [torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, 6).permute(0, 3, 1, 2)[:, :3]],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: Layout) -> None:
    good, bad = LAYOUTS[layout]
    for x in good:
        check("x", x, layout=layout)
    for x in bad:
        with pytest.raises(ValueError, match=r"^x: strides \(.*\) for shape \[.*\], wanted "):
            check("x", x, layout=layout)


def test_dtypes_devices_and_gradients() -> None:
    x = torch.zeros(3)
    check("x", x, dtype=torch.float32, device=x.device)
    check("x", x, dtype=(torch.float16, torch.float32))
    with pytest.raises(ValueError, match=r"^x: torch\.float32, wanted torch\.float16$"):
        check("x", x, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^x: torch\.float32, wanted torch\.float16 or torch\.bfloat16$"):
        check("x", x, dtype=(torch.float16, torch.bfloat16))
    with pytest.raises(ValueError, match=r"^x: on cpu, wanted meta$"):
        check("x", x, device=torch.device("meta"))
    x.requires_grad_()
    with pytest.raises(ValueError, match=r"^x: requires a gradient"):
        check("x", x)
    with torch.no_grad():
        check("x", x)


# --- define_op ------------------------------------------------------------------------------------------------------


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that a test defines are not left among the real ones."""
    for name in ("test_double", "test_pad", "test_broken"):
        monkeypatch.setitem(OPS, name, None)


def double(x: Tensor, times: int) -> Tensor:
    return x * 2**times


@pytest.mark.usefixtures("unregistered")
def test_the_cpu_form_is_also_the_fake() -> None:
    def never(x: Tensor, times: int) -> Tensor:
        raise AssertionError("not on a CPU")

    op = define_op("test_double", cpu=double, cuda=never)
    assert OPS["test_double"] is op
    x = torch.randn(3, 4)
    assert torch.equal(op(x, 3), 8 * x)
    torch.library.opcheck(op.library_op, (x, 3))
    assert torch.equal(torch.compile(lambda x: op(x, 1) + 1, fullgraph=True, backend="aot_eager")(x), 2 * x + 1)
    assert str(op.library_op._opoverload._schema) == "flashtalk::test_double(Tensor x, SymInt times) -> Tensor"


@pytest.mark.usefixtures("unregistered")
def test_a_gpu_without_e4m3_costs_one_line() -> None:
    """The compiler itself says so, for an A100 and an RTX 3090; an RTX 4090 has e4m3."""
    for capability in ("8.0", "8.6", "8.9"):
        with compiling_for(GPU("any", capability, 80)) as recorder:
            run = partial(OPS["quantize_rows"].cuda, torch.empty(16, 64, dtype=torch.bfloat16, device="cuda"))
            if capability == "8.9":
                run()
                assert recorder.launches
                continue
            with pytest.raises(ValueError, match=r"^quantize_rows: e4m3, which GPUs multiply from .* 8\.9 on"):
                run()


@pytest.mark.usefixtures("unregistered")
def test_other_errors_of_the_compiler_stay() -> None:
    def broken(x: Tensor) -> Tensor:
        raise CompilationError("", ast.parse("1").body[0], "something else")

    def clone(x: Tensor) -> Tensor:
        return x.clone()

    op = define_op("test_broken", cpu=clone, cuda=broken)
    with pytest.raises(CompilationError, match="something else"):
        op.cuda(torch.zeros(2))


@pytest.mark.usefixtures("unregistered")
def test_a_fake_of_its_own_is_used_where_values_are_not_known() -> None:
    def pad(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor([*x.tolist(), 0.0]), x.clone()

    def fake(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(len(x) + 1), x.new_empty(x.shape)

    op = define_op("test_pad", cpu=pad, cuda=pad, fake=fake)
    x = torch.randn(3)
    torch.library.opcheck(op.library_op, (x,))
    for y, expected in zip(torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")(x), pad(x), strict=True):
        assert torch.equal(y, expected)


# --- Every operation: what the CUDA launcher returns is what the fake promises --------------------------------------

H100 = GPU("NVIDIA H100 80GB HBM3", "9.0", 132)
L4 = GPU("NVIDIA L4", "8.9", 58)  # without a tuned table
Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a public function and its arguments
DEVICE = "cpu"  # of the samples below


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


def image(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[frames, channels, rows, columns] in channels-last memory."""
    frames, channels, rows, columns = shape
    return rand(frames, rows, columns, channels, dtype=dtype).permute(0, 3, 1, 2)


def kernel(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[outputs, channels, kt, k, k] in channels-last memory."""
    outputs, channels, kt, rows, columns = shape
    return rand(outputs, kt, rows, columns, channels, dtype=dtype).permute(0, 4, 1, 2, 3)


def fused(tokens: int, heads: int, head_dim: int) -> list[Tensor]:
    """q, k and v as slices of a fused projection."""
    return list(rand(tokens, 3, heads, head_dim).unbind(1))


def angles(tokens: int, head_dim: int) -> Tensor:
    return ones(tokens, head_dim // 2, 2)


def norm_rope_samples(function: Callable[..., Any]) -> list[Call]:
    q, k, v = fused(40, 3, 64)
    weights, rope = (ones(192), ones(192)), angles(40, 64)
    if function is rms_norm_rope.rms_norm_rope:
        return [(function, (q, k, *weights, rope)), (function, (q[:1], k[:1], *weights, rope[:1]))]
    return [
        (function, (q, k, v, *weights, ones(3), rope)),
        (function, (q[:1], k[:1], v[:1], *weights, ones(3), rope[:1])),
    ]


def kv_statistics_arguments() -> tuple[Tensor, ...]:
    _, k, v = fused(40, 3, 64)
    return k, v, ones(192), angles(40, 64)


def row_norm_samples(function: Callable[..., Any]) -> list[Call]:
    x, vectors = rand(7, 96), (ones(64), ones(64))
    if function in (layer_norm.quantize_rows, layer_norm.quantize_rows_int8):
        return [(function, (x,)), (function, (x[:, :64],)), (function, (x[:1].float(),))]
    return [(function, (x[:, :64], *vectors)), (function, (x[:, :64].contiguous().float(), *vectors))]


def linear_samples() -> list[Call]:
    x, w, bias, gate, residual = rand(40, 128), rand(96, 128), rand(96), ones(96), rand(40, 192)[:, :96]
    return [
        (linear.linear, (x, w)),
        (linear.linear, (x, w, bias, "gelu_tanh")),
        (linear.linear, (x, w, bias, None, gate, residual)),
        (linear.linear, (x.float(), w.float(), bias.float(), None, gate)),
    ]


def linear_quantized_samples(function: Callable[..., Any], dtype: torch.dtype) -> list[Call]:
    x, w, scales = rand(40, 128, dtype=dtype), rand(96, 128, dtype=dtype), (ones(40), ones(96))
    operands = x, scales[0], w, scales[1]
    return [
        (function, operands),
        (function, (*operands, ones(96), "gelu_tanh", None, None, torch.float32)),
        (function, (*operands, ones(96), None, ones(96), rand(40, 96))),
    ]


def linear_fp8_quantized_samples() -> list[Call]:
    x, w, scales = rand(40, 128, dtype=FP8), rand(96, 128, dtype=FP8), (ones(40), ones(96))
    operands = x, scales[0], w, scales[1], ones(2)
    return [
        (linear.linear_fp8_quantized, operands),
        (linear.linear_fp8_quantized, (*operands, ones(96), "gelu_tanh")),
    ]


def rms_norm_silu_samples() -> list[Call]:
    x, gamma = image(2, 24, 4, 6), rand(24)
    return [
        (rms_norm_silu.rms_norm_silu, (x, gamma)),
        (rms_norm_silu.rms_norm_silu, (x.float(), rand(24, 1, 1), False)),
        (rms_norm_silu.rms_norm_silu, (x[:1], gamma, True, 3.0)),
    ]


def lab_transfer_samples() -> list[Call]:
    statistics = ones(1, 3, 1, 1), ones(1, 3, 1, 1)
    return [
        (lab_transfer.lab_transfer, (rand(2, 3, 4, 6, dtype=torch.float32), *statistics)),
        (lab_transfer.lab_transfer, (image(2, 3, 4, 6), *statistics, 0.5)),
    ]


def chunk_attention_samples() -> list[Call]:
    q, k, v = fused(40, 3, 64)
    return [
        (chunk_attention.chunk_attention, (q, k, v)),
        (chunk_attention.chunk_attention, (q, k, v, [16, 24], 1)),
        (chunk_attention.chunk_attention, (rand(2, 8, 1, 384), rand(2, 8, 1, 384), rand(2, 8, 1, 384))),
        (chunk_attention.chunk_attention, tuple(x.float() for x in (q, k, v))),
        (chunk_attention.chunk_attention, (rand(5, 1, 40), rand(7, 1, 40), rand(7, 1, 40))),
    ]


def chunk_attention_with_lse_samples() -> list[Call]:
    q, k, v = fused(40, 3, 64)
    return [
        (chunk_attention.chunk_attention_with_lse, (q, k, v)),
        (chunk_attention.chunk_attention_with_lse, (q, k, v, [16, 24], 1)),
        (chunk_attention.chunk_attention_with_lse, (rand(2, 8, 1, 384), rand(2, 8, 1, 384), rand(2, 8, 1, 384))),
    ]


def chunk_attention_fp8_samples() -> list[Call]:
    q, k = rand(40, 3, 64, dtype=FP8), rand(40, 3, 64, dtype=FP8)
    operands = q, ones(40, 3), k, ones(3), rand(3, 64, 48, dtype=FP8), ones(3, 64)
    return [
        (chunk_attention_fp8.chunk_attention_fp8, operands),
        (chunk_attention_fp8.chunk_attention_fp8_with_lse, (*operands, [16, 24], "all")),
    ]


def chunk_attention_fp8_quantized_samples() -> list[Call]:
    q, k = rand(40, 3, 64, dtype=FP8), rand(40, 3, 64, dtype=FP8)
    operands = q, ones(40, 3), k, ones(3), rand(3, 64, 48, dtype=FP8), ones(3, 64)
    return [(chunk_attention_fp8.chunk_attention_fp8_quantized, operands)]


def text_image_operands() -> tuple[tuple[Tensor, ...], Tensor]:
    """Queries, keys and values, and a number of text tokens."""
    q, text, image_keys = rand(40, 3, 64), rand(32, 3, 64), rand(17, 3, 64)
    length = torch.ones(1, dtype=torch.int32, device=DEVICE)
    return (q, text, text.clone(), image_keys, image_keys.clone()), length


def text_image_attention_quantized_samples() -> list[Call]:
    operands, length = text_image_operands()
    function = text_image_attention.text_image_attention_quantized
    return [(function, (*operands, ones())), (function, (*operands, ones(), length, ones(40)))]


def text_image_attention_samples() -> list[Call]:
    operands, length = text_image_operands()
    return [
        (text_image_attention.text_image_attention, operands),
        (text_image_attention.text_image_attention, (*operands, length, ones(40))),
        (text_image_attention.text_image_attention, (*fused(40, 3, 64)[:1], *operands[1:])),
    ]


def frame_attention_samples() -> list[Call]:
    k, v = rand(3, 16, 3, 64), rand(3, 16, 3, 64)
    return [
        (frame_attention.frame_attention, (rand(60, 3, 64), k, v, 20)),
        (frame_attention.frame_attention, (rand(30, 3, 64), k, v, 20, 10)),
    ]


def absorb_samples() -> list[Call]:
    k, v = rand(3, 16, 2, 64), rand(3, 16, 2, 64)
    weights, weights8 = (
        (rand(128, 96), rand(128), rand(80, 128)),
        (rand(128, 96, dtype=FP8), rand(128), rand(80, 128, dtype=FP8)),
    )
    return [
        (absorb_audio_projections.absorb_audio_projections, (k, v, *weights)),
        (absorb_audio_projections.absorb_audio_projections, (k, v, *weights8, ones(128), ones(80))),
    ]


def absorbed_samples() -> list[Call]:
    keys, key_bias, values = rand(3, 32, 96), ones(3, 32), rand(3, 80, 32)
    function, operands = absorbed_audio_attention.absorbed_audio_attention, (keys, key_bias, values, 16, 20)
    return [
        (function, (rand(60, 96), *operands)),
        (function, (rand(30, 96), *operands, 10)),
        (function, (rand(30, 96), *operands, 10, ones(80), rand(30, 160)[:, :80])),
    ]


def absorb_fp8_samples() -> list[Call]:
    function, kv = absorb_audio_projections_fp8.absorb_audio_projections_fp8, (rand(3, 16, 2, 64), rand(3, 16, 2, 64))
    weights8 = rand(128, 96, dtype=FP8), rand(128), rand(80, 128, dtype=FP8), ones(80), ones(128), ones(80)
    return [(function, (*kv, rand(128, 96), rand(128), rand(80, 128), ones(80))), (function, (*kv, *weights8))]


def absorbed_fp8_samples() -> list[Call]:
    keys, values = (rand(3, 32, 96, dtype=FP8), ones(3, 32)), (rand(3, 80, 32, dtype=FP8), ones(3, 80), ones(3, 80))
    function, absorbed = absorbed_audio_attention_fp8.absorbed_audio_attention_fp8, (*keys, ones(3, 32), *values)
    return [
        (function, (rand(60, 96, dtype=FP8), ones(60), *absorbed, 16, 20)),
        (function, (rand(30, 96, dtype=FP8), ones(30), *absorbed, 16, 20, 10, rand(30, 160)[:, :80])),
        (function, (rand(30, 96, dtype=FP8), ones(30), *absorbed, 16, 20, 10, ones(30, 80), torch.float32)),
    ]


def causal_conv3d_samples() -> list[Call]:
    x, past, w, bias = image(2, 96, 8, 8), image(2, 96, 8, 8), kernel(96, 96, 3, 3, 3), rand(96)
    x8, past8, w8 = image(2, 96, 8, 8, dtype=FP8), image(2, 96, 8, 8, dtype=FP8), kernel(96, 96, 3, 3, 3, dtype=FP8)
    return [
        (causal_conv3d.causal_conv3d, (x, w, bias)),
        (causal_conv3d.causal_conv3d, (x, w, bias, past, image(2, 96, 8, 8))),
        (causal_conv3d.causal_conv3d, (x.float(), w.float(), bias.float(), past.float())),
        (causal_conv3d.causal_conv3d, (x8, w8, bias, past8, image(2, 96, 8, 8), ones(96))),
        (causal_conv3d.causal_conv3d, (x, kernel(3, 96, 3, 3, 3), rand(3), past)),
        (causal_conv3d.conv3d, (x, kernel(48, 96, 1, 1, 1), None)),
    ]


def causal_conv3d_norm_samples() -> list[Call]:
    x, past, w, bias, gamma = (
        image(2, 96, 8, 8),
        image(2, 96, 8, 8),
        kernel(96, 96, 3, 3, 3),
        rand(96),
        rand(96, 1, 1, 1),
    )
    x8, past8, w8 = image(2, 96, 8, 8, dtype=FP8), image(2, 96, 8, 8, dtype=FP8), kernel(96, 96, 3, 3, 3, dtype=FP8)
    return [
        (causal_conv3d.causal_conv3d_norm, (x, w, bias, gamma, past)),
        (causal_conv3d.causal_conv3d_norm, (x8, w8, bias, gamma, past8, ones(96), 3.0)),
    ]


# Operations whose cases do not call the public function on the case's own inputs, or leave some of its arguments out.
SAMPLES: dict[str, Callable[[], list[Call]]] = {
    "layer_norm": lambda: row_norm_samples(layer_norm.layer_norm) + row_norm_samples(layer_norm.layer_norm_modulate),
    "layer_norm_fp8": lambda: (
        row_norm_samples(layer_norm.layer_norm_fp8) + row_norm_samples(layer_norm.layer_norm_modulate_fp8)
    ),
    "layer_norm_int8": lambda: (
        row_norm_samples(layer_norm.layer_norm_int8) + row_norm_samples(layer_norm.layer_norm_modulate_int8)
    ),
    "quantize_rows_int8": lambda: row_norm_samples(layer_norm.quantize_rows_int8),
    "quantize_rows": lambda: row_norm_samples(layer_norm.quantize_rows),
    "rms_norm_rope": lambda: norm_rope_samples(rms_norm_rope.rms_norm_rope),
    "rms_norm_rope_fp8": lambda: norm_rope_samples(rms_norm_rope.rms_norm_rope_fp8),
    "kv_statistics": lambda: [(rms_norm_rope.kv_statistics, kv_statistics_arguments())],
    "linear": linear_samples,
    "linear_fp8": lambda: linear_quantized_samples(linear.linear_fp8, FP8),
    "linear_int8": lambda: linear_quantized_samples(linear.linear_int8, torch.int8),
    "linear_fp8_quantized": linear_fp8_quantized_samples,
    "rms_norm_silu": rms_norm_silu_samples,
    "lab_transfer": lab_transfer_samples,
    "chunk_attention": chunk_attention_samples,
    "chunk_attention_with_lse": chunk_attention_with_lse_samples,
    "chunk_attention_fp8_with_lse": chunk_attention_fp8_samples,
    "chunk_attention_fp8_quantized": chunk_attention_fp8_quantized_samples,
    "text_image_attention": text_image_attention_samples,
    "text_image_attention_quantized": text_image_attention_quantized_samples,
    "frame_attention": frame_attention_samples,
    "absorb_audio_projections": absorb_samples,
    "absorb_audio_projections_fp8": absorb_fp8_samples,
    "absorbed_audio_attention": absorbed_samples,
    "absorbed_audio_attention_fp8": absorbed_fp8_samples,
    "causal_conv3d": causal_conv3d_samples,
    "causal_conv3d_norm": causal_conv3d_norm_samples,
    "upsample_conv2d": lambda: [
        (
            resample_conv2d.upsample_conv2d,
            (image(2, 96, 8, 8), rand(2, 2, 48, 2, 2, 96).permute(0, 1, 2, 5, 3, 4), rand(48)),
        )
    ],
    "downsample_conv2d": lambda: [
        (
            resample_conv2d.downsample_conv2d,
            (image(2, 96, 8, 8), rand(96, 3, 3, 96).permute(0, 3, 1, 2), rand(96)),
        )
    ],
}


def samples_of(name: str) -> list[Call]:
    """Calls of an operation's public function: from `SAMPLES`, or else one on the inputs of its first case."""
    if name in SAMPLES:
        return SAMPLES[name]()
    case = next((case for case in registry().values() if case.operation.name == name), None)
    assert case is not None, "a new operation needs a benchmark case, or sample arguments here"
    function = getattr(importlib.import_module(f"kernels.{name}"), name)
    return [(function, case.inputs(torch.device(DEVICE), None))]


def described(results: Tensor | tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
    """Shape, dtype, device type and strides of each result; the stride of an axis of length 1 means nothing."""
    return [
        (
            tuple(x.shape), x.dtype, x.device.type,
            tuple(stride for stride, length in zip(x.stride(), x.shape, strict=True) if length > 1),
        )
        for x in ((results,) if isinstance(results, Tensor) else results)
    ]  # fmt: skip


@pytest.mark.parametrize("gpu", [H100, L4], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("name", sorted(OPS))
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_launchers_return_what_fakes_promise(name: str, gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not launched and tensors have no memory, so this needs no GPU."""
    compared: list[str] = []

    def compare(self: Op, *args: Any) -> Any:
        launched, promised = self.cuda(*args), self.fake(*args)
        assert described(launched) == described(promised), self.name
        compared.append(self.name)
        return launched

    monkeypatch.setattr(Op, "__call__", compare)
    monkeypatch.setattr(JITFunction, "run", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cuda")
    with assume_gpu(gpu), FakeCudaMode():
        for function, arguments in samples_of(name):
            compared.clear()
            function(*arguments)
            assert compared == [name]


# --- Every operation: its results do not depend on what surrounds the call ------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast to bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to fp16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("name", sorted(OPS))
def test_surroundings_do_not_change_results(name: str, surroundings: str) -> None:
    """Dtypes, devices and every bit."""
    torch.manual_seed(0)
    for function, arguments in samples_of(name):
        expected = function(*arguments)
        with SURROUNDINGS[surroundings]():
            got = function(*arguments)
        assert described(got) == described(expected)
        for x, y in zip(*((r,) if isinstance(r, Tensor) else r for r in (got, expected)), strict=True):
            assert torch.equal(x.float(), y.float())


# --- Precision ------------------------------------------------------------------------------------------------------


def test_products_of_float32_are_not_rounded_to_tf32() -> None:
    """Triton's default, which its interpreter does not show."""
    for file in Path(common.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot":
                precision = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert precision.get("input_precision") == "'ieee'", f"{file.name}:{node.lineno}"
