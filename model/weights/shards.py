"""Reading safetensors files: all tensors of several files in order, or single tensors by name."""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import UserError
from model.linear import QuantizedRows
from model.offload import pin_memory_for

READER_THREADS = 4  # also the number of tensors that are read ahead


def iter_safetensors(paths: Iterable[Path], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor on `device`) for all tensors of the files, in the order in which they lie in each file.

    A few threads read ahead. For a GPU they read each tensor into pinned memory and copy it asynchronously, so that
    reading and copying overlap. Raises `UserError`, which names the file, if one is damaged.
    """
    with ThreadPoolExecutor(READER_THREADS) as readers:
        reading: deque[Future[tuple[str, Tensor]]] = deque()
        for path, file in ((path, _open(path)) for path in paths):
            for name in file.offset_keys():
                reading.append(readers.submit(_read, path, file, name, device))
                if len(reading) > READER_THREADS:
                    yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt").__enter__()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read, it is truncated or damaged: {error}") from error


def _read(path: Path, file: Any, name: str, device: torch.device) -> tuple[str, Tensor]:
    try:
        return name, pin_memory_for(file.get_tensor(name), device).to(device, non_blocking=True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read, it is truncated or damaged: {error}") from error


class ShardReader:
    """Reads the student's tensors by name from its official shards. A file is open only while a tensor is read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.shards = tuple(paths)
        self._files: dict[str, Path] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    self._files |= dict.fromkeys(file.keys(), path)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read, it is truncated or damaged: {error}") from error

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor | QuantizedRows:
        """The tensor `name`, which must have this shape; as `QuantizedRows` if torchao has quantised it."""
        owner, _, leaf = name.rpartition(".")
        values = f"{owner}._{leaf}_qdata"
        if values not in self._files:
            return self._tensor(name, shape)
        scale = self._tensor(f"{owner}._{leaf}_scale", None)
        if scale.numel() not in (1, shape[0]):
            raise UserError(
                f"{self.shards[0].parent}: {name} has scales {list(scale.shape)}, expected one, or one for each row"
            )
        return QuantizedRows(self._tensor(values, shape), scale.float().flatten().expand(shape[0]))

    def _tensor(self, name: str, shape: tuple[int, ...] | None) -> Tensor:
        if name not in self._files:
            raise UserError(f"{self.shards[0].parent}: tensor {name} {list(shape or ())} missing")
        path = self._files[name]
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise UserError(f"{path}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor


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
                raise UserError(f"{path}, which {index.name} names, is missing")
    else:
        paths = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not paths or not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a checkpoint: config.json or diffusion_pytorch_model*.safetensors is missing")
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises `UserError`, which names the file, if it holds none."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return values
