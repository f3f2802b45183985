"""Text features cached on disk, so that a start with a known prompt does not load the 11 GB of umT5."""

import hashlib
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.errors import UserError
from model.files import replacing
from model.machine import device_cache_dir
from model.offload import on_device
from model.text import TextEncoder

FEATURES_KEY = "features"  # name of the tensor in a cache file


class CachedTextEncoder:
    """Text features of prompts, from the cache on disk or, for a new prompt, from the text encoder.

    The encoder is loaded when it is first needed. It stays in host memory and is on the device only while it runs; or
    it runs on the CPU, where a device lacks the memory: for umT5-xxl one pass over 11 GB, and no room on the device.
    """

    def __init__(
        self,
        encoder: Callable[[], TextEncoder],
        device: torch.device,
        cache_dir: Path | None = None,
        text_device: torch.device | None = None,
    ) -> None:
        """`encoder` loads the text encoder and is called at most once.

        It is called here unless `cache_dir` already holds features, else when a prompt is new. If `cache_dir` is None,
        nothing is cached. Features go to `device`; the encoder runs on `text_device`, or there if that is None.
        """
        self._encoder, self._device, self._cache_dir = encoder, device, cache_dir
        self._text_device = device if text_device is None else text_device
        if cache_dir is None or not any(cache_dir.glob("*.safetensors")):
            _ = self.encoder

    @cached_property
    def encoder(self) -> TextEncoder:
        """The text encoder, in host memory."""
        return self._encoder()

    def __call__(self, ids: Tensor) -> Tensor:
        """Token ids int64 [L] of a prompt -> features [L, dim] on the device, in the encoder's dtype."""
        key = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:32]
        path = self._cache_dir and self._cache_dir / f"{key}.safetensors"
        if path is not None:
            with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:  # missing or damaged
                return file.get_tensor(FEATURES_KEY).to(self._device)
        with on_device(self._text_device, self.encoder):
            features = self.encoder(ids.to(self._text_device)).to(self._device)
        if path is not None:
            try:
                _save_features(features, path)
            except (OSError, SafetensorError) as error:  # disk full or not writable
                _say_uncached(f"{path} cannot be written ({error})")
        return features


def cache_dir_for(file: Path, device: torch.device, dtype: torch.dtype) -> Path | None:
    """The directory that caches the features of one encoder file for a device and a dtype.

    The encoder file is identified by its path, size and modification time. None if there is no place for a cache, which
    one line on stderr says.
    """
    state = file.stat()
    identity = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {dtype}"
    try:
        folder = device_cache_dir(device)
    except UserError as error:
        _say_uncached(str(error))
        return None
    return folder / "prompts" / hashlib.sha256(identity.encode()).hexdigest()[:32]


def _say_uncached(reason: str) -> None:
    print(f"note: the prompt's features are not kept: {reason}", file=sys.stderr)


def _save_features(features: Tensor, path: Path) -> None:
    """Writes the features to `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The temporary name is unique because several processes may write the same file.
    with replacing(path, f".{path.name}.{secrets.token_hex(8)}.tmp") as temporary:
        save_file({FEATURES_KEY: features.cpu().contiguous()}, temporary)
