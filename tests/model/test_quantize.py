"""FP8 and INT8 checkpoints: content, errors by layer, resuming, refusals; and checkpoints that torchao quantised."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import model.quantize
import model.weights.quantize
from kernels.linear import dequantize, quantize_rows, quantize_rows_int8
from model.config import FORMATS, PRECISIONS, FP8Policy
from model.dit import DiT
from model.errors import UserError
from model.linear import Linear
from model.quantize import error_table, main
from model.weights.checkpoint import AUDIO_FOLDER, load_models
from model.weights.quantize import layer_error, load_quantized_checkpoint, quantize_weight, write_quantized_checkpoint
from model.weights.shards import find_student_shards
from tests.small import SMALL, weights, write_checkpoint

CPU = torch.device("cpu")
POLICY = FP8Policy()
MANIFEST = "fp8.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def out(folder: Path, tmp_path: Path) -> Path:
    """A complete FP8 checkpoint, made by the command line."""
    assert run("--checkpoint", str(folder), "--out", str(tmp_path / "out")) == 0
    return tmp_path / "out"


def run(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["quantize", *arguments])
        return main()


def student(folder: Path) -> DiT:
    with torch.device("meta"):
        dit = DiT(SMALL.dit)
    load_quantized_checkpoint(dit, folder, "fp8", CPU)
    return dit


def manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def test_written_weights_are_read_back(folder: Path, out: Path) -> None:
    dit = student(out)
    layers = {name: layer for name, layer in dit.named_modules() if isinstance(layer, Linear)}
    official, param_map = weights("dit"), dit.param_map()
    eight = 0
    for name, layer in layers.items():
        parts = [official[tensor] for tensor, mapping in param_map.items() if mapping.params == (f"{name}.weight",)]
        assert layer.weight.shape == torch.cat(parts).shape, name
        if layer.fp8:
            eight += 1
            values, scale = quantize_rows(torch.cat(parts))
            assert torch.equal(layer.weight.float(), values.float())
            assert torch.equal(layer.weight_scale, scale)
            assert layer.weight_scale.dtype == torch.float32
        else:
            assert "kv" in name
            assert layer.fused
            assert torch.equal(layer.weight, torch.cat(parts).bfloat16())
    assert eight == 8 * SMALL.dit.num_layers
    state = dit.state_dict()
    for name in ("head.head.weight", "blocks.1.modulation", "patch_embedding.weight", "blocks.0.norm3.bias"):
        assert torch.equal(state[name], official[name].bfloat16())


def test_the_manifest(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = manifest(out)
    assert values["complete"]
    assert values["policy"] == {"layers": list(POLICY.layers), "max_error": POLICY.max_error}
    assert values["source"].keys() == {path.name for path in find_student_shards(folder)}
    assert values["shards"].keys() == {path.name for path in out.glob("student-*.safetensors")}
    assert len(values["layers"]) == 8 * SMALL.dit.num_layers
    assert all(0.02 < layer["error"] < 0.045 and layer["fp8"] for layer in values["layers"].values())
    text = error_table(values, "fp8")
    assert [line.split()[:3] for line in text.splitlines()[1:]] == [
        [name, str(SMALL.dit.num_layers), str(SMALL.dit.num_layers)]
        for name in ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "audio_cross_attn.q_linear",
                     "audio_cross_attn.proj", "ffn.up", "ffn.down")
    ]  # fmt: skip


def test_an_int8_checkpoint(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written by the command line, loaded, and equal to what an official checkpoint becomes as it is loaded."""
    out = tmp_path / "int8"
    assert run("--checkpoint", str(folder), "--out", str(out), "--precision", "int8") == 0
    assert "in int8" in capsys.readouterr().out
    values = json.loads((out / "int8.json").read_text())
    assert len(values["layers"]) == 6 * SMALL.dit.num_layers
    assert all(0.005 < layer["error"] < 0.02 and layer["int8"] for layer in values["layers"].values())
    written = load_models(SMALL, out, CPU, PRECISIONS["int8"]).dit
    qkv, audio = (
        written.get_submodule("blocks.0.self_attn.qkv"),
        written.get_submodule("blocks.0.audio_cross_attn.proj"),
    )
    assert isinstance(qkv, Linear)
    assert isinstance(audio, Linear)
    assert (qkv.weight.dtype, audio.weight.dtype, audio.fused) == (torch.int8, torch.bfloat16, True)
    assert not hasattr(qkv, "bound")
    loaded = load_models(SMALL, folder, CPU, PRECISIONS["int8"]).dit.state_dict()
    assert loaded.keys() == written.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in written.state_dict().items())
    for precision in ("bf16", "fp8"):
        with pytest.raises(UserError, match="holds an INT8 student: use --precision int8 or int8-vae"):
            load_models(SMALL, out, CPU, PRECISIONS[precision])
    assert run("--checkpoint", str(folder), "--out", str(out)) == 2
    assert f"{out} holds a conversion to int8: choose a new --out" in capsys.readouterr().err


