"""Maps the tensors of an official checkpoint to the parameters of a module, and loads them.

The VAE uses the official names. So does the student, except for layers that concatenate several official ones. The
encoders are modules of transformers, whose parameters have other names, so a table of name patterns describes them.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.errors import UserError

# What is put in front of all names of a model: by ComfyUI, torch.compile, DataParallel and trainers.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "module.", "model.")


class ParamMapping(NamedTuple):
    """A tensor of the official checkpoint: its shape there, and the parameters that it fills.

    With several `params`, the official tensor is their concatenation along dimension 0, in this order. With
    `start_row`, the official tensor fills only the rows of its one parameter that begin there.
    """

    shape: tuple[int, ...]
    params: tuple[str, ...]
    start_row: int | None = None


def identity_map(module: nn.Module) -> dict[str, ParamMapping]:
    """The map of a module whose parameters have the official names."""
    return {name: ParamMapping(tuple(tensor.shape), (name,)) for name, tensor in module.state_dict().items()}


def pattern_map(module: nn.Module, names: Mapping[str, str | tuple[str, ...]], layers: int) -> dict[str, ParamMapping]:
    """The map of a module from a table {official name: parameter name or names}.

    `{i}` in the names stands for each of 0 .. layers - 1. Several parameters form one official tensor by concatenation.
    """
    state = module.state_dict()
    param_map = {}
    for official, patterns in names.items():
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        for i in range(layers) if "{i}" in official else (0,):
            targets = tuple(pattern.format(i=i) for pattern in patterns)
            first, *rest = (tuple(state[name].shape) for name in targets)
            rows = sum(shape[0] for shape in (first, *rest)) if rest else None
            param_map[official.format(i=i)] = ParamMapping(first if rows is None else (rows, *first[1:]), targets)
    return param_map


def joined_map(module: nn.Module, joined: Mapping[str, tuple[str, ...]]) -> dict[str, ParamMapping]:
    """The map of a module in which some layers concatenate the rows of several official layers.

    `joined` is {end of our layer's name: ends of the official names, in the order of rows}. The parts have equally many
    rows. All other parameters have the official names.
    """
    param_map = {}
    for name, tensor in module.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        end = next((end for end in joined if layer.endswith(f".{end}")), None)
        if end is None:
            param_map[name] = ParamMapping(tuple(tensor.shape), (name,))
            continue
        rows = tensor.shape[0] // len(joined[end])
        for i, official in enumerate(joined[end]):
            start = i * rows if len(joined[end]) > 1 else None
            param_map[f"{layer.removesuffix(end)}{official}.{leaf}"] = ParamMapping(
                (rows, *tensor.shape[1:]), (name,), start
            )
    return param_map


def load_parameters(
    module: nn.Module,
    param_map: Mapping[str, ParamMapping],
    tensors: Iterable[tuple[str, Tensor]],
    source: Path | str,
    device: torch.device,
    dtype: torch.dtype | None,
    offloaded: Collection[str] = (),
) -> None:
    """Replaces the parameters of `module` by official tensors.

    Args:
        module: may be on the meta device.
        param_map: the mapping of each official tensor, by its name.
        tensors: yields (official name, tensor).
        source: names the tensors' origin in error messages.
        device: where parameters go.
        dtype: of the parameters; None keeps each tensor's own.
        offloaded: names of submodules whose parameters go to host memory instead.

    Raises `UserError`, which names the tensor, if one is missing, unknown, repeated, of the wrong shape or not finite.
    """
    offloaded_prefixes = tuple(f"{name}." for name in offloaded)
    missing, all_finite = dict(param_map), {}
    for name, tensor in tensors:
        mapping = _take(missing, param_map, name, tuple(tensor.shape), source)
        there = torch.device("cpu") if mapping.params[0].startswith(offloaded_prefixes) else device
        if mapping.start_row is not None:
            all_finite[name] = is_finite(_load_rows(module, mapping, tensor, there, dtype or tensor.dtype))
            continue
        parts = tensor.chunk(len(mapping.params)) if len(mapping.params) > 1 else (tensor,)
        for part, target in zip(parts, mapping.params, strict=True):
            shape = module.get_parameter(target).shape
            placed = part.reshape(shape).to(there, dtype, copy=True, memory_format=torch.contiguous_format)
            set_parameter(module, target, placed)
            all_finite[target] = is_finite(placed)
    _require_all(missing, source)
    for name, finite in all_finite.items():  # only now, as each answer waits for the device
        require_finite(finite, name, source)


def check_tensors(
    param_map: Mapping[str, ParamMapping],
    tensors: Iterable[tuple[str, tuple[int, ...], Path]],
    source: Path | str,
) -> None:
    """Checks the tensors of a checkpoint, given as (official name, shape, file), like `load_parameters`."""
    missing = dict(param_map)
    for name, shape, path in tensors:
        _take(missing, param_map, name, shape, path)
    _require_all(missing, source)


def _take(
    missing: dict[str, ParamMapping],
    param_map: Mapping[str, ParamMapping],
    name: str,
    shape: tuple[int, ...],
    source: Path | str,
) -> ParamMapping:
    """Removes the tensor's mapping from `missing`. Raises `UserError` if there is none or the shape is another."""
    mapping = missing.pop(name, None)
    if mapping is None:
        what = "occurs twice" if name in param_map else "is not part of this model"
        lora = ": merge the LoRA into the weights first" if "lora" in name.lower() else ""
        raise UserError(f"{source}: tensor {name} {list(shape)} {what}{lora}")
    if shape != mapping.shape:
        raise UserError(f"{source}: tensor {name} has shape {list(shape)}, expected {list(mapping.shape)}")
    return mapping


def _require_all(missing: Mapping[str, ParamMapping], source: Path | str) -> None:
    if missing:
        name, mapping = next(iter(missing.items()))
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{source}: tensor {name} {list(mapping.shape)}{more} missing")


def is_finite(x: Tensor) -> Tensor:
    """Whether all of x is finite: bool [] on its device, from one pass over it. 8-bit floats count as finite."""
    if x.itemsize == 1 or not x.numel():
        return torch.ones((), dtype=torch.bool)
    low, high = x.aminmax()
    return low.isfinite() & high.isfinite()


def require_finite(finite: Tensor | bool, name: str, source: Path | str) -> None:
    """Raises `UserError` unless `finite`, which says it of that tensor."""
    if not finite:
        raise UserError(f"{source}: {name} holds NaN or infinite numbers: download it again")


def without_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Each name without what training frameworks and ComfyUI put in front of all names of a model."""
    short = {name: name.replace("_orig_mod.", "") for name in names}
    while short and (prefix := next((p for p in PREFIXES if all(x.startswith(p) for x in short.values())), None)):
        short = {name: x.removeprefix(prefix) for name, x in short.items()}
    return short


def _load_rows(
    module: nn.Module, mapping: ParamMapping, tensor: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Fills the mapping's rows of its parameter, which is allocated with the first of them; returns these rows."""
    target, start = mapping.params[0], mapping.start_row
    parameter = module.get_parameter(target)
    if (parameter.device.type, parameter.dtype) != (device.type, dtype):
        parameter = set_parameter(module, target, torch.empty(parameter.shape, device=device, dtype=dtype))
    rows = parameter.data[start:][: len(tensor)]
    rows.copy_(tensor)
    return rows


def set_parameter(module: nn.Module, target: str, tensor: Tensor) -> nn.Parameter:
    """Replaces the parameter of that dotted name by one that holds `tensor`."""
    owner, _, leaf = target.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    setattr(module.get_submodule(owner), leaf, parameter)
    return parameter
