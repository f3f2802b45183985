"""Reading safetensors files: all tensors of several files in order, or single tensors by name."""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.common import FP8
from model.errors import UserError
from model.files import unreadable
from model.linear import QuantizedRows
from model.offload import pin_memory_for
from model.param_map import ParamMapping, check_tensors, without_prefixes

T = TypeVar("T")

READER_THREADS = 4  # also the number of tensors that are read ahead
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}  # dtypes of weights, as safetensors calls them
SCALES = ("scale_weight", "weight_scale", "_weight_scale")  # of ComfyUI, its later versions, torchao
UNUSED = ("scaled_fp8", "scale_input", "input_scale", "comfy_quant")  # marks of ComfyUI, and scales of activations


def iter_safetensors(paths: Iterable[Path], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor on `device`) for all tensors of the files, in the order in which they lie in each file.

    A few threads read ahead. For a GPU they read each tensor into pinned memory and copy it asynchronously, so that
    reading and copying overlap. Raises `UserError`, which names the file, if one is damaged.
    """

    def read(path: Path, file: Any, name: str) -> tuple[str, Tensor]:
        return name, _read(path, file, name, device)

    opened = ((path, _open(path)) for path in paths)
    yield from _ahead(partial(read, path, file, name) for path, file in opened for name in file.offset_keys())


def _ahead(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The jobs' results in order; a few threads work ahead."""
    with ThreadPoolExecutor(READER_THREADS) as readers:
        reading: deque[Future[T]] = deque()
        for job in jobs:
            reading.append(readers.submit(job))
            if len(reading) > READER_THREADS:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt").__enter__()
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error


def _read(path: Path, file: Any, name: str, device: torch.device) -> Tensor:
    try:
        return pin_memory_for(file.get_tensor(name), device).to(device, non_blocking=True)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error


class _Stored(NamedTuple):
    """Where a tensor lies in a file."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


class ShardReader:
    """Reads the official student's tensors from its shards, all in order or single ones by name.

    Weights may have any floating-point dtype, e4m3 and e5m2 too. They may be multiplied by a scale, one or one for each
    row, as ComfyUI and torchao store it. What training frameworks put in front of all names is left out.

    Making one reads the shards' headers and checks them, so that nothing is loaded of a checkpoint that does not fit,
    in any precision. It raises `UserError`, which names the file and the tensor, for a tensor that is missing,
    repeated, no part of the model, of another shape or of no floating-point dtype.
    """

    def __init__(self, paths: Sequence[Path], param_map: Mapping[str, ParamMapping]) -> None:
        """`param_map` has the tensors that the shards must hold."""
        self.shards, self.param_map = tuple(paths), param_map
        self._weights, self._scales = _weights_and_scales(_stored_tensors(paths))
        check_tensors(param_map, ((name, x.shape, x.path) for name, x in self._weights.items()), paths[0].parent)
        for name, stored in self._weights.items():
            if stored.dtype not in FLOATS:
                raise UserError(f"{stored.path}: tensor {name} is {stored.dtype}; give weights in bf16, fp32 or fp8")
            scale = self._scales.get(name)
            if scale is None and self._scales and stored.dtype.startswith("F8") and len(stored.shape) == 2:
                raise UserError(f"{stored.path}: tensor {name} has no scale, though others do; download the file again")
            if scale is not None and scale.dtype not in FLOATS:
                raise UserError(f"{scale.path}: the scale of {name} is {scale.dtype}; give scales in fp32 or bf16")
            if scale is not None and math.prod(scale.shape) not in (1, stored.shape[0]):
                shape = list(scale.shape)
                raise UserError(f"{scale.path}: {name} has scales {shape}, expected one, or one for each row")

    def read(self, name: str) -> Tensor | QuantizedRows:
        """A tensor in host memory; an e4m3 matrix with its scales, another tensor multiplied by its scale."""
        stored = self._weights[name]
        values, scale = self._load(stored), self._scale(name)
        if values.dtype == FP8 and values.ndim == 2:
            ones = torch.ones(len(values))
            return QuantizedRows(values, ones if scale is None else ones * scale)
        return _scaled(values, scale)

    def tensors(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yields (official name, tensor on `device`, multiplied by its scale), read as by `iter_safetensors`."""
        names = {(stored.path, stored.key): name for name, stored in self._weights.items()}

        def read(name: str, path: Path, file: Any, key: str) -> tuple[str, Tensor]:
            scale = self._scale(name)
            return name, _scaled(_read(path, file, key, device), None if scale is None else scale.to(device))

        opened = ((path, _open(path)) for path in self.shards)
        yield from _ahead(
            partial(read, names[path, key], path, file, key)
            for path, file in opened
            for key in file.offset_keys()
            if (path, key) in names
        )

    def _scale(self, name: str) -> Tensor | None:
        stored = self._scales.get(name)
        return None if stored is None else self._load(stored).float().flatten()

    def _load(self, stored: _Stored) -> Tensor:
        """The tensor as it lies in its file, which is open only while it is read."""
        try:
            with safe_open(stored.path, framework="pt") as file:
                return file.get_tensor(stored.key)
        except (SafetensorError, OSError) as error:
            raise unreadable(stored.path, error) from error


def _scaled(values: Tensor, scale: Tensor | None) -> Tensor:
    """The values times a scale [1] or [rows]; in float32 if there is one, or if they are in 8 or 64 bits."""
    if scale is None:
        return values if values.itemsize in (2, 4) else values.float()
    return values.float() * scale.reshape(-1, *[1] * (values.ndim - 1))


def _stored_tensors(paths: Iterable[Path]) -> dict[str, _Stored]:
    """All tensors of the files by name, without what is in front of all names."""
    found: dict[str, _Stored] = {}
    for path in paths:
        with _open(path) as file:
            for key in file.keys():  # noqa: SIM118  (no dict)
                if key in found:
                    raise UserError(f"{path}: tensor {key} occurs twice, also in {found[key].path.name}")
                part = file.get_slice(key)
                found[key] = _Stored(path, key, tuple(part.get_shape()), part.get_dtype())
    names = without_prefixes(found)
    return {names[key]: stored for key, stored in found.items()}


def _weights_and_scales(stored: Mapping[str, _Stored]) -> tuple[dict[str, _Stored], dict[str, _Stored]]:
    """The stored tensors by official name, and the scales of those that have one."""
    weights, scales = {}, {}
    for name, tensor in stored.items():
        layer, _, leaf = name.rpartition(".")
        weight = f"{layer}.weight"
        if leaf in SCALES and (weight in stored or f"{layer}._weight_qdata" in stored):
            scales[weight] = tensor
        elif leaf not in UNUSED:
            weights[weight if leaf == "_weight_qdata" else name] = tensor
    return weights, scales


def find_student_shards(folder: Path) -> list[Path]:
    """Paths of the student's weight files: those in its index or, without an index, all that match their name pattern.

    Raises `UserError` if `folder` is not a checkpoint or a file of the index is missing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a checkpoint: there is no such folder")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index} has no weight_map from tensors to files")
        paths = sorted({folder / name for name in weight_map.values()})
        for path in paths:
            if not path.is_file():
                link = " (a link that leads nowhere)" if path.is_symlink() else ""
                raise UserError(f"{path}, which {index.name} names, is missing{link}: download it again")
    else:
        paths = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not paths or not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a checkpoint: config.json or diffusion_pytorch_model*.safetensors is missing")
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises `UserError`, which names the file, if it holds none."""
    try:
        values = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return values
