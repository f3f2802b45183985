"""A hash of networks' weights, by which two processes know that they have the same."""

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

SAMPLED = 1024  # numbers of each tensor that are looked at: a hash of 28 GB would take a minute


def digest_of_weights(networks: Iterable[nn.Module]) -> str:
    """A hash of the names, shapes and dtypes of all weights, and of `SAMPLED` numbers of each, evenly spread."""
    hashed = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            flat = tensor.detach().reshape(-1)
            few = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
            hashed.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            hashed.update(few.view(torch.uint8).numpy().tobytes() if few.numel() else b"")
    return hashed.hexdigest()
