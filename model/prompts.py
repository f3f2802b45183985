"""Features of prompts, kept on the disk: umT5 is 11 GB, and a start that finds its prompt answered does not read it."""

import hashlib
import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.files import replacing
from model.machine import cache_folder
from model.tensors import visiting
from model.text import TextEncoder

NAME = "features"  # of the tensor in a file


class Prompts:
    """Text features of prompts: those that are kept, and else by an encoder, which visits the device."""

    def __init__(self, encoder: Callable[[], TextEncoder], device: torch.device, kept: Path | None = None) -> None:
        """`encoder` is called once, when it is needed: at once unless there are prompts in the folder `kept`.

        None: nothing is kept.
        """
        self._encoder, self._device, self._kept = encoder, device, kept
        if kept is None or not any(kept.glob("*.safetensors")):
            _ = self.encoder

    @cached_property
    def encoder(self) -> TextEncoder:
        """The encoder, where it is at home."""
        return self._encoder()

    def __call__(self, ids: Tensor) -> Tensor:
        """The token ids int64 [L] of a prompt -> its features [L, dim] on the device, in the dtype of the encoder."""
        path = self._kept and self._kept / f"{hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:32]}.safetensors"
        if path is not None:
            with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:  # absent, unreadable, damaged
                return file.get_tensor(NAME).to(self._device)
        with visiting(self._device, self.encoder):
            features = self.encoder(ids.to(self._device))
        if path is not None:
            with suppress(OSError, SafetensorError):  # full, or not ours: the next start reads the encoder again
                _keep(features, path)
        return features


def kept_for(file: Path, device: torch.device, dtype: torch.dtype) -> Path:
    """The folder of prompts answered by the encoder in that file, on such a device and in that dtype.

    The file counts as the same for as long as its place, size and time of change are.
    """
    state = file.stat()
    identity = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {dtype}"
    return cache_folder(device) / "prompts" / hashlib.sha256(identity.encode()).hexdigest()[:32]


def _keep(features: Tensor, path: Path) -> None:
    """Writes the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # several processes may write the file at once
    with replacing(path, own) as temporary:
        save_file({NAME: features.cpu().contiguous()}, temporary)
