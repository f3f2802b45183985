"""The student's tokens, split among ranks, and self-attention over all of them.

A rank has a contiguous range of the chunk's tokens. Norms, linear layers and the attention to text, image and audio
need no other tokens. For self-attention, ranks exchange q, k and v in one go:

    q, k, v of own tokens, all heads  ->  of the tokens of the Ulysses group, heads / U  ->  attention
    output of the group's tokens      ->  of own tokens, all heads

With a ring degree above 1, the keys and values of the other groups come round while those at hand are attended to; the
results are merged by their log-sum-exp. The next block travels beside the attention of the last one, which pays because
attention to a block takes longer than its transfer. The exchange of Ulysses is not overlapped: every head needs all
tokens before it can begin.

In FP8, e4m3 operands travel, with the scales of the queries. They are those that one rank would make, bit for bit: the
scales of keys and values are taken from a sample of tokens that all ranks see, and ranges begin at multiples of 16,
where a group of tokens of `kernels.chunk_attention_fp8.interleave` does.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.chunk_attention import chunk_attention, chunk_attention_with_lse, merge_attention
from kernels.chunk_attention_fp8 import chunk_attention_fp8_with_lse
from kernels.common import FP8
from kernels.rms_norm_rope import kv_statistics, sample_tokens
from model.errors import UserError
from model.parallel.ranks import Ranks, even_borders, sizes

UNIT = 16  # tokens; ranges begin at its multiples


class FP8Operands(NamedTuple):
    """What `chunk_attention_fp8` attends with: e4m3 tensors and their scales."""

    q: Tensor  # [tokens, heads, head_dim]
    q_scale: Tensor  # [tokens, heads]
    k: Tensor  # [tokens, heads, head_dim]
    k_scale: Tensor  # [heads]
    v: Tensor  # [heads, head_dim, tokens rounded up to 16]
    v_scale: Tensor  # [heads, head_dim]


@dataclass(frozen=True)
class TokenSplit:
    """The ranges of tokens of all ranks.

    Attributes:
        ranks: this rank among all.
        borders: rank i has the tokens borders[i] to borders[i + 1] - 1.
        tokens_per_frame: tokens of a latent frame.
        samples: which of the own tokens are in the sample of `sample_tokens`, int64, in the sample's order.
        sample_order: the places of the sample's tokens among the samples of all ranks in turn, int64.
    """

    ranks: Ranks
    borders: tuple[int, ...]
    tokens_per_frame: int
    samples: Tensor
    sample_order: Tensor

    @classmethod
    def of_grid(cls, ranks: Ranks, grid: tuple[int, int, int], device: torch.device) -> "TokenSplit":
        """Splits the tokens of a grid (latent frames, rows, columns). Raises `UserError` if there are too few."""
        frames, rows, columns = grid
        count = frames * rows * columns
        try:
            borders = even_borders(count, ranks.world, UNIT)
        except ValueError as error:
            raise UserError(
                f"{ranks.world} GPUs: a chunk has {count} tokens, too few for so many; take a larger picture or fewer"
            ) from error
        chosen = sample_tokens(count)
        by_rank = [[i for i, t in enumerate(chosen) if a <= t < b] for a, b in itertools.pairwise(borders)]
        places = {i: place for place, i in enumerate(itertools.chain(*by_rank))}
        own = [chosen[i] - borders[ranks.rank] for i in by_rank[ranks.rank]]
        order = [places[i] for i in range(len(chosen))]
        return cls(ranks, borders, rows * columns, *(torch.tensor(x, device=device).long() for x in (own, order)))

    @property
    def start(self) -> int:
        """The first of the own tokens."""
        return self.borders[self.ranks.rank]

    @property
    def end(self) -> int:
        """The first token after the own ones."""
        return self.borders[self.ranks.rank + 1]

    @property
    def frames(self) -> slice:
        """The latent frames that own tokens belong to."""
        return slice(self.start // self.tokens_per_frame, -(-self.end // self.tokens_per_frame))

    @property
    def num_frames(self) -> int:
        """How many latent frames own tokens belong to."""
        return self.frames.stop - self.frames.start

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all tokens, from those of the own ones [n, ...]."""
        return self.ranks.gather(x, sizes(self.borders))

    def gather_first(self, x: Tensor, count: int) -> Tensor:
        """Rows of the chunk's first `count` tokens, from those of the own ones [n, ...]."""
        return self.ranks.gather(
            x[: max(count - self.start, 0)], sizes([min(border, count) for border in self.borders])
        )

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Minima and maxima over the tokens of all ranks, each [columns], of x [n, columns]."""
        each = self.ranks.gather(torch.stack((x.amin(0), x.amax(0)))[None], [1] * self.ranks.world)
        return each[:, 0].amin(0), each[:, 1].amax(0)

    def kv_statistics(self, k: Tensor, v: Tensor, k_weight: Tensor, rope: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`kernels.rms_norm_rope.kv_statistics` of the sample of all tokens.

        k, v [n, head, head_dim] and rope [n, head_dim / 2, 2] are those of the own tokens, before the norm.
        """
        parts = [x[self.samples] for x in (k, v, rope)]
        packed = torch.cat([_bytes(x.flatten(1)) for x in parts], dim=1)
        counts = [sum(a <= t < b for t in sample_tokens(self.borders[-1])) for a, b in itertools.pairwise(self.borders)]
        rows = self.ranks.gather(packed, counts)[self.sample_order]
        widths = [x[:1].numel() * x.itemsize for x in (k, v, rope)]
        k, v, rope = (
            columns.contiguous().view(x.dtype).unflatten(1, x.shape[1:])
            for columns, x in zip(rows.split(widths, 1), parts, strict=True)
        )
        return kv_statistics(k, v, k_weight, rope, eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the own tokens to all tokens: q, k, v [n, head, head_dim] -> [n, head, head_dim]."""
        degree = self.ranks.ulysses
        packed = torch.stack([x.unflatten(1, (degree, -1)).transpose(0, 1) for x in (q, k, v)], dim=2)
        rows = self.ranks.exchange(packed.flatten(0, 1), [len(q)] * degree, self._sizes_in_group(), "ulysses")
        q, k, v = rows.unbind(1)  # [token of the group, head of this rank, head_dim]
        if self.ranks.ring == 1:
            return self._to_own_tokens(chunk_attention(q, k, v))

        def attend_to(block: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
            keys, values = block.view(2, tokens, *k.shape[1:])
            return chunk_attention_with_lse(q, keys, values)

        token_numel = k[0].numel()
        return self._to_own_tokens(
            self._ring(torch.stack((k, v)).flatten(), lambda tokens: 2 * tokens * token_numel, attend_to)
        )

    def attend_fp8(self, operands: FP8Operands, dtype: torch.dtype) -> Tensor:
        """`attend` of the operands of own tokens and all heads -> [n, head, head_dim] in `dtype`."""
        q, q_scale, k, k_scale, v, v_scale = self._exchange_fp8(operands)
        if self.ranks.ring == 1:
            return self._to_own_tokens(chunk_attention_fp8_with_lse(q, q_scale, k, k_scale, v, v_scale, dtype=dtype)[0])
        token_numel = k[0].numel()

        def attend_to(block: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
            keys, values = block.view(FP8).split([tokens * token_numel, _padded(tokens) * token_numel])
            keys, values = keys.view(tokens, *k.shape[1:]), values.view(*v.shape[:2], -1)
            return chunk_attention_fp8_with_lse(q, q_scale, keys, k_scale, values, v_scale, dtype=dtype)

        block = torch.cat((_bytes(k.flatten()), _bytes(v.flatten())))
        return self._to_own_tokens(
            self._ring(block, lambda tokens: (tokens + _padded(tokens)) * token_numel, attend_to)
        )

    def _exchange_fp8(self, operands: FP8Operands) -> FP8Operands:
        """From the operands of own tokens and all heads to those of the group's tokens and this rank's heads."""
        q, q_scale, k, k_scale, v, v_scale = operands
        degree, (heads, head_dim) = self.ranks.ulysses, (q.shape[1] // self.ranks.ulysses, q.shape[2])
        rows = [x.unflatten(1, (degree, heads)).transpose(0, 1).flatten(1) for x in (q_scale, q, k)]
        packed = torch.cat([_bytes(x) for x in (*rows, v.unflatten(0, (degree, heads)).flatten(1))], dim=1)
        # Of every member: the scales of its queries first, as float32 must be aligned, then q, k and v.
        widths = [
            (4 * n * heads, n * heads * head_dim, n * heads * head_dim, _padded(n) * heads * head_dim)
            for n in self._sizes_in_group()
        ]
        flat = packed.flatten()
        received = self.ranks.exchange(flat, [packed.shape[1]] * degree, [sum(width) for width in widths], "ulysses")
        parts = received.split([width for member in widths for width in member])
        q_scale = torch.cat([x.view(torch.float32).view(-1, heads) for x in parts[0::4]])
        q, k = (torch.cat([x.view(-1, heads, head_dim) for x in parts[i::4]]).view(FP8) for i in (1, 2))
        v = torch.cat([x.view(heads, head_dim, -1) for x in parts[3::4]], dim=2).view(FP8)
        own = slice(self.ranks.rank % degree * heads, (self.ranks.rank % degree + 1) * heads)
        return FP8Operands(q, q_scale, k, k_scale[own].contiguous(), v, v_scale[own].contiguous())

    def _to_own_tokens(self, attended: Tensor) -> Tensor:
        """From the group's tokens and this rank's heads [tokens, head, head_dim] to own tokens and all heads."""
        counts, degree = self._sizes_in_group(), self.ranks.ulysses
        own = self.end - self.start
        rows = self.ranks.exchange(attended, counts, [own] * degree, "ulysses")
        return rows.unflatten(0, (degree, own)).transpose(0, 1).flatten(1, 2)

    def _ring(
        self, block: Tensor, length: Callable[[int], int], attend_to: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Attention to the keys and values of all groups, which come round in blocks, one after another.

        Args:
            block: those of the own group, flat.
            length: of a block, by its number of tokens.
            attend_to: the output and log-sum-exp of attention to a block with this number of tokens.
        """
        ranks, ring, tokens = self.ranks, self.ranks.ring, sizes(self.borders[:: self.ranks.ulysses])
        position = ranks.rank // ranks.ulysses
        parts = []
        for step in range(ring):
            owner = (position - step) % ring
            following = None
            if step + 1 < ring:
                send = [len(block) if i == (position + 1) % ring else 0 for i in range(ring)]
                coming = length(tokens[(owner - 1) % ring])
                receive = [coming if i == (position - 1) % ring else 0 for i in range(ring)]
                following = ranks.transport.start(block, send, receive, "ring")
            parts.append(attend_to(block, tokens[owner]))
            if following is not None:
                block = ranks.transport.wait(following)
        outputs, lses = zip(*parts, strict=True)
        return merge_attention(outputs, lses)[0]

    def _sizes_in_group(self) -> list[int]:
        """The numbers of tokens of the Ulysses group's members."""
        counts = sizes(self.borders)
        return [counts[rank] for rank in self.ranks.members("ulysses")]


def _padded(tokens: int) -> int:
    """Tokens rounded up to 16, as in an FP8 v."""
    return -(-tokens // 16) * 16


def _bytes(x: Tensor) -> Tensor:
    """The memory of x [..., n] as uint8 [..., n * itemsize]."""
    return x.contiguous().view(torch.uint8)
