"""The ranks of a session, their layout, and how they exchange data.

World size W = U R. U = gcd(W, heads) is the *Ulysses degree*: U consecutive ranks are a group that changes between a
split of tokens and a split of heads. R is the *ring degree*: R ranks, U apart, pass their keys and values on. Both are
methods for exact attention over a split sequence (DeepSpeed-Ulysses, arXiv 2309.14509; ring attention, arXiv
2310.01889); their combination takes any W.

Everything that ranks tell each other is an *exchange*: each rank sends some rows of a tensor to each rank of a group.
The VAE has a group of its own, because it may run beside the student, and NCCL must not carry two exchanges of a group
at once.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

Group = Literal["all", "ulysses", "ring", "vae"]  # "vae": all ranks, for the VAE and what follows it


class Transport(Protocol):
    """What carries exchanges."""

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
        """Sends rows[: send[0]] to the group's first member, the next send[1] rows to the second, and so on.

        Returns [sum(receive), ...], the rows that came from the members, in their order. It may be read only after
        `wait`; until then the transfer runs beside other work.
        """
        ...

    def wait(self, rows: Tensor) -> Tensor:
        """The result of `start`, once it has come."""
        ...


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a session.

    Attributes:
        rank: of this process, 0 to world - 1.
        world: number of ranks.
        ulysses: the Ulysses degree.
        transport: what carries exchanges.
    """

    rank: int
    world: int
    ulysses: int
    transport: Transport

    @property
    def ring(self) -> int:
        """The ring degree."""
        return self.world // self.ulysses

    def members(self, group: Group) -> list[int]:
        """The ranks of this rank's group, in order."""
        if group in ("all", "vae"):
            return list(range(self.world))
        if group == "ulysses":
            first = self.rank // self.ulysses * self.ulysses
            return list(range(first, first + self.ulysses))
        return list(range(self.rank % self.ulysses, self.world, self.ulysses))

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group = "all") -> Tensor:
        """Sends send[i] rows to the group's member i, and returns the receive[i] rows of every member i in turn."""
        return self.transport.wait(self.transport.start(rows, send, receive, group))

    def gather(self, rows: Tensor, sizes: Sequence[int], to: int | None = None, group: Group = "all") -> Tensor:
        """The rows of all ranks in turn, sizes[i] of rank i: on every rank, or on rank `to` only, elsewhere none."""
        if to is None:
            repeated = rows.expand(self.world, *rows.shape).flatten(0, 1)
            return self.exchange(repeated, [len(rows)] * self.world, sizes, group)
        send = [len(rows) if rank == to else 0 for rank in range(self.world)]
        return self.exchange(rows, send, sizes if self.rank == to else [0] * self.world, group)


class ProcessGroups:
    """Exchanges by torch.distributed: NCCL on GPUs, gloo on CPUs.

    They are functional collectives, which `torch.compile` traces and, with NCCL, CUDA graphs capture.
    """

    def __init__(self, ranks: Sequence[int], ulysses: int, device_type: str) -> None:
        """Makes the groups of a layout. All processes call it, also those that are not among `ranks`."""
        layout = torch.tensor(ranks).view(-1, ulysses)
        mesh = DeviceMesh(device_type, layout, mesh_dim_names=("ring", "ulysses"))
        everyone = DeviceMesh(device_type, layout.flatten(), mesh_dim_names=("all",))
        for_vae = dist.new_group(list(ranks))
        self._groups: dict[str, ProcessGroup] = {}
        if mesh.get_coordinate() is not None:
            self._groups = {name: mesh.get_group(name) for name in ("ring", "ulysses")}
            self._groups |= {"all": everyone.get_group(), "vae": cast(ProcessGroup, for_vae)}

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
        """As in `Transport`."""
        rows = rows.contiguous()
        sent = rows.view(torch.uint8) if rows.itemsize == 1 else rows  # gloo and NCCL do not know e4m3
        received = funcol.all_to_all_single(sent, list(receive), list(send), self._groups[group])
        return received.view(rows.dtype) if rows.itemsize == 1 else received

    def wait(self, rows: Tensor) -> Tensor:
        """As in `Transport`."""
        return funcol.wait_tensor(rows)


def ulysses_degree(world: int, heads: int) -> int:
    """The Ulysses degree of a world size: as many ranks as heads can be split among."""
    return math.gcd(world, heads)


def even_borders(count: int, parts: int, unit: int = 1) -> tuple[int, ...]:
    """Cuts 0 .. count into `parts` ranges, as even as multiples of `unit` allow; returns their parts + 1 borders.

    Raises `ValueError` if a range would be empty.
    """
    units = -(-count // unit)
    if units < parts:
        raise ValueError(f"count: {count} in units of {unit}, wanted at least one for each of {parts} ranks")
    return (*(unit * (units * i // parts) for i in range(parts)), count)


def sizes(borders: Sequence[int]) -> list[int]:
    """The lengths of the ranges between borders."""
    return [end - start for start, end in itertools.pairwise(borders)]
