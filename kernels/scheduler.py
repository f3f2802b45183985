"""Tile scheduling for persistent kernels: stream-K splitting, with work tiles given to the least busy program.

A persistent kernel launches one program per multiprocessor, and each program works through a list of work tiles. The
lists are computed here, on the host, once for a shape, and kept on the device. Kernels only read them, so chunks of any
lengths, and tile counts that the number of multiprocessors does not divide, cost a kernel nothing.

The names are those of attention: rows are queries, columns are (batch, head) pairs, and the reduction runs over keys.
A linear layer uses the same schedule: its rows are rows of the input, its columns are column tiles of the output, and
its "keys" are positions along the reduction axis K.

Source: Stream-K (arXiv 2301.03598).
"""

import heapq
import itertools
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

MIN_SPLIT_TILES = (
    4  # key tiles in a split at least: every split costs a round trip of its partial output through memory
)

# (first query, end of queries, first key, end of keys) of consecutive groups of queries; ends are exclusive.
KVRanges = tuple[tuple[int, int, int, int], ...]


class StreamKSchedule(NamedTuple):
    """Which program computes which work tile. All tables are int32; all ends are exclusive.

    `work_tiles` [n, 6]: column, first row, end of rows, first key, end of keys, index of the partial result or -1.
    `work_indptr` [num_programs + 1]: program p has work_tiles[work_indptr[p] : work_indptr[p + 1]]. A work tile with a
    partial index covers only some keys of its output tile. `combines` [m, 5]: column, first row, end of rows, first
    partial, number of partials of every output tile that was split. `num_partials`: partial results in all.
    """

    work_tiles: Tensor
    work_indptr: Tensor
    combines: Tensor
    num_partials: int


@cache
def kv_ranges(queries: int, keys: int, chunks: tuple[int, ...] | None = None, past: int = 0) -> KVRanges:
    """The keys that each group of queries attends to.

    Without `chunks`, every query attends to every key. With chunk lengths, a query attends to its own chunk and to the
    `past` chunks before it; -1 means all earlier chunks.
    """
    if chunks is None:
        return ((0, queries, 0, keys),)
    edges = [0, *itertools.accumulate(chunks)]
    first = [0 if past < 0 else max(0, i - past) for i in range(len(chunks))]
    return tuple((edges[i], edges[i + 1], edges[first[i]], edges[i + 1]) for i in range(len(chunks)))


def query_tiles(ranges: KVRanges, block_m: int) -> list[tuple[int, int, int, int]]:
    """Tiles of at most `block_m` queries, none of which crosses two ranges: first row, end, first key, end of keys."""
    return [
        (row, min(row + block_m, end), first_key, end_key)
        for start, end, first_key, end_key in ranges
        for row in range(start, end, block_m)
    ]


def stream_k_schedule(
    ranges: KVRanges,
    block_m: int,
    block_n: int,
    columns: int,
    num_programs: int,
    group: int = 1,
    split: bool = True,
) -> StreamKSchedule:
    """Distributes tiles of block_m queries, for each of `columns` (batch, head) pairs, by their number of key tiles.

    Whole tiles go to the program that has the least to do. `group` columns are scheduled together, so that programs
    which run at the same time share keys in the L2 cache. The last tiles, which do not fill a wave of programs, are
    split along the keys so that all programs end together; without `split` they stay whole.
    """
    tiles = [
        (column, *tile)
        for first in range(0, columns, group)
        for tile in query_tiles(ranges, block_m)
        for column in range(first, min(first + group, columns))
    ]
    costs = [-(-(end_key - first_key) // block_n) for *_, first_key, end_key in tiles]
    unsplit = len(tiles) - len(tiles) % num_programs if split else len(tiles)
    target = -(-sum(costs) // num_programs)
    work: list[list[tuple[int, ...]]] = [[] for _ in range(num_programs)]
    combines: list[tuple[int, ...]] = []
    num_partials = 0
    load = [(0, program) for program in range(num_programs)]  # a heap of (key tiles so far, program)
    for i, ((column, row, end, first_key, end_key), cost) in enumerate(zip(tiles, costs, strict=True)):
        splits = _assign(cost, load, None if i < unsplit else target)
        is_split = len(splits) > 1
        if is_split:
            combines.append((column, row, end, num_partials, len(splits)))
        for program, start, stop in splits:
            keys = first_key + start * block_n, min(end_key, first_key + stop * block_n)
            work[program].append((column, row, end, *keys, num_partials if is_split else -1))
            num_partials += is_split
    indptr = list(itertools.accumulate(map(len, work), initial=0))
    flat = [tile for of_program in work for tile in of_program]
    tables = [torch.tensor(x, dtype=torch.int32) for x in (flat, indptr, combines)]
    return StreamKSchedule(tables[0], tables[1], tables[2], num_partials)


def _assign(cost: int, load: list[tuple[int, int]], target: int | None) -> list[tuple[int, int, int]]:
    """Gives `cost` key tiles to the least busy programs: (program, first key tile, end).

    Each program is filled up to `target` key tiles; None gives the whole tile to one program.
    """
    splits, done = [], 0
    while done < cost:
        busy, program = heapq.heappop(load)
        take = cost if target is None else max(target - busy, MIN_SPLIT_TILES)
        if cost - done - take < MIN_SPLIT_TILES:
            take = cost - done
        splits.append((program, done, done + take))
        heapq.heappush(load, (busy + take, program))
        done += take
    return splits


@cache
def query_tiles_on(device: torch.device, _kind: type, ranges: KVRanges, block_m: int) -> Tensor:
    """`query_tiles` on a device, int32 [tile, 4].

    Copied once for a shape: a launch must not wait for a copy, and a CUDA graph cannot capture one. `_kind` is the type
    of the tensors, since those of an audit have no memory and must not share a table with real ones.
    """
    return torch.tensor(query_tiles(ranges, block_m), dtype=torch.int32).to(device)


@cache
def stream_k_schedule_on(
    device: torch.device,
    _kind: type,
    ranges: KVRanges,
    block_m: int,
    block_n: int,
    columns: int,
    num_programs: int,
    group: int = 1,
    split: bool = True,
) -> StreamKSchedule:
    """`stream_k_schedule` on a device, copied once for a shape; `_kind` as in `query_tiles_on`."""
    made = stream_k_schedule(ranges, block_m, block_n, columns, num_programs, group, split)
    return StreamKSchedule(
        made.work_tiles.to(device), made.work_indptr.to(device), made.combines.to(device), made.num_partials
    )
