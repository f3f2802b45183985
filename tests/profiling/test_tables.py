"""Numbers derived from a run, and their words: speeds, ceilings, ratios, and what runs beside other work."""

import io
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from profiling import tables
from profiling.results import (
    ERROR,
    OK,
    WRONG,
    CaseResult,
    Ceilings,
    Machine,
    Measurement,
    Run,
    StageInterval,
    VariantResult,
)
from tests.profiling.runs import HOSTILE, TINY_CASE, TINY_RUN

H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 132, 80, "9.0")
FAST = Measurement("ours", OK, ours=True, samples=(0.002,))
CASE = CaseResult("op/shape/bf16", "op", "shape", "bf16", flops=4e12, bytes=2e9, measurements=(FAST,))
RUN = Run("bench", "2026-01-01", H100, ceilings=Ceilings(3e12, {"bf16": 8e14}, True), cases=(CASE,))


def test_a_row_above_its_ceiling_is_marked_and_explained() -> None:
    rows = tables.measurement_rows(RUN)
    assert rows[0].above.startswith("another algorithm, with fewer FLOPs")
    assert tables.share_of_ceiling(rows[0]) == "250%! compute"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tables.measurement_table(rows))
    assert "! above its ceiling: another algorithm" in console.export_text()


def test_calls_beside_other_work_are_told_apart() -> None:
    stages = {"step": (0.4, 0.4), "decode": (0.3, 0.1, 0.3, 0.2)}
    timeline = (
        StageInterval("step", 0, 0.0, 0.4),
        StageInterval("decode", 1, 0.0, 0.3),
        StageInterval("decode", 0, 0.4, 0.5),
    )
    variant = VariantResult("a", OK, chunk=(0.5, 0.5), stages=stages, timeline=timeline)
    (row,) = tables.variant_rows(Run("e2e", "2026-01-01", H100, variants=(variant,)))
    assert row.beside == {"step": 0, "decode": pytest.approx(0.3)}
    assert tables.calls_beside(variant, "decode") == (True, False)


@pytest.mark.parametrize("timeline", [(), (StageInterval("decode", 0, 0.0, 0.3),)])
def test_without_a_timeline_of_the_same_calls_none_are_beside(timeline: tuple[StageInterval, ...]) -> None:
    variant = VariantResult("a", OK, chunk=(0.5,), stages={"decode": (0.3, 0.1)}, timeline=timeline)
    assert tables.calls_beside(variant, "decode") == (False, False)


def test_rows_derive_speed_share_of_the_ceiling_and_ratio() -> None:
    ours, fast, slow, bad = tables.measurement_rows(TINY_RUN)
    assert (ours.case, ours.backend, ours.ours, ours.status) == ("op/shape/bf16", "ours", True, OK)
    assert ours.seconds == pytest.approx(0.010)
    assert ours.tflops == pytest.approx(400)
    assert ours.gbs == pytest.approx(200)
    assert (ours.bound, ours.ceiling) == ("compute", pytest.approx(0.4))  # 4 ms of products against 2 ms of copying
    assert ours.ratio == pytest.approx(0.8)  # the best peer takes 8 ms
    assert fast.ratio == pytest.approx(1)
    assert slow.ratio == pytest.approx(0.4)
    assert fast.spread is None  # of one sample there is none
    assert (bad.seconds, bad.tflops, bad.ceiling, bad.ratio, bad.detail) == (None, None, None, None, "relative error 1")


def test_the_stage_of_the_vae_is_all_that_it_decodes_and_encodes() -> None:
    """Also what runs beside the student: two chunks of two decodings and an encoding each."""
    timeline = (
        StageInterval("denoise/step", 0, 0.0, 1.0),
        StageInterval("decode", 1, 0.2, 0.3),
        StageInterval("decode", 0, 1.0, 1.2),
        StageInterval("motion", 0, 1.2, 1.25),
    )
    stages = {"decode": (0.1, 0.2, 0.1, 0.2), "motion": (0.05, 0.05)}
    variant = VariantResult("fp8", OK, stages=stages, chunk=(1.3, 1.3), timeline=timeline)
    assert tables.stage_value(variant, "vae") == pytest.approx(0.35)
    assert tables.stage_value(replace(variant, stages={"decode": (0.1,)}), "vae") is None


