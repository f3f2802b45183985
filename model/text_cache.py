"""Text features of prompts, cached on disk so that a start with a cached prompt need not load the 11 GB of umT5."""

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
from model.machine import device_cache_dir
from model.text import TextEncoder
from model.weights.offload import on_device

FEATURES_KEY = "features"  # of the tensor in a file


class CachedTextEncoder:
    """Text features of prompts: from the cache on disk if they are there, else by an offloaded encoder."""

    def __init__(self, encoder: Callable[[], TextEncoder], device: torch.device, cache_dir: Path | None = None) -> None:
        """`encoder` is called once, when it is needed: at once unless there are prompts in `cache_dir`.

        None: nothing is cached.
        """
        self._encoder, self._device, self._cache_dir = encoder, device, cache_dir
        if cache_dir is None or not any(cache_dir.glob("*.safetensors")):
            _ = self.encoder

    @cached_property
    def encoder(self) -> TextEncoder:
        """The encoder, where it is at home."""
        return self._encoder()

    def __call__(self, ids: Tensor) -> Tensor:
        """The token ids int64 [L] of a prompt -> its features [L, dim] on the device, in the dtype of the encoder."""
        key = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:32]
        path = self._cache_dir and self._cache_dir / f"{key}.safetensors"
        if path is not None:
            with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:  # absent, unreadable, damaged
                return file.get_tensor(FEATURES_KEY).to(self._device)
        with on_device(self._device, self.encoder):
            features = self.encoder(ids.to(self._device))
        if path is not None:
            with suppress(OSError, SafetensorError):  # full, or not ours: the next start reads the encoder again
                _save_features(features, path)
        return features


def cache_dir_for(file: Path, device: torch.device, dtype: torch.dtype) -> Path:
    """The folder of prompts answered by the encoder in that file, on such a device and in that dtype.

    The file counts as the same for as long as its place, size and time of change are.
    """
    state = file.stat()
    identity = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {dtype}"
    return device_cache_dir(device) / "prompts" / hashlib.sha256(identity.encode()).hexdigest()[:32]


def _save_features(features: Tensor, path: Path) -> None:
    """Writes the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # several processes may write the file at once
    with replacing(path, own) as temporary:
        save_file({FEATURES_KEY: features.cpu().contiguous()}, temporary)