def test_other_files_are_copied_and_it_loads_as_a_checkpoint(out: Path) -> None:
    models = load_models(SMALL, out, CPU, PRECISIONS["fp8-attn"])
    blocks = list(models.dit.blocks)
    assert all(block.self_attn.qkv.fp8 and block.self_attn.k_scale is not None for block in blocks)  # pyright: ignore


@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8"])
def test_an_fp8_checkpoint_is_widened_to_other_precisions(out: Path, precision: str) -> None:
    """As for a GPU without FP8: each weight is the e4m3 one times its scale, rounded or quantised anew."""
    dtype, held = PRECISIONS[precision].dit, student(out)
    loaded = load_models(SMALL, out, CPU, PRECISIONS[precision]).dit
    layers = dict(loaded.named_modules())
    for name, layer in held.named_modules():
        if not isinstance(layer, Linear) or not layer.fp8:
            continue
        exact, wide = dequantize(layer.weight, layer.weight_scale), layers[name]
        assert isinstance(wide, Linear)
        if precision == "int8" and "audio" not in name:
            values, scale = quantize_rows_int8(exact)
            assert torch.equal(wide.weight, values)
            assert torch.equal(wide.weight_scale, scale)
        else:
            assert torch.equal(wide.weight, exact.to(dtype))
            assert wide.fused == (precision == "int8")
        assert not hasattr(wide, "bound")
        assert torch.equal(wide.bias, layer.bias.to(dtype))
    others = {name: x for name, x in held.state_dict().items() if x.dtype == torch.bfloat16 and "bias" not in name}
    assert all(torch.equal(loaded.get_parameter(name), x.to(dtype)) for name, x in others.items())


def test_damage_of_a_widened_checkpoint_is_reported(out: Path) -> None:
    flip(next(out.glob("student-block-00*")))
    with pytest.raises(UserError, match="its SHA-256 differs"):
        load_models(SMALL, out, CPU, PRECISIONS["bf16"])


def as_hub_cache(folder: Path, cache: Path) -> Path:
    """Moves the files to a cache as the hub's client lays it out, and returns the snapshot: a folder of links."""
    snapshot, blobs = cache / "snapshots" / "0a1b2c", cache / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    return snapshot


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_hub_cache_is_copied_without_its_links(
    folder: Path, tmp_path: Path, hard_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result loads though the cache is gone."""

    def across_file_systems(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    if not hard_links:
        monkeypatch.setattr(os, "link", across_file_systems)
    snapshot, out = as_hub_cache(folder, tmp_path / "cache"), tmp_path / "out"
    load_models(SMALL, snapshot, CPU, PRECISIONS["fp32"])
    out.mkdir()
    (out / "config.json").symlink_to("../../blobs/0")  # as an earlier version copied it
    assert run("--checkpoint", str(snapshot), "--out", str(out)) == 0
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    shutil.rmtree(tmp_path / "cache")
    load_models(SMALL, out, CPU, PRECISIONS["fp8"])


def test_linked_folders_are_copied_and_tools_and_circles_are_not(folder: Path, tmp_path: Path) -> None:
    (folder / AUDIO_FOLDER).rename(tmp_path / "speech")
    (folder / AUDIO_FOLDER).symlink_to(tmp_path / "speech")
    (folder / "again").symlink_to(".")
    (folder / "below").mkdir()
    (folder / "below" / "up").symlink_to("..")
    (folder / "below" / "note.txt").write_text("kept")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    out = folder / "fp8"  # in the checkpoint itself
    for _ in range(2):
        assert run("--checkpoint", str(folder), "--out", str(out)) == 0
    assert {path.name for path in out.iterdir() if path.is_dir()} == {AUDIO_FOLDER, "below"}
    assert [path.name for path in (out / "below").iterdir()] == ["note.txt"]
    assert load_models(SMALL, out, CPU, PRECISIONS["fp8"])


def test_a_link_that_leads_nowhere_is_not_copied(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "README.md").symlink_to("../../blobs/0")
    assert run("--checkpoint", str(folder), "--out", str(tmp_path / "out")) == 2
    assert f"{folder / 'README.md'} is a link that leads nowhere: download it again" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["model.quantize", "model.warm"])
@pytest.mark.parametrize("name", ["kernels.py", "kernels/__init__.py", "model.py", "model/__init__.py"])
def test_modules_of_the_user_with_our_names_take_one_line(tmp_path: Path, module: str, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert done.stderr.count("\n") == 1
    assert name.partition("/")[0].removesuffix(".py") in done.stderr


def test_an_official_checkpoint_is_quantised_as_it_is_loaded(folder: Path, out: Path) -> None:
    loaded = load_models(SMALL, folder, CPU, PRECISIONS["fp8"]).dit.state_dict()
    written = student(out).state_dict()
    assert loaded.keys() == written.keys()
    for name, tensor in written.items():
        assert tensor.dtype == loaded[name].dtype
        assert torch.equal(tensor.float(), loaded[name].float()), name


def test_an_interrupted_run_is_resumed(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intact shards stay; missing and damaged ones are written again."""
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.glob("student-*")}
    lost, damaged, *kept = sorted(before)
    (out / lost).unlink()
    (out / damaged).write_bytes(before[damaged][1][:-7])
    os.utime(out / kept[0])
    touched = (out / kept[0]).stat().st_mtime_ns
    values = manifest(out) | {"complete": False}
    (out / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"{MANIFEST} is not complete: resume with python -m model.quantize"):
        student(out)
    assert run("--checkpoint", str(folder), "--out", str(out)) == 0
    assert {path.name: path.read_bytes() for path in out.glob("student-*")} == {n: b for n, (_, b) in before.items()}
    assert (out / kept[0]).stat().st_mtime_ns == touched
    assert manifest(out) == values | {"complete": True}