def test_rows_without_ceilings_or_peers_leave_those_numbers_out() -> None:
    alone = replace(TINY_CASE, measurements=TINY_CASE.measurements[:1])
    (row,) = tables.measurement_rows(replace(TINY_RUN, ceilings=Ceilings(), cases=(alone,)))
    assert row.tflops == pytest.approx(400)
    assert (row.bound, row.ceiling, row.ratio) == (None, None, None)


def test_variant_rows_share_stages_over_chunks() -> None:
    base = VariantResult("a", OK, chunk=(2.0, 4.0), stages={"decode": (0.1, 0.2, 0.3, 0.4)}, frames=28)
    fast = VariantResult("b", OK, chunk=(1.5,), first_frame=(0.5,), frames=28)
    failed = VariantResult("c", ERROR, "out of memory", chunk=(0.1,))
    a, b, c = tables.variant_rows(replace(TINY_RUN, variants=(base, fast, failed)))
    assert (a.seconds, a.fps, a.ratio) == (3.0, pytest.approx(28 / 3), 1.0)
    assert (a.stages, a.calls) == ({"decode": pytest.approx(0.5)}, {"decode": 2})
    assert (b.ratio, b.first_frame) == (2.0, 0.5)
    assert (c.seconds, c.fps, c.ratio) == (None, None, None)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, ""),
        (12.3456e-9, "12.3 ns"),
        (12.3456e-6, "12.3 µs"),
        (0.9996e-3, "1000 µs"),
        (4.5678e-3, "4.57 ms"),
        (1, "1.00 s"),
        (4321, "4321 s"),
    ],
)
def test_duration_has_a_fitting_unit(seconds: float | None, words: str) -> None:
    assert tables.duration(seconds) == words


@pytest.mark.parametrize(
    ("size", "words"), [(None, ""), (0, "0 B"), (32, "32 B"), (163_968, "160 KiB"), (23_330_000_000, "21.7 GiB")]
)
def test_memory_has_a_fitting_unit(size: float | None, words: str) -> None:
    assert tables.memory(size) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, ""), (12, "12 B/s"), (1.153e9, "1.15 GB/s"), (3.02e12, "3.02 TB/s"), (4e15, "4000 TB/s")],
)
def test_a_rate_has_a_fitting_unit(value: float | None, words: str) -> None:
    assert tables.rate(value, "B") == words


@pytest.mark.parametrize(("share", "words"), [(0.000261, "0.0261%"), (0.0712, "7.1%"), (0.83, "83%"), (0, "0.0%")])
def test_a_share_is_not_rounded_to_nothing(share: float, words: str) -> None:
    assert tables.percent(share) == words


@given(st.floats(1e-6, 1e9))
def test_number_keeps_three_digits(value: float) -> None:
    words = tables.number(value)
    assert "e" not in words
    assert float(words) == pytest.approx(value, rel=6e-3)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_names_every_back_end_and_what_is_not_right(width: int) -> None:
    hostile = replace(TINY_CASE, case=HOSTILE, measurements=(Measurement(HOSTILE, WRONG, detail="[/] [bold]"),))
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(tables.measurement_table(tables.measurement_rows(replace(TINY_RUN, cases=(TINY_CASE, hostile)))))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for words in (
        "op/shape/bf16",
        "ours (ours)",
        "fast",
        "slow",
        "10.0 ms",
        "40% compute",
        "0.80",
        "bad: wrong",
        "[/] [bold]",
    ):
        assert words in text
    assert HOSTILE.replace(" ", "") in "".join(text.split())


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), max_size=7))
def test_the_critical_path_is_the_longest_chain(passes: list[tuple[int, int]]) -> None:
    timeline = [StageInterval("step", 0, begin, begin + length) for begin, length in passes]
    chains = [
        sum(s.end - s.begin for s in chain)
        for n in range(len(timeline) + 1)
        for chain in combinations(sorted(timeline, key=lambda s: s.begin), n)
        if all(a.end <= b.begin for a, b in pairwise(chain))
    ]
    assert tables.critical_path(timeline) == pytest.approx(max(chains))
