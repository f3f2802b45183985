"""Numbers derived from a run: what is above its ceiling, and what runs beside other work."""

import io

import pytest
from rich.console import Console

from profiling import tables
from profiling.results import OK, CaseResult, Ceilings, Machine, Measurement, Run, StageInterval, VariantResult

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
