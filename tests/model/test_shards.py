"""The student's shards in every form that people have: read alike in every precision, or refused in one line."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.linear import dequantize
from model.config import PRECISIONS, FP8Policy
from model.dit import DiT
from model.errors import UserError
from model.linear import Linear
from model.weights.checkpoint import load_student
from model.weights.quantize import write_quantized_checkpoint
from model.weights.shards import find_student_shards
from tests.small import SMALL, edit_student, weights, write_checkpoint

CPU = torch.device("cpu")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Q = "blocks.0.self_attn.q.weight"

Tensors = Mapping[str, torch.Tensor]
Change = Callable[[str, torch.Tensor], Tensors]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def student(folder: Path, precision: str) -> DiT:
    return load_student(SMALL.dit, folder, find_student_shards(folder), CPU, PRECISIONS[precision])


def written(folder: Path) -> dict[str, torch.Tensor]:
    """What `model.quantize` makes of the student."""
    out = folder / "out"
    out.mkdir()
    manifest = write_quantized_checkpoint(find_student_shards(folder), out, SMALL.dit, FP8Policy())
    return {name: x for file in manifest["shards"] for name, x in load_file(out / file).items()}


# --- Read -----------------------------------------------------------------------------------------------------------


def is_matrix(name: str, x: torch.Tensor) -> bool:
    return x.ndim == 2 and name.startswith("blocks.")


def beside(name: str, leaf: str) -> str:
    return f"{name.rpartition('.')[0]}.{leaf}"


def scaled(name: str, x: torch.Tensor, dtype: torch.dtype, leaf: str, per_row: bool = False) -> Tensors:
    """A matrix of a block in 8 bits, with its scale under the name `leaf`."""
    if not is_matrix(name, x):
        return {name: x}
    scale = (x.abs().amax(1, keepdim=True) if per_row else x.abs().max()) / 448
    return {name: (x / scale).to(dtype), beside(name, leaf): scale}


def comfy(name: str, x: torch.Tensor) -> Tensors:
    """With the mark and the scales of activations that ComfyUI stores as well."""
    if name == "head.head.weight":
        return {name: x, "scaled_fp8": torch.zeros(2, dtype=E4M3)}
    more = {beside(name, "scale_input"): torch.ones(1)} if is_matrix(name, x) else {}
    return {**scaled(name, x, E4M3, "scale_weight"), **more}


def newer_comfy(name: str, x: torch.Tensor) -> Tensors:
    mark = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    more = {beside(name, "comfy_quant"): mark} if is_matrix(name, x) else {}
    return {**scaled(name, x, E4M3, "weight_scale"), **more}


FORMS: dict[str, Change] = {
    "e4m3": lambda name, x: {name: x.to(E4M3) if is_matrix(name, x) else x},
    "e5m2": lambda name, x: {name: x.to(E5M2) if is_matrix(name, x) else x},
    "all in e4m3": lambda name, x: {name: x.to(E4M3)},
    "float64": lambda name, x: {name: x.double()},
    "mixed": lambda name, x: {name: x.to((E4M3, torch.bfloat16, torch.float16)[len(name) % 3])},
    "newer ComfyUI": newer_comfy,
    "scaled e5m2": lambda name, x: scaled(name, x, E5M2, "scale_weight"),
    "scaled rows": lambda name, x: scaled(name, x, E4M3, "weight_scale", per_row=True),
    "ComfyUI": lambda name, x: {f"model.diffusion_model.{key}": y for key, y in comfy(name, x).items()},
    "compiled blocks": lambda name, x: {name.replace(".self_attn", "._orig_mod.self_attn"): x},
    "DataParallel of a compiled model": lambda name, x: {f"module._orig_mod.{name}": x},
    "a trainer": lambda name, x: {f"model.{name}": x},
}


def meant(name: str, x: torch.Tensor, form: str) -> torch.Tensor:
    """What a tensor that is stored in that form stands for, in float32."""
    stored = {key.rpartition(".")[2]: value for key, value in FORMS[form](name, x).items()}
    scale = next((value for leaf, value in stored.items() if leaf in ("scale_weight", "weight_scale")), torch.ones(()))
    return stored[name.rpartition(".")[2]].float() * scale


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_student(form: str, folder: Path) -> None:
    """Exact in float32. In FP8 e4m3 stays as it is, and other dtypes are rounded to it."""
    edit_student(folder, FORMS[form])
    dit, dit8 = student(folder, "fp32"), student(folder, "fp8")
    state, expected = dit.state_dict(), {name: meant(name, x, form) for name, x in weights("dit").items()}
    for name, mapping in dit.param_map().items():
        rows = slice(mapping.start_row or 0, (mapping.start_row or 0) + mapping.shape[0])
        assert torch.equal(state[mapping.params[0]][rows].float(), expected[name]), name
        layer = dit8.get_submodule(mapping.params[0].rpartition(".")[0])
        if isinstance(layer, Linear) and layer.fp8 and name.endswith("weight"):
            got = dequantize(layer.weight[rows], layer.weight_scale[rows]).float()
            assert (got - expected[name]).norm() <= expected[name].norm() / 16, name  # e4m3 has 3 bits of mantissa
            if "e4m3" in form or form in ("ComfyUI", "newer ComfyUI", "scaled rows"):
                assert torch.allclose(got, expected[name], rtol=1e-6, atol=0), name


@pytest.mark.parametrize("form", ["e5m2", "ComfyUI"])
def test_forms_are_converted_as_they_are_loaded(form: str, folder: Path) -> None:
    edit_student(folder, FORMS[form])
    state, converted = student(folder, "fp8").state_dict(), written(folder)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name].float(), tensor.float()) for name, tensor in state.items())


# --- Refused --------------------------------------------------------------------------------------------------------


def with_more(more: Tensors) -> Change:
    return lambda name, x: {name: x, **more} if name == Q else {name: x}


def with_q(change: Callable[[torch.Tensor], torch.Tensor], **beside_it: torch.Tensor) -> Change:
    more = {beside(Q, leaf): x for leaf, x in beside_it.items()}
    return lambda name, x: {name: change(x), **more} if name == Q else {name: x}


def last_row_nan(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x[:-1], x[-1:] * torch.nan))


REFUSED: dict[str, tuple[Change, str]] = {
    "LoRA": (
        with_more({"blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 2)}),
        "lora_A.weight [2, 2] is not part of this model: merge the LoRA into the weights first",
    ),
    "another block": (with_more({"blocks.99.foo": torch.ones(3)}), "blocks.99.foo [3] is not part of this model"),
    "EMA beside the weights": (lambda name, x: {name: x, f"ema.{name}": x.clone()}, "is not part of this model"),
    "half a prefix": (lambda name, x: {f"model.{name}" if "blocks" in name else name: x}, "is not part of this model"),
    "missing": (lambda name, x: {} if name == Q else {name: x}, f"tensor {Q} [256, 256] missing"),
    "misshapen": (with_q(lambda x: x[:-1]), f"tensor {Q} has shape [255, 256], expected [256, 256]"),
    "integers": (with_q(lambda x: x.to(torch.int8)), f"tensor {Q} is I8; give weights in bf16, fp32 or fp8"),
    "scales of groups": (
        with_q(lambda x: x.to(E4M3), scale_weight=torch.ones(256, 8)),
        f"{Q} has scales [256, 8], expected one, or one for each row",
    ),
    "a scale of nothing": (
        with_more({"blocks.99.scale_weight": torch.ones(1)}),
        "blocks.99.scale_weight [1] is not part of this model",
    ),
    "NaN": (with_q(last_row_nan), "holds NaN or infinite numbers: download it again"),
    "NaN in e4m3": (with_q(lambda x: last_row_nan(x).to(E4M3)), "holds NaN or infinite numbers: download it again"),
    "scales of some": (
        lambda name, x: {name: x.to(E4M3)} if name == Q else scaled(name, x, E4M3, "scale_weight"),
        f"tensor {Q} has no scale, though others do; download the file again",
    ),
    "scales of integers": (
        with_q(lambda x: x.to(E4M3), scale_weight=torch.tensor(127, dtype=torch.uint8)),
        f"the scale of {Q} is U8; give scales in fp32 or bf16",
    ),
    "an infinite scale": (
        with_q(lambda x: x.to(E4M3), scale_weight=torch.tensor(torch.inf)),
        "holds NaN or infinite numbers: download it again",
    ),
    "infinity in a norm": (
        lambda name, x: {name: x + torch.inf if name == "blocks.1.norm3.bias" else x},
        "blocks.1.norm3.bias holds NaN or infinite numbers: download it again",
    ),
}


@pytest.mark.parametrize("refused", REFUSED)
@pytest.mark.parametrize("way", ["fp32", "fp8", "model.quantize"])
def test_what_is_refused_in_every_precision(way: str, refused: str, folder: Path) -> None:
    change, words = REFUSED[refused]
    edit_student(folder, change)
    with pytest.raises(UserError) as caught:
        written(folder) if way == "model.quantize" else student(folder, way)
    message = str(caught.value)
    assert words in message
    assert message.startswith(str(folder))
    assert "\n" not in message


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_a_tensor_in_two_shards_is_refused(precision: str, folder: Path) -> None:
    path = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    other = load_file(folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    name, tensor = next(iter(other.items()))
    save_file(load_file(path) | {name: tensor}, path)
    with pytest.raises(UserError, match=f"tensor {name} occurs twice, also in .*-00001-of-00002.safetensors"):
        student(folder, precision)
