"""Who computes which part: tiles, and their even distribution over persistent programs.

All of it is plain arithmetic on lengths, done once for a shape and kept on the device: kernels only read tables, so
chunks of any lengths cost them nothing, and neither does a number of tiles that multiprocessors do not divide.

The words are attention's: rows are queries, columns are heads, and a tile's sum runs over keys. In a linear layer, rows
are those of its input, columns are tiles of its output's, and the sum runs over what its input's columns are.
"""

import heapq
import itertools
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

MINIMUM = 4  # tiles of keys that a part is worth: each part costs a round trip of its output through memory


class Plan(NamedTuple):
    """A distribution, int32.

    `pieces` [n, 6]: column, row, end of rows, first key, end of keys, part. `firsts` [programs + 1]: a program's pieces
    are those from firsts[program] on. A piece with part >= 0 covers only some of its tile's keys. `merges` [m, 5]:
    column, row, end of rows, first part, parts. `parts` is how many there are in all.
    """

    pieces: Tensor
    firsts: Tensor
    merges: Tensor
    parts: int


Spans = tuple[tuple[int, int, int, int], ...]  # first query, end of queries, first key, end of keys; queries in order


@cache
def spans(queries: int, keys: int, chunks: tuple[int, ...] | None = None, past: int = 0) -> Spans:
    """Which queries see which keys: all, or of chunks of these lengths their own and the `past` before (-1: all)."""
    if chunks is None:
        return ((0, queries, 0, keys),)
    edges = [0, *itertools.accumulate(chunks)]
    first = [0 if past < 0 else max(0, i - past) for i in range(len(chunks))]
    return tuple((edges[i], edges[i + 1], edges[first[i]], edges[i + 1]) for i in range(len(chunks)))


def tiles(seen: Spans, block: int) -> list[tuple[int, int, int, int]]:
    """Row, end of rows, first key, end of keys of tiles of `block` queries, none of them across two spans."""
    return [
        (row, min(row + block, end), first, last)
        for start, end, first, last in seen
        for row in range(start, end, block)
    ]


def plan(
    seen: Spans, block_m: int, block_n: int, columns: int, programs: int, group: int = 1, split: bool = True
) -> Plan:
    """Tiles of block_m queries for each of `columns` (batch, head) pairs, shared out by their tiles of block_n keys.

    Whole tiles go to whichever program has least to do, so that those at work at one time share the keys of `group`
    columns in the cache; the last ones, fewer than there are programs, are cut by keys so that all end together, or
    stay whole without `split`.
    """
    work = [
        (column, *tile)
        for first in range(0, columns, group)
        for tile in tiles(seen, block_m)
        for column in range(first, min(first + group, columns))
    ]
    costs = [-(-(last - first) // block_n) for *_, first, last in work]
    whole = len(work) - len(work) % programs if split else len(work)
    share = -(-sum(costs) // programs)
    pieces: list[list[tuple[int, ...]]] = [[] for _ in range(programs)]
    merges: list[tuple[int, ...]] = []
    parts = 0
    load = [(0, program) for program in range(programs)]  # a heap
    for i, ((column, row, end, first, last), cost) in enumerate(zip(work, costs, strict=True)):
        cuts = _cut(cost, load, None if i < whole else share)
        split = len(cuts) > 1
        if split:
            merges.append((column, row, end, parts, len(cuts)))
        for program, start, stop in cuts:
            keys = first + start * block_n, min(last, first + stop * block_n)
            pieces[program].append((column, row, end, *keys, parts if split else -1))
            parts += split
    firsts = list(itertools.accumulate(map(len, pieces), initial=0))
    flat = [piece for own in pieces for piece in own]
    tables = [torch.tensor(x, dtype=torch.int32) for x in (flat, firsts, merges)]
    return Plan(tables[0], tables[1], tables[2], parts)


def _cut(cost: int, load: list[tuple[int, int]], share: int | None) -> list[tuple[int, int, int]]:
    """A tile's keys, `cost` tiles of them, as (program, first, end): to the least busy, up to `share` each if given."""
    cuts, done = [], 0
    while done < cost:
        busy, program = heapq.heappop(load)
        take = cost if share is None else max(share - busy, MINIMUM)
        if cost - done - take < MINIMUM:
            take = cost - done
        cuts.append((program, done, done + take))
        heapq.heappush(load, (busy + take, program))
        done += take
    return cuts


@cache
def tiles_on(device: torch.device, _kind: type, seen: Spans, block: int) -> Tensor:
    """`tiles` on a device, int32 [tile, 4]; `_kind` of tensor, since an audit's have no memory.

    Copied once: a launch must not wait for that, nor can a CUDA graph capture it.
    """
    return torch.tensor(tiles(seen, block), dtype=torch.int32).to(device)


@cache
def plan_on(
    device: torch.device,
    _kind: type,
    seen: Spans,
    block_m: int,
    block_n: int,
    columns: int,
    programs: int,
    group: int = 1,
    split: bool = True,
) -> Plan:
    """`plan` on a device, likewise."""
    made = plan(seen, block_m, block_n, columns, programs, group, split)
    return Plan(made.pieces.to(device), made.firsts.to(device), made.merges.to(device), made.parts)
