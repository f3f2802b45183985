"""The stream-K schedule: every score is computed exactly once, and all programs finish together."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.scheduler import MIN_SPLIT_TILES, StreamKSchedule, kv_ranges, query_tiles, stream_k_schedule

CHUNKS = st.lists(st.integers(1, 300), min_size=1, max_size=6)


def cost(work_tile: list[int], block_n: int) -> int:
    return -(-(work_tile[4] - work_tile[3]) // block_n)


def loads(schedule: StreamKSchedule, block_n: int) -> list[int]:
    """The number of key tiles of each program."""
    work_tiles, work_indptr = schedule.work_tiles.tolist(), schedule.work_indptr.tolist()
    return [sum(cost(tile, block_n) for tile in work_tiles[a:b]) for a, b in itertools.pairwise(work_indptr)]


def test_kv_ranges():
    assert kv_ranges(5, 7) == ((0, 5, 0, 7),)
    assert kv_ranges(6, 6, (1, 2, 3), 0) == ((0, 1, 0, 1), (1, 3, 1, 3), (3, 6, 3, 6))
    assert kv_ranges(6, 6, (1, 2, 3), 1) == ((0, 1, 0, 1), (1, 3, 0, 3), (3, 6, 1, 6))
    assert kv_ranges(6, 6, (1, 2, 3), -1) == ((0, 1, 0, 1), (1, 3, 0, 3), (3, 6, 0, 6))


@given(CHUNKS, st.sampled_from([0, 1, 2, -1]), st.sampled_from([1, 64, 192]))
def test_query_tiles_cover_each_row_once_and_no_masked_key(chunks, past, block):
    ranges = kv_ranges(sum(chunks), sum(chunks), tuple(chunks), past)
    tiles = query_tiles(ranges, block)
    rows = [(row, kv_start, kv_end) for start, end, kv_start, kv_end in tiles for row in range(start, end)]
    assert [row for row, *_ in rows] == list(range(sum(chunks)))
    for start, end, *keys in ranges:
        assert all(own == keys for row, *own in rows if start <= row < end)


@given(
    CHUNKS, st.sampled_from([None, 0, 1, -1]), st.sampled_from([64, 128]), st.sampled_from([64, 128]),
    st.integers(1, 5), st.sampled_from([1, 3, 132]), st.integers(1, 6), st.booleans(),
)  # fmt: skip
def test_every_key_tile_is_computed_once(chunks, past, block_m, block_n, columns, programs, column_group, split):
    n = sum(chunks)
    ranges = kv_ranges(n, n) if past is None else kv_ranges(n, n, tuple(chunks), past)
    schedule = stream_k_schedule(ranges, block_m, block_n, columns, programs, column_group, split)
    assert split or not schedule.num_partials
    assert schedule.work_tiles.dtype == torch.int32
    assert schedule.work_indptr.tolist()[0] == 0
    assert schedule.work_indptr.tolist()[-1] == len(schedule.work_tiles)
    covered = Counter()
    for column, row, end, kv_start, kv_end, _ in schedule.work_tiles.tolist():
        covered.update((column, row, end, key) for key in range(kv_start, kv_end))
    wanted = Counter(
        (column, row, end, key)
        for column in range(columns)
        for row, end, kv_start, kv_end in query_tiles(ranges, block_m)
        for key in range(kv_start, kv_end)
    )
    assert covered == wanted


@given(CHUNKS, st.integers(1, 5), st.sampled_from([3, 132]))
def test_combines_name_the_partials_of_their_tile(chunks, columns, programs):
    ranges = kv_ranges(sum(chunks), sum(chunks), tuple(chunks), -1)
    schedule = stream_k_schedule(ranges, 64, 64, columns, programs)
    tiles = schedule.work_tiles.tolist()
    partials = {partial: (column, row, end) for column, row, end, _, _, partial in tiles if partial >= 0}
    assert sorted(partials) == list(range(schedule.num_partials))
    named = [
        (first + i, (column, row, end))
        for column, row, end, first, count in schedule.combines.tolist()
        for i in range(count)
    ]
    assert dict(named) == partials
    assert len(named) == schedule.num_partials


@pytest.mark.parametrize("block_m", [128, 192])
@pytest.mark.parametrize(("queries", "heads"), [(12096, 40), (12096, 20), (12096, 10), (12096, 5), (1512, 40)])
def test_production_shapes_are_balanced(queries, heads, block_m):
    """Without split tiles, 5 heads on 132 multiprocessors would leave a fifth of them idle."""
    even = loads(stream_k_schedule(kv_ranges(queries, 12096), block_m, 128, heads, 132), 128)
    assert max(even) <= 1.01 * sum(even) / len(even) + MIN_SPLIT_TILES


def test_programs_that_run_at_the_same_time_share_columns():
    schedule = stream_k_schedule(kv_ranges(12096, 12096), 128, 128, 40, 132)
    work_indptr = schedule.work_indptr.tolist()[:-1]
    columns = {schedule.work_tiles[i + 10, 0].item() for i in work_indptr}
    assert len(columns) <= 3


def test_a_column_group_is_computed_row_by_row():
    schedule = stream_k_schedule(kv_ranges(3, 8), 1, 8, 5, 1, column_group=2)
    order = [(column, row) for column, row, *_ in schedule.work_tiles.tolist()]
    assert order == [
        (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2),
        (2, 0), (3, 0), (2, 1), (3, 1), (2, 2), (3, 2),
        (4, 0), (4, 1), (4, 2),
    ]  # fmt: skip
