"""The trained networks that are part of the package: safetensors files with their settings in the header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from model.errors import UserError
from model.files import replacing

FOLDER = Path(__file__).parent / "bundled"
SCALE = ".scale"  # after the name of a tensor in 8 bits: the size of its steps, one for each row


def save_trained(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Writes tensors to a safetensors file, with `settings`, which JSON can hold, in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        temporary.write_bytes(save(contiguous, {"settings": json.dumps(settings)}))


def in_8_bits(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor as int8 with float32 scales, as `load_trained` reads it: off by half a step at most.

    A row is everything with the same first index, and its step is its largest magnitude / 127.
    """
    steps = tensor.detach().float().abs().flatten(1).amax(1).clamp_min(1e-30) / 127
    rounded = (tensor.detach() / steps.view(-1, *[1] * (tensor.ndim - 1))).round()
    return {name: rounded.to(torch.int8), name + SCALE: steps}


def load_trained(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and settings that `save_trained` wrote; tensors in 8 bits come as float32.

    Raises `UserError` if the file is missing or another's.
    """
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name in [name for name in tensors if name.endswith(SCALE)]:
                tensor, steps = tensors[name.removesuffix(SCALE)], tensors.pop(name)
                tensors[name.removesuffix(SCALE)] = tensor * steps.view(-1, *[1] * (tensor.ndim - 1))
            return tensors, settings
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a trained network of this project ({error})") from error


@torch.no_grad()
def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a module trained tensors, in its own dtype and on its own device. What is not among them becomes 0.

    So a file can leave out what was not trained and adds nothing. Raises `UserError` for a tensor that the module does
    not have, or of another shape.
    """
    state = module.state_dict()
    for name, tensor in tensors.items():
        if name not in state or state[name].shape != tensor.shape:
            raise UserError(f"{name} {list(tensor.shape)}: the network has no such tensor")
    for name, tensor in state.items():
        tensor.copy_(tensors[name]) if name in tensors else tensor.zero_()
