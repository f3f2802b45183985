"""Quantised checkpoints of the student: how `python -m model.quantize` writes them, and how they are loaded.

    OUT/fp8.json or int8.json       the manifest: source hashes, policy, error of each layer, hash of each shard
    OUT/student-*.safetensors       one shard per block and one for the rest, with our parameter names
    OUT/...                         the other files of the official checkpoint, as hard links where possible

The layers that the policy names become e4m3, or rotated int8, with a float32 scale per output channel, concatenated as
in `DiT`. A layer whose measured error exceeds the policy's limit stays as it is. The error of a layer is
||y8 - y|| / ||y|| of its outputs for random inputs like those that norms make: normally distributed, with every
hundredth channel 30 times as large.

Layers pass through memory one at a time. Each shard and the manifest are written atomically, so an interrupted
conversion can be resumed. The source may be an official checkpoint in any floating-point dtype, or one that torchao or
ComfyUI has quantised (one scale per row or one for all); FP8 takes its e4m3 values unchanged.

An FP8 checkpoint can be loaded in other precisions too, as for a GPU without FP8: its layers are widened to the
student's dtype, which adds no error, or widened and quantised anew to INT8.
"""

import fnmatch
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kernels.common import FP8
from kernels.linear import dequantize
from model.config import FORMATS, PRECISIONS, DiTConfig, FP8Policy, INT8Policy
from model.dit import DiT
from model.errors import UserError
from model.files import replacing, unreadable
from model.linear import DTYPES, Linear, QuantizedRows, quantized_parameters
from model.linear import FORMATS as OPERATIONS
from model.param_map import identity_map, is_finite, load_parameters, require_finite, set_parameter
from model.weights.shards import ShardReader, iter_safetensors, read_json

VERSION = 1
Policy = FP8Policy | INT8Policy
ERROR_SAMPLE_ROWS = 64  # rows that a layer's error is measured on
OUTLIER_SCALE = 30.0  # factor on every hundredth channel of these rows


# --- Quantisation ----------------------------------------------------------------------------------------------------


class QuantizedModule(NamedTuple):
    """The parameters of a module, by full name; and the error of a layer that the policy names, else None."""

    module: str
    tensors: dict[str, Tensor]
    error: float | None


def quantize_modules(
    source: ShardReader,
    dit: DiT,
    policy: Policy | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    prefix: str | None = None,
) -> Iterator[QuantizedModule]:
    """Yields the modules of `dit` that hold parameters, quantised by `policy`; other parameters come in `dtype`.

    `dit` may be on the meta device. Without a policy nothing is quantised. With a `prefix`, only modules whose names
    begin with it are yielded; with the prefix "", only modules outside of the blocks.
    """
    stored: dict[str, list[str]] = {}
    for name, mapping in source.param_map.items():  # in the order of their rows
        stored.setdefault(mapping.params[0], []).append(name)
    layers = policy.layers if policy is not None else ()
    for module, owner in dit.named_modules():
        inside = f"{module}.".startswith(prefix or "blocks.")
        if prefix is not None and inside != bool(prefix):
            continue
        names = [f"{module}.{leaf}" for leaf, _ in owner.named_parameters(recurse=False)]
        whole = {name: _concat_rows([source.read(part) for part in stored[name]]) for name in names}
        chosen = isinstance(owner, Linear) and any(fnmatch.fnmatch(module, pattern) for pattern in layers)
        if policy is not None and chosen:
            part = _quantize_layer(
                module, whole[f"{module}.weight"], _dequantized(whole[f"{module}.bias"]), policy, dtype, device
            )
            # NaN or infinity in a weight is in the error too, so that nothing has to read the weight for it.
            require_finite(math.isfinite(part.error or 0.0), f"{module}.weight", source.shards[0].parent)
        else:
            part = QuantizedModule(
                module, {name: _dequantized(x).to(dtype).contiguous() for name, x in whole.items()}, None
            )
        for name, x in part.tensors.items():
            require_finite(is_finite(x), name, source.shards[0].parent)
        if whole:
            yield part


