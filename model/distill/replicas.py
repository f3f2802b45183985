"""Data-parallel training: every process that torchrun started has a replica of the networks and batches of its own.

Replicas stay equal, as they average their gradients and begin with the same weights. The first one decides how far the
training is, writes checkpoints and measures.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def torchrun_replicas() -> Iterator[None]:
    """Joins the replicas that torchrun started, if it did: by NCCL if every one has a GPU of its own, else by Gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


class Replicas:
    """The replicas of a training: those of the default process group, or this process alone."""

    def __init__(self) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.index, self.count = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)

    @property
    def is_first(self) -> bool:
        """Whether this replica decides, writes and measures."""
        return self.index == 0

    def first_says(self, value: float) -> float:
        """The value that the first replica has."""
        if self.count == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all replicas."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces tensors by their means over the replicas."""
        if self.count == 1:
            return
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= self.count

    def average_gradients(self, network: nn.Module) -> None:
        """Replaces gradients by their means over the replicas. All replicas have gradients of the same parameters."""
        self.average(x.grad for x in network.parameters() if x.grad is not None)
