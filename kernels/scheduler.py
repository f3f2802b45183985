"""Tile scheduling for persistent kernels: stream-K splitting, with work tiles given to the least busy program.

A persistent kernel launches one program per multiprocessor, and each program works through a list of work tiles. The
lists are computed here, on the host, once for a shape, and kept on the device. Kernels only read them, so chunks of any
lengths, and tile counts that the number of multiprocessors does not divide, cost a kernel nothing.

The names are those of attention: rows are queries, columns are (batch, head) pairs, and the reduction runs over keys.
A linear layer uses the same schedule: its rows are rows of the input, its columns are column tiles of the output, and
its keys are positions along the reduction axis K.

Source: Stream-K (arXiv 2301.03598).
"""

import heapq
import itertools
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# Least number of key tiles in a split: each split costs a round trip of its partial output through memory.
MIN_SPLIT_TILES = 4

# For each of consecutive groups of queries: (first query, end of queries, first key, end of keys). Ends are exclusive.
KVRanges = tuple[tuple[int, int, int, int], ...]


class StreamKSchedule(NamedTuple):
    """Which program computes which work tile. All tables are int32, and all ends are exclusive.

    Attributes:
        work_tiles: [n, 6]. Each row is a column, first row, end of rows, first key, end of keys, and the index of the
            partial result. The index is -1 for a tile that covers all keys of its output tile.
        work_indptr: [num_programs + 1]. Program p computes work_tiles[work_indptr[p] : work_indptr[p + 1]].
        combines: [m, 5], one row for each output tile that was split: column, first row, end of rows, first partial
            result, number of partial results.
        num_partials: the total number of partial results.
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
    first_chunk = [0 if past < 0 else max(0, i - past) for i in range(len(chunks))]
    return tuple((edges[i], edges[i + 1], edges[first_chunk[i]], edges[i + 1]) for i in range(len(chunks)))


def query_tiles(ranges: KVRanges, block_m: int) -> list[tuple[int, int, int, int]]:
    """Tiles of at most `block_m` queries, each within one range: first row, end of rows, first key, end of keys."""
    return [
        (row, min(row + block_m, q_end), kv_start, kv_end)
        for q_start, q_end, kv_start, kv_end in ranges
        for row in range(q_start, q_end, block_m)
    ]


def stream_k_schedule(
    ranges: KVRanges,
    block_m: int,
    block_n: int,
    columns: int,
    num_programs: int,
    column_group: int = 1,
    split: bool = True,
) -> StreamKSchedule:
    """Distributes output tiles over persistent programs, balanced by the number of key tiles.

    Whole tiles go to the program with the least work so far. The last tiles, which do not fill a wave of programs, are
    split along the keys so that all programs finish together.

    Args:
        ranges: the keys that each group of queries attends to.
        block_m: queries in a tile.
        block_n: keys in a tile.
        columns: the number of (batch, head) pairs, each of which has all queries.
        num_programs: the number of programs.
        column_group: how many columns are scheduled together, so that programs which run at the same time share keys
            in the L2 cache.
        split: False keeps all tiles whole.
    """
    tiles = [
        (column, *tile)
        for first_column in range(0, columns, column_group)
        for tile in query_tiles(ranges, block_m)
        for column in range(first_column, min(first_column + column_group, columns))
    ]
    costs = [-(-(kv_end - kv_start) // block_n) for *_, kv_start, kv_end in tiles]
    unsplit = len(tiles) - len(tiles) % num_programs if split else len(tiles)
    target = -(-sum(costs) // num_programs)
    work: list[list[tuple[int, ...]]] = [[] for _ in range(num_programs)]
    combines: list[tuple[int, ...]] = []
    num_partials = 0
    load = [(0, program) for program in range(num_programs)]  # a heap of (key tiles so far, program)
    for i, ((column, row, row_end, kv_start, kv_end), cost) in enumerate(zip(tiles, costs, strict=True)):
        splits = _assign(cost, load, None if i < unsplit else target)
        is_split = len(splits) > 1
        if is_split:
            combines.append((column, row, row_end, num_partials, len(splits)))
        for program, start, end in splits:
            keys = kv_start + start * block_n, min(kv_end, kv_start + end * block_n)
            work[program].append((column, row, row_end, *keys, num_partials if is_split else -1))
            num_partials += is_split
    indptr = list(itertools.accumulate(map(len, work), initial=0))
    flat = [tile for of_program in work for tile in of_program]
    tables = [torch.tensor(x, dtype=torch.int32) for x in (flat, indptr, combines)]
    return StreamKSchedule(tables[0], tables[1], tables[2], num_partials)


def _assign(cost: int, load: list[tuple[int, int]], target: int | None) -> list[tuple[int, int, int]]:
    """Gives `cost` key tiles to the least busy programs, as splits of (program, first key tile, end of key tiles).

    Each program is filled up to `target` key tiles. A target of None gives the whole tile to one program.
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
def query_tiles_on(device: torch.device, _tensor_type: type, ranges: KVRanges, block_m: int) -> Tensor:
    """The result of `query_tiles` as an int32 tensor [tile, 4] on a device.

    It is copied once per shape and kept, because a launch must not wait for a copy and a CUDA graph cannot capture one.
    `_tensor_type` is the type of the kernel's other tensors. It keeps real tables apart from those of the audit, whose
    tensors have no memory.
    """
    return torch.tensor(query_tiles(ranges, block_m), dtype=torch.int32).to(device)


@cache
def stream_k_schedule_on(
    device: torch.device,
    _tensor_type: type,
    ranges: KVRanges,
    block_m: int,
    block_n: int,
    columns: int,
    num_programs: int,
    column_group: int = 1,
    split: bool = True,
) -> StreamKSchedule:
    """The result of `stream_k_schedule` with its tables on a device, copied once per shape and kept.

    `_tensor_type` is the type of the kernel's other tensors. It keeps real tables apart from those of the audit, whose
    tensors have no memory.
    """
    schedule = stream_k_schedule(ranges, block_m, block_n, columns, num_programs, column_group, split)
    return StreamKSchedule(
        schedule.work_tiles.to(device),
        schedule.work_indptr.to(device),
        schedule.combines.to(device),
        schedule.num_partials,
    )