def _quantize_layer(
    module: str,
    weight: Tensor | QuantizedRows,
    bias: Tensor,
    policy: Policy,
    dtype: torch.dtype,
    device: torch.device | str,
) -> QuantizedModule:
    """The layer in 8 bits or, if its error is above the policy's limit, in `dtype`."""
    eight = DTYPES[policy.format]
    if isinstance(weight, QuantizedRows) and weight.values.dtype == eight:
        quantized = QuantizedRows(*(x.to(device) for x in weight))
    else:
        quantized = quantize_weight(_dequantized(weight).to(device), eight)
    error = layer_error(weight, quantized)
    if not error <= policy.max_error:
        tensors = {"weight": _dequantized(weight).to(dtype), "bias": bias.to(dtype)}
    else:
        tensors = quantized_parameters(quantized, bias.to(device)) | {"bias": bias.to(dtype)}
    return QuantizedModule(module, {f"{module}.{leaf}": x.cpu().contiguous() for leaf, x in tensors.items()}, error)


def quantize_weight(weight: Tensor, dtype: torch.dtype = FP8) -> QuantizedRows:
    """Quantises a weight to e4m3, or to rotated int8 if `dtype` is int8, with one float32 scale per row."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.bfloat16))
    return QuantizedRows(*OPERATIONS[dtype].quantize(weight))


def layer_error(weight: Tensor | QuantizedRows, quantized: QuantizedRows) -> float:
    """Relative error ||y8 - y|| / ||y|| of a quantised layer for random inputs with outlier channels.

    `weight` [outputs, inputs] is the exact weight and `quantized` its form in 8 bits. The inputs are
    `ERROR_SAMPLE_ROWS` rows of standard normal numbers, with every hundredth channel multiplied by `OUTLIER_SCALE`;
    they are quantised by row.
    """
    device, k = quantized.values.device, quantized.values.shape[1]
    x = torch.randn(ERROR_SAMPLE_ROWS, k, generator=torch.Generator().manual_seed(k)).to(device)
    x[:, ::100] *= OUTLIER_SCALE
    exact = x @ (dequantize(*weight) if isinstance(weight, QuantizedRows) else weight).to(device, torch.float32).T
    operations = OPERATIONS[quantized.values.dtype]
    got = operations.linear(*operations.quantize(x), *quantized, dtype=torch.float32)
    return float((got - exact).norm() / exact.norm().clamp_min(1e-30))


def _concat_rows(parts: list[Tensor | QuantizedRows]) -> Tensor | QuantizedRows:
    """Concatenates tensors along dimension 0; the result is quantised only if all of them are."""
    if all(isinstance(part, QuantizedRows) for part in parts):
        return QuantizedRows(*(torch.cat(x) for x in zip(*parts, strict=True)))  # pyright: ignore  (all are QuantizedRows)
    tensors = [_dequantized(part) for part in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _dequantized(x: Tensor | QuantizedRows) -> Tensor:
    return dequantize(*x) if isinstance(x, QuantizedRows) else x


# --- Checkpoints on disk --------------------------------------------------------------------------------------------


def write_quantized_checkpoint(
    shards: Sequence[Path], out: Path, config: DiTConfig, policy: Policy, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Writes the student in these shards, quantised, to `out`; returns the manifest.

    What is in `out` already is not written again.

    Raises `UserError` if `out` holds a conversion of another source, policy or format, or cannot be written.
    """
    dtype, form = PRECISIONS["bf16"].dit, policy.format
    if (held := format_of(out)) not in (None, form):
        raise UserError(f"{out} holds a conversion to {held}: choose a new --out")
    with torch.device("meta"):
        dit = DiT(config)
    source = ShardReader(shards, dit.param_map())
    header = {
        "schema": f"flashtalk-{form}",
        "version": VERSION,
        "source": {path.name: digest for path, digest in zip(source.shards, _hashes(source.shards), strict=True)},
        "policy": json.loads(json.dumps(asdict(policy))),
        "dtype": str(dtype).removeprefix("torch."),
    }
    manifest: dict[str, Any] = header | {"layers": {}, "shards": {}, "complete": False}
    if held is not None:
        previous = _manifest(out, form)
        if {key: previous[key] for key in header} != header:
            raise UserError(
                f"{out / manifest_file(form)} was made from another source or with another policy: choose a new --out"
            )
        manifest = previous
    groups = {"rest": "", **{f"block-{i:02d}": f"blocks.{i}." for i in range(config.num_layers)}}
    for shard, prefix in groups.items():
        file = f"student-{shard}.safetensors"
        digest = manifest["shards"].get(file)
        if digest and (out / file).is_file() and _hash(out / file) == digest:
            continue
        tensors: dict[str, Tensor] = {}
        for part in quantize_modules(source, dit, policy, dtype, device, prefix):
            tensors |= part.tensors
            if part.error is not None:
                manifest["layers"][part.module] = {"error": part.error, form: part.error <= policy.max_error}
        _replace(out / file, partial(save_file, tensors))
        manifest["shards"][file] = _hash(out / file)
        _save(out, form, manifest)
    manifest["complete"] = True
    _save(out, form, manifest)
    return manifest


