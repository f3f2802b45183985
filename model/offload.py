"""Offloading: modules that stay in host memory and are on the GPU only while they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def on_device(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """Context manager: the modules are on `device` while the body runs.

    Parameters and buffers are copied to the device, and the original tensors are put back at the end, also after an
    exception. The original memory is kept, so nothing is copied back.
    """
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
    """x in pinned memory if it is on the CPU and `device` is a GPU, so that the copy can be asynchronous; else x."""
    return x.pin_memory() if x.device.type == "cpu" and device.type == "cuda" else x
