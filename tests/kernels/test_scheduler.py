"""The distribution of an attention's tiles: every score is computed once, and programs end together."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.scheduler import MIN_SPLIT_TILES, StreamKSchedule, kv_ranges, query_tiles, stream_k_schedule

CHUNKS = st.lists(st.integers(1, 300), min_size=1, max_size=6)


def cost(piece: list[int], block_n: int) -> int:
    return -(-(piece[4] - piece[3]) // block_n)


def loads(made: StreamKSchedule, block_n: int) -> list[int]:
    """Tiles of keys of each program."""
    work_tiles, work_indptr = made.work_tiles.tolist(), made.work_indptr.tolist()
    return [sum(cost(p, block_n) for p in work_tiles[a:b]) for a, b in itertools.pairwise(work_indptr)]


def test_spans():
    assert kv_ranges(5, 7) == ((0, 5, 0, 7),)
    assert kv_ranges(6, 6, (1, 2, 3), 0) == ((0, 1, 0, 1), (1, 3, 1, 3), (3, 6, 3, 6))
    assert kv_ranges(6, 6, (1, 2, 3), 1) == ((0, 1, 0, 1), (1, 3, 0, 3), (3, 6, 1, 6))
    assert kv_ranges(6, 6, (1, 2, 3), -1) == ((0, 1, 0, 1), (1, 3, 0, 3), (3, 6, 0, 6))


@settings(deadline=None)
@given(CHUNKS, st.sampled_from([0, 1, 2, -1]), st.sampled_from([1, 64, 192]))
def test_tiles_cover_each_row_once_and_no_masked_key(chunks, past, block):
    seen = kv_ranges(sum(chunks), sum(chunks), tuple(chunks), past)
    rows = [(row, first, last) for start, end, first, last in query_tiles(seen, block) for row in range(start, end)]
    assert [row for row, *_ in rows] == list(range(sum(chunks)))
    for start, end, *keys in seen:
        assert all(own == keys for row, *own in rows if start <= row < end)


@settings(deadline=None)
@given(
    CHUNKS, st.sampled_from([None, 0, 1, -1]), st.sampled_from([64, 128]), st.sampled_from([64, 128]),
    st.integers(1, 5), st.sampled_from([1, 3, 132]), st.integers(1, 6), st.booleans(),
)  # fmt: skip
def test_a_plan_computes_every_tile_of_keys_once(chunks, past, block_m, block_n, columns, programs, group, split):
    n = sum(chunks)
    seen = kv_ranges(n, n) if past is None else kv_ranges(n, n, tuple(chunks), past)
    made = stream_k_schedule(seen, block_m, block_n, columns, programs, group, split)
    assert split or not made.num_partials
    assert made.work_tiles.dtype == torch.int32
    assert made.work_indptr.tolist()[0] == 0
    assert made.work_indptr.tolist()[-1] == len(made.work_tiles)
    covered = Counter()
    for column, row, end, first, last, _ in made.work_tiles.tolist():
        covered.update((column, row, end, key) for key in range(first, last))
    wanted = Counter(
        (column, row, end, key)
        for column in range(columns)
        for row, end, first, last in query_tiles(seen, block_m)
        for key in range(first, last)
    )
    assert covered == wanted


@settings(deadline=None)
@given(CHUNKS, st.integers(1, 5), st.sampled_from([3, 132]))
def test_a_merge_names_the_parts_of_its_tile(chunks, columns, programs):
    seen = kv_ranges(sum(chunks), sum(chunks), tuple(chunks), -1)
    made = stream_k_schedule(seen, 64, 64, columns, programs)
    parts = {part: (column, row, end) for column, row, end, _, _, part in made.work_tiles.tolist() if part >= 0}
    assert sorted(parts) == list(range(made.num_partials))
    named = [
        (first + i, (column, row, end))
        for column, row, end, first, count in made.combines.tolist()
        for i in range(count)
    ]
    assert dict(named) == parts
    assert len(named) == made.num_partials


@pytest.mark.parametrize("block_m", [128, 192])
@pytest.mark.parametrize(("queries", "heads"), [(12096, 40), (12096, 20), (12096, 10), (12096, 5), (1512, 40)])
def test_production_shapes_are_even(queries, heads, block_m):
    """Without cut tiles, 5 heads on 132 multiprocessors would leave a fifth of them idle."""
    even = loads(stream_k_schedule(kv_ranges(queries, 12096), block_m, 128, heads, 132), 128)
    assert max(even) <= 1.01 * sum(even) / len(even) + MIN_SPLIT_TILES


def test_programs_at_work_at_one_time_share_columns():
    made = stream_k_schedule(kv_ranges(12096, 12096), 128, 128, 40, 132)
    work_indptr = made.work_indptr.tolist()[:-1]
    columns = {made.work_tiles[i + 10, 0].item() for i in work_indptr}
    assert len(columns) <= 3


def test_a_group_of_columns_is_worked_off_row_by_row():
    made = stream_k_schedule(kv_ranges(3, 8), 1, 8, 5, 1, group=2)
    order = [(column, row) for column, row, *_ in made.work_tiles.tolist()]
    assert order == [
        (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2),
        (2, 0), (3, 0), (2, 1), (3, 1), (2, 2), (3, 2),
        (4, 0), (4, 1), (4, 2),
    ]  # fmt: skip
