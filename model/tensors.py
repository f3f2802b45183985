"""Tensors from files into modules: shards of safetensors, and what goes where; and modules that only visit a device."""

import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.errors import UserError
from model.slots import ParamMapping

READER_THREADS = 4  # threads, and tensors that are read ahead


def load_parameters(
    module: nn.Module,
    param_map: Mapping[str, ParamMapping],
    tensors: Iterable[tuple[str, Tensor]],
    source: Path | str,
    device: torch.device,
    dtype: torch.dtype | None,
    offloaded: Collection[str] = (),
) -> None:
    """Replaces the parameters of `module` by official tensors, on `device`, in `dtype` or their own.

    `tensors` yields (official name, tensor); `source` names them in errors. Submodules named in
    `offloaded` go to the host's memory.
    """
    offloaded_prefixes = tuple(f"{name}." for name in offloaded)
    missing = dict(param_map)
    for name, tensor in tensors:
        mapping = missing.pop(name, None)
        if mapping is None:
            what = "occurs twice" if name in param_map else "is not part of this model"
            raise UserError(f"{source}: tensor {name} {list(tensor.shape)} {what}")
        if tuple(tensor.shape) != mapping.shape:
            raise UserError(f"{source}: tensor {name} has shape {list(tensor.shape)}, expected {list(mapping.shape)}")
        there = torch.device("cpu") if mapping.params[0].startswith(offloaded_prefixes) else device
        if mapping.start_row is not None:
            _load_rows(module, mapping, tensor, there, dtype or tensor.dtype)
            continue
        parts = tensor.chunk(len(mapping.params)) if len(mapping.params) > 1 else (tensor,)
        for part, target in zip(parts, mapping.params, strict=True):
            shape = module.get_parameter(target).shape
            placed = part.reshape(shape).to(there, dtype, copy=True, memory_format=torch.contiguous_format)
            set_parameter(module, target, placed)
    if missing:
        name, mapping = next(iter(missing.items()))
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{source}: tensor {name} {list(mapping.shape)}{more} missing")


def _load_rows(
    module: nn.Module, mapping: ParamMapping, tensor: Tensor, device: torch.device, dtype: torch.dtype
) -> None:
    """Fills the mapping's rows of its parameter, which gets its memory with the first of them."""
    target, start = mapping.params[0], mapping.start_row
    parameter = module.get_parameter(target)
    if (parameter.device.type, parameter.dtype) != (device.type, dtype):
        parameter = set_parameter(module, target, torch.empty(parameter.shape, device=device, dtype=dtype))
    parameter.data[start:][: len(tensor)] = tensor.to(device, dtype)


def set_parameter(module: nn.Module, target: str, tensor: Tensor) -> nn.Parameter:
    """Makes the tensor the parameter of that name."""
    owner, _, leaf = target.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    setattr(module.get_submodule(owner), leaf, parameter)
    return parameter


def iter_safetensors(paths: Iterable[Path], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """All tensors of these files, as they lie there, on `device`; raises `UserError`, naming it, if one is damaged.

    A few threads read ahead, each tensor into pinned memory and from there to a GPU, so that disk and bus work at once.
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


def find_student_shards(folder: Path) -> list[Path]:
    """The student's weight files: those its index names, or else all of its name pattern."""
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
    """The JSON object in that file; raises `UserError`, naming it, if there is none."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return values


@contextmanager
def on_device(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """The modules are on `device` while the body runs; where they come from, their memory stays for their return."""
    offloaded: list[tuple[dict[str, Any], str, Tensor]] = [
        (table, name, x)
        for module in modules
        for owner in module.modules()
        for table in (owner._parameters, owner._buffers)
        for name, x in table.items()
        if x is not None and x.device != device
    ]
    for table, name, x in offloaded:
        there = x.detach().to(device)
        table[name] = nn.Parameter(there, requires_grad=False) if isinstance(x, nn.Parameter) else there
    try:
        yield
    finally:
        for table, name, x in offloaded:
            table[name] = x


def pin_memory_for(x: Tensor, device: torch.device) -> Tensor:
    """The tensor where a copy to that device can be made from without waiting for what the device is doing."""
    return x.pin_memory() if x.device.type == "cpu" and device.type == "cuda" else x