def test_a_disk_that_fills_up_leaves_nothing_half_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        made.append(path)
        save_file(tensors, path)
        if len(made) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(model.weights.quantize, "save_file", full)
    new = tmp_path / "new"
    assert run("--checkpoint", str(folder), "--out", str(new)) == 2
    assert [path.name for path in new.iterdir() if path.name.startswith(("student", ".student"))] == [
        "student-rest.safetensors"
    ]
    assert not manifest(new)["complete"]
    assert run("--checkpoint", str(folder), "--out", str(new)) == 0
    assert student(new)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda out: next(out.glob("student-block-01*")).unlink(),
            "block-01.safetensors, which fp8.json names",
        ),
        (
            lambda out: flip(next(out.glob("student-block-00*"))),
            "or damaged: its SHA-256 differs",
        ),
        (
            lambda out: tear(next(out.glob("student-rest*"))),
            "student-rest.safetensors is truncated",
        ),
        (lambda out: tear(out / MANIFEST), "fp8.json cannot be read"),
        (lambda out: (out / MANIFEST).write_text("{}"), "fp8.json is not a flashtalk-fp8 file of version 1"),
        (lambda out: change(out, "shards", []), "fp8.json: shards is [], wanted dict"),
        (lambda out: change(out, "layers", {"blocks.9.ffn.up": {"fp8": True}}), "layer blocks.9.ffn.up is not part"),
        (lambda out: change(out, "layers", {"blocks.0.ffn.up": {}}), "every layer must say whether it is fp8"),
    ],
)
def test_damage_is_reported(out: Path, damage, words: str) -> None:
    damage(out)
    with pytest.raises(UserError) as raised:
        student(out)
    assert words in str(raised.value)


def flip(path: Path) -> None:
    """Flips one bit of the last tensor."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def tear(path: Path) -> None:
    """Keeps the first half, as an interrupted copy does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(out: Path, name: str, value: object) -> None:
    (out / MANIFEST).write_text(json.dumps(manifest(out) | {name: value}))


