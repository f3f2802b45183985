"""One rank of many on one GPU: its own shapes and operations, with copies on the device instead of exchanges.

So one GPU measures what each of several would do, all but the links between them. What comes from other ranks has the
right shape and number of bytes, but not the right values.
"""

from collections.abc import Sequence

from torch import Tensor

from model.parallel.ranks import Group, Ranks, ulysses_degree


class EmulatedTransport:
    """Exchanges that copy as many bytes as a rank receives, from what it sends."""

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:  # noqa: ARG002
        """As `model.parallel.ranks.Transport.start`; the rows are those that are sent, over and over."""
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        if not len(rows):
            return received.zero_()
        for part in received.split(len(rows)):
            part.copy_(rows[: len(part)])
        return received

    def wait(self, rows: Tensor) -> Tensor:
        """As `model.parallel.ranks.Transport.wait`."""
        return rows


def emulated_ranks(rank: int, world: int, heads: int) -> Ranks:
    """The ranks as rank `rank` of `world` sees them, for a student with this number of attention heads."""
    return Ranks(rank, world, ulysses_degree(world, heads), EmulatedTransport())