def manifest_file(form: str) -> str:
    """The name of the manifest of a conversion to the format `form`."""
    return f"{form}.json"


def format_of(folder: Path) -> str | None:
    """The format of the quantised student in the folder, complete or not; None if there is none."""
    return next((form for form in FORMATS if (folder / manifest_file(form)).is_file()), None)


def load_quantized_checkpoint(
    dit: DiT, folder: Path, form: str, device: torch.device, offloaded: Collection[str] = ()
) -> None:
    """Loads the student in `folder`, quantised in the format `form`, into `dit`, which may be on the meta device.

    Parameters go to `device`; those of the submodules named in `offloaded` go to host memory. Raises `UserError`, which
    names the file, if the conversion is incomplete or a shard is missing, damaged or not the one in the manifest.
    """
    paths = _apply_manifest(dit, folder, form)
    load_parameters(dit, identity_map(dit), iter_safetensors(paths, device), folder, device, None, offloaded)


def load_widened_checkpoint(
    dit: DiT,
    folder: Path,
    form: str,
    policy: Policy | None,
    dtype: torch.dtype,
    device: torch.device,
    offloaded: Collection[str] = (),
) -> None:
    """Loads the student in `folder`, which is quantised in the format `form`, in another precision.

    Its quantised layers are multiplied by their scales, and then rounded to `dtype`, or to the 8 bits of `policy`. The
    other arguments and what is raised are those of `load_quantized_checkpoint`. Layers in INT8 are rotated, and would
    have to be rotated back: `form` must be "fp8".
    """
    with torch.device("meta"):
        held = DiT(dit.config)
    paths = _apply_manifest(held, folder, form)
    tensors = {name: x for name, x in identity_map(held).items() if not name.endswith(".weight_scale")}
    _load_modules(dit, ShardReader(paths, tensors), policy, dtype, device, offloaded)


def _apply_manifest(dit: DiT, folder: Path, form: str) -> list[Path]:
    """Quantises and fuses the layers of `dit` as the manifest says; returns the shards, which are those that it names.

    `dit` may be on the meta device. Raises as `load_quantized_checkpoint`.
    """
    manifest, file = _manifest(folder, form), manifest_file(form)
    if not manifest["complete"]:
        raise UserError(f"{folder / file} is not complete: resume with python -m model.quantize --out {folder}")
    paths = [folder / name for name in manifest["shards"]]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}, which {file} names, is missing")
    for path, digest in zip(paths, _hashes(paths), strict=True):
        if digest != manifest["shards"][path.name]:
            raise unreadable(path, f"its SHA-256 differs from the one in {file}")
    layers = {name: layer for name, layer in dit.named_modules() if isinstance(layer, Linear)}
    for name, entry in manifest["layers"].items():
        if name not in layers:
            raise UserError(f"{folder / file}: layer {name} is not part of this model")
        if entry[form]:
            layers.pop(name).quantize(DTYPES[form])
    for layer in layers.values():
        layer.fuse()
    return paths