def test_errors_take_one_line(
    folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for arguments, words in (
        ((folder / "nowhere", out), "is not a checkpoint: there is no such folder"),
        ((folder, folder), "this is the checkpoint itself; name another folder"),
        ((folder, tmp_path / "file" / "out"), "cannot be created (Not a directory)"),
    ):
        capsys.readouterr()
        assert run("--checkpoint", str(arguments[0]), "--out", str(arguments[1])) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    monkeypatch.setitem(FORMATS, "fp8", FP8Policy(max_error=0.1))
    assert run("--checkpoint", str(folder), "--out", str(out)) == 2
    assert "was made from another source or with another policy: choose a new --out" in capsys.readouterr().err


def test_a_layer_with_too_large_an_error_is_not_quantised(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    policy = FP8Policy(("blocks.*.ffn.*",), max_error=0.03)
    values = write_quantized_checkpoint(find_student_shards(folder), tmp_path / "out", SMALL.dit, policy)
    assert not any(layer["fp8"] for layer in values["layers"].values())
    dit = student(tmp_path / "out")
    assert all(layer.fused and not layer.fp8 for layer in dit.modules() if isinstance(layer, Linear))


@pytest.mark.parametrize("kind", ["normal", "outlier rows", "outlier columns", "heavy tails", "a row of zeros"])
def test_errors_of_layers_with_outliers(kind: str) -> None:
    """Rounding to 4 significant bits gives an error of about 3.7 %, however the weights are distributed."""
    torch.manual_seed(0)
    weight = torch.randn(256, 512) / 20
    if kind == "outlier rows":
        weight[::50] *= 30
    elif kind == "outlier columns":
        weight[:, ::50] *= 30
    elif kind == "heavy tails":
        weight = torch.distributions.StudentT(2.5).sample(weight.shape) / 20
    elif kind == "a row of zeros":
        weight[3] = 0
    assert 0.01 < layer_error(weight, quantize_weight(weight)) < 0.042
    assert 1e-3 < layer_error(weight, quantize_weight(weight, torch.int8)) < 0.025


# --- torchao --------------------------------------------------------------------------------------------------------


def as_torchao(folder: Path, per_row: bool) -> None:
    """Rewrites the student as torchao stores it: two tensors for each weight in a block."""
    for path in find_student_shards(folder):
        tensors = {}
        for name, tensor in load_file(path).items():
            owner, _, leaf = name.rpartition(".")
            if name.startswith("blocks.") and leaf == "weight" and tensor.ndim == 2 and tensor.shape[1] % 16 == 0:
                values, scale = quantize_rows(tensor if per_row else tensor.reshape(1, -1))
                tensors[f"{owner}._weight_qdata"] = values.view(tensor.shape)
                tensors[f"{owner}._weight_scale"] = scale[:, None]
            else:
                tensors[name] = tensor
        save_file(tensors, path)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()


@pytest.mark.parametrize("per_row", [True, False])
def test_tensors_quantised_by_torchao_load(folder: Path, per_row: bool) -> None:
    official = weights("dit")
    as_torchao(folder, per_row)
    dit = load_models(SMALL, folder, CPU, PRECISIONS["fp8"]).dit
    for name, mapping in dit.param_map().items():
        layer = dit.get_submodule(mapping.params[0].rpartition(".")[0])
        if isinstance(layer, Linear) and layer.fp8 and name.endswith("weight"):
            rows = slice(mapping.start_row or 0, (mapping.start_row or 0) + mapping.shape[0])
            values, scale = quantize_rows(official[name] if per_row else official[name].reshape(1, -1))
            assert torch.equal(layer.weight[rows].float(), values.view(mapping.shape).float())
            assert torch.equal(layer.weight_scale[rows], scale.expand(mapping.shape[0]))
    kept = dit.get_submodule("blocks.0.cross_attn.kv")
    values, scale = quantize_rows(official["blocks.0.cross_attn.k.weight"])
    if per_row:
        assert torch.equal(kept.weight[: len(values)], dequantize(values, scale).bfloat16())  # pyright: ignore


def test_files_written_by_torchao_load(folder: Path) -> None:
    """Written by torchao itself, where it is installed."""
    pytest.importorskip("torchao", reason="torchao is not installed: pip install -e '.[peers]'")
    from torchao.prototype.safetensors.safetensors_support import (  # type: ignore[import-not-found]
        flatten_tensor_state_dict,
    )
    from torchao.quantization import Float8WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

    official = weights("dit")
    layer = torch.nn.Linear(SMALL.dit.dim, SMALL.dit.dim, dtype=torch.bfloat16)
    name = "blocks.0.self_attn.o.weight"
    layer.weight = torch.nn.Parameter(official[name].bfloat16())
    quantize_(layer, Float8WeightOnlyConfig())
    tensors, metadata = flatten_tensor_state_dict(
        {name: layer.weight.data} | {other: tensor for other, tensor in official.items() if other != name}
    )
    for path in find_student_shards(folder):
        path.unlink()
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata)
    dit = load_models(SMALL, folder, CPU, PRECISIONS["fp8"]).dit
    loaded = dit.get_submodule("blocks.0.self_attn.o")
    exact = layer.weight.dequantize().float()
    assert torch.equal(dequantize(loaded.weight, loaded.weight_scale).bfloat16().float(), exact)  # pyright: ignore
