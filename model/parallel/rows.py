"""The rows of a picture, split among ranks, and what a convolution needs of the rows beyond a slab.

A rank has a slab: some rows of every latent frame, and the rows of pixels that they become. A 3 x 3 convolution needs
one row beyond each edge of the slab, the *halo*, which comes from the neighbours:

    1. The slab's first and last row are sent off.
    2. The slab is convolved as if it were a whole picture. All rows but the first and last of the result are right.
    3. The halo has come. The *strip* of six rows around the two edges is convolved; the two rows in the middle of its
       halves replace the first and last row of the result.

So the exchange runs beside the convolution, and nothing but a strip is computed twice. At the top and the bottom of the
picture the halo is zeros, which is what a convolution pads with. Operations on single pixels need no halo, and
attention gathers the keys and values of all slabs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import UserError
from model.parallel.ranks import Ranks, even_borders, sizes


@dataclass(frozen=True)
class RowSplit:
    """The slabs of all ranks.

    Attributes:
        ranks: this rank among all.
        borders: rank i has the rows borders[i] to borders[i + 1] - 1 of a latent frame.
    """

    ranks: Ranks
    borders: tuple[int, ...]

    @classmethod
    def of_rows(cls, ranks: Ranks, rows: int) -> "RowSplit":
        """Splits latent frames of this many rows. Raises `UserError` if there are fewer than ranks."""
        try:
            return cls(ranks, even_borders(rows, ranks.world))
        except ValueError as error:
            raise UserError(
                f"{ranks.world} GPUs: the picture has {rows} rows of latents, which is less; take a larger picture or"
                " fewer GPUs"
            ) from error

    def own(self, x: Tensor, axis: int = 2) -> Tensor:
        """The slab of x, whose axis `axis` has all rows of the picture, at any scale."""
        scale = x.shape[axis] // self.borders[-1]
        start, end = (scale * border for border in self.borders[self.ranks.rank :][:2])
        return x.narrow(axis, start, end - start)

    def gather(self, x: Tensor, axis: int = 2, to: int | None = None) -> Tensor:
        """All slabs of x along `axis`, whose length is a multiple of the slab's rows.

        They come on every rank, or on rank `to` only; elsewhere the axis then has length 0.
        """
        counts = sizes(self.borders)
        scale = x.shape[axis] // counts[self.ranks.rank]
        rows = x.movedim(axis, 0).contiguous()
        return self.ranks.gather(rows, [scale * count for count in counts], to, "vae").movedim(0, axis)

    def with_halo(self, operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The slab's part of `operation` on the picture, one that looks one row beyond each row.

        x [T, C, H, W], in channels-last memory; the result has a multiple of H rows.
        """
        halo = self.start_halo(x)
        y = operation(x)
        self.replace_edges(y, operation(self.strip(x, halo)))
        return y

    def with_halo_below(self, operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The slab's part of an `operation` that halves rows and looks one row beyond every second row."""
        halo = self.start_halo(x)
        y = operation(x)
        strip = self.strip(x, halo)
        if self.ranks.rank + 1 < self.ranks.world:
            y[:, :, -1:] = operation(strip[:, :, 3:].contiguous(memory_format=torch.channels_last))
        return y

    def start_halo(self, x: Tensor) -> Tensor:
        """Sends the first and last row of x [T, C, H, W] to the neighbours, and begins to receive theirs."""
        rows = [x[:, :, i].permute(0, 2, 1) for i, there in zip((0, -1), self._neighbours(), strict=True) if there]
        counts = self._halo_counts(x)
        return self.ranks.transport.start(torch.cat(rows).flatten(0, 1), counts, counts, "vae")

    def strip(self, x: Tensor, halo: Tensor) -> Tensor:
        """The six rows around the edges of x [T, C, H, W], in channels-last memory; `halo` is from `start_halo`.

        They are the row above the slab, its first two rows, its last two, and the row below.
        """
        frames, channels, rows, columns = x.shape
        received = iter(self.ranks.transport.wait(halo).unflatten(0, (-1, frames, columns)))
        above, below = (
            next(received).permute(0, 2, 1)[:, :, None] if there else x.new_zeros(frames, channels, 1, columns)
            for there in self._neighbours()
        )
        first = [above, x[:, :, :2]] if rows > 1 else [above, x, below]
        last = [x[:, :, -2:], below] if rows > 1 else [above, x, below]
        return torch.cat([*first, *last], dim=2).contiguous(memory_format=torch.channels_last)

    def repeat_edges(self, x: Tensor) -> Tensor:
        """The first row of x [T, C, H, W] three times, then the last one three times: what is added to a strip."""
        rows = [x[:, :, i : i + 1].expand(-1, -1, 3, -1) for i in (0, x.shape[2] - 1)]
        return torch.cat(rows, dim=2).contiguous(memory_format=torch.channels_last)

    def replace_edges(self, y: Tensor, strip: Tensor) -> None:
        """Writes what an operation made of a strip over the edges of what it made of the slab, y [T, C, n H, W]."""
        scale = strip.shape[2] // 6
        y[:, :, :scale] = strip[:, :, scale : 2 * scale]
        y[:, :, -scale:] = strip[:, :, 4 * scale : 5 * scale]

    def _neighbours(self) -> tuple[bool, bool]:
        """Whether there is a slab above and below."""
        return self.ranks.rank > 0, self.ranks.rank + 1 < self.ranks.world

    def _halo_counts(self, x: Tensor) -> list[int]:
        """The number of pixels that this rank and each other send each other."""
        pixels = len(x) * x.shape[3]
        return [pixels if abs(other - self.ranks.rank) == 1 else 0 for other in range(self.ranks.world)]