def load_and_quantize(
    dit: DiT,
    paths: Sequence[Path],
    policy: Policy,
    dtype: torch.dtype,
    device: torch.device,
    offloaded: Collection[str] = (),
) -> None:
    """Loads the official student into `dit`, which may be on the meta device, and quantises it on the way to `device`.

    Parameters of the submodules named in `offloaded` go to host memory.
    """
    _load_modules(dit, ShardReader(paths, dit.param_map()), policy, dtype, device, offloaded)


def _load_modules(
    dit: DiT,
    source: ShardReader,
    policy: Policy | None,
    dtype: torch.dtype,
    device: torch.device,
    offloaded: Collection[str],
) -> None:
    """Loads what `source` holds into `dit`; with a policy, all layers that it leaves as they are become fused."""
    for part in quantize_modules(source, dit, policy, dtype, device):
        layer = dit.get_submodule(part.module)
        for name, tensor in part.tensors.items():
            set_parameter(dit, name, tensor if part.module.startswith(tuple(offloaded)) else tensor.to(device))
        if isinstance(layer, Linear) and layer.format is None and policy is not None:
            layer.fuse()


# --- Files ----------------------------------------------------------------------------------------------------------

_FIELDS = {"schema": str, "version": int, "source": dict, "policy": dict, "dtype": str, "layers": dict, "shards": dict,
           "complete": bool}  # fmt: skip


def _manifest(folder: Path, form: str) -> dict[str, Any]:
    path = folder / manifest_file(form)
    values = read_json(path)
    schema = f"flashtalk-{form}"
    if (values.get("schema"), values.get("version")) != (schema, VERSION):
        raise UserError(f"{path} is not a {schema} file of version {VERSION}")
    for name, kind in _FIELDS.items():
        if not isinstance(values.get(name), kind):
            raise UserError(f"{path}: {name} is {values.get(name)!r:.40}, wanted {kind.__name__}")
    if not all(isinstance(x, dict) and isinstance(x.get(form), bool) for x in values["layers"].values()):
        raise UserError(f"{path}: every layer must say whether it is {form}")
    return values


def _save(folder: Path, form: str, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, indent=1) + "\n"
    _replace(folder / manifest_file(form), lambda path: path.write_text(text))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file atomically; its content is on the disk before it replaces the old file."""
    try:
        with replacing(path) as temporary:
            write(temporary)
            temporary.chmod(0o644)  # safetensors makes files that only their owner can read
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of the files, several of them at a time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_hash, paths))


def copy_other_files(checkpoint: Path, out: Path, shards: Collection[Path]) -> None:
    """Copies the files of a checkpoint but its student to `out`, as hard links where the file system allows them.

    Of links, such as a hub's cache consists of, the files that they lead to are copied. Hidden files are left out: they
    are those of tools for downloading. Raises `UserError` for a link that leads nowhere.
    """
    skipped = {path.name for path in shards} | {"diffusion_pytorch_model.safetensors.index.json"}
    skipped |= {manifest_file(form) for form in FORMATS}
    for path in _files_below(checkpoint, checkpoint.resolve(), out.resolve()):
        target = out / path.relative_to(checkpoint)
        if (path.parent == checkpoint and path.name in skipped) or target.exists():
            continue
        if not path.exists():
            raise UserError(f"{path} is a link that leads nowhere: download it again")
        try:
            target.unlink(missing_ok=True)  # a broken link
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{target} cannot be written ({error.strerror})") from error
        try:
            os.link(path.resolve(), target)
        except OSError:
            _replace(target, partial(shutil.copyfile, path))


def _files_below(folder: Path, *excluded: Path) -> Iterator[Path]:
    """All files in a folder and in those below it, through links too, but not in the excluded folders, in order."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in excluded:
            yield from _files_below(path, *excluded, path.resolve())
