"""The trained networks that ship with the project: safetensors files with their settings in the header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model.errors import UserError
from model.files import replacing

FOLDER = Path(__file__).parent / "weights"


def save_trained(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Writes tensors to a safetensors file, with `settings`, which JSON can hold, in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        temporary.write_bytes(save(contiguous, {"settings": json.dumps(settings)}))


def load_trained(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and settings that `save_trained` wrote. Raises `UserError` if the file is missing or another's."""
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["settings"])
            return {name: file.get_tensor(name) for name in file.keys()}, settings  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a trained network of this project ({error})") from error
