"""The figures of a report: what they show, in units, without words on each other."""

import io
import re
from dataclasses import replace
from datetime import UTC, datetime
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from profiling import tables
from profiling.cases.evidence import RESULTS, gather
from profiling.report import figures, report
from profiling.report.history import Line, Point, _chunk_seconds, history, lines
from profiling.report.roofline import LABELS, _apart, roofline
from profiling.results import OK, Ceilings, NvmlTrace, Run, VariantResult
from tests.profiling import runs
from tests.profiling.report.pages import evidence
from tests.profiling.runs import TINY_CASE, TINY_RUN

COMMITTED = [run for _, run in gather([RESULTS])[0]]


@pytest.fixture(scope="module")
def drawn(whole: Run, earlier: list[Run]) -> report.Drawn:
    return report.draw_figures(evidence(whole, earlier))


def xs(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata()).tolist()


def ys(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata()).tolist()


def test_figures_are_as_wide_as_a_page_or_a_phone_and_their_axes_have_units(drawn: report.Drawn) -> None:
    units = {
        "timeline": {"since the chunk's beginning (ms)"},
        "roofline": {"arithmetic intensity (FLOP/byte)"},
        "gauges": {"time since the run began (s)"},
        "history": {"date of the run (UTC)"},
    }
    assert set(drawn) == set(units)
    for name, pair in drawn.items():
        for figure, width in zip(pair, (1000, 420), strict=True):
            labels = {axes.get_xlabel() for axes in figure.axes} | {axes.get_ylabel() for axes in figure.axes}
            assert (labels | {figure.get_supxlabel()}) - {""} == units[name], name
            image = Image.open(io.BytesIO(figures.png(figure)))
            assert image.width == width
            assert np.asarray(image.convert("L")).std() > 10
    assert drawn["roofline"][0].axes[0].get_title(loc="left") == "TFLOP/s"
    titles = [axes.get_title(loc="left") for axes in drawn["gauges"][0].axes]
    assert [words.split()[-1] for words in titles] == ["MHz", "W", "\u00b0C", "GiB"]
    panels = [axes for axes in drawn["history"][0].axes if axes.get_visible()]
    ticks = [label.get_text() for axes in panels for label in axes.get_yticklabels()]
    assert all(re.fullmatch(r"[\d.]+( (µs|ms|s|GiB))?", tick) for tick in ticks)


def test_words_stay_inside_the_figure(drawn: report.Drawn) -> None:
    slow = runs.run(machine=runs.CPU, patterns=("*/tiny-w1/*",), ceilings=Ceilings(1e9, {"fp32": 1e9, "fp8": 1e7}))
    slow_pair = roofline(slow), roofline(slow, figures.NARROW)
    for name, figure in [(name, figure) for name, pair in (drawn | {"slow": slow_pair}).items() for figure in pair]:
        assert figure is not None
        figure.draw_without_rendering()
        box = figure.get_tightbbox()  # of all that is drawn, in inches
        assert box.x0 >= 0.02, name
        assert box.y0 >= 0.02, name
        assert box.x1 <= figure.get_figwidth() - 0.02, name
        assert box.y1 <= figure.get_figheight() - 0.02, name


def test_roofline_places_every_case_under_its_roofs(whole: Run, drawn: report.Drawn) -> None:
    figure = drawn["roofline"][0]
    (axes,) = figure.axes
    dots = [(xs(line)[0], ys(line)[0]) for line in axes.lines if line.get_marker() in ("o", "D")]
    expected = [
        (case.flops / case.bytes, case.flops / best.seconds)
        for case in whole.cases
        for best in (case.best(True), case.best(False))
        if best and best.seconds
    ]
    assert np.array(sorted(dots)) == pytest.approx(np.array(sorted(expected)))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-1] == "copy 2.86 TB/s"
    assert {"fastest of ours", "best peer", "not labelled: less to gain", "bf16", "fp8", "fp32"} <= set(legend)
    assert "bf16 products 690 TFLOP/s" in [text.get_text() for text in figure.texts]
    slopes = [ys(line)[0] / xs(line)[0] for line in axes.lines if line.get_color() == figures.BLACK]
    assert slopes == [pytest.approx(2.86e12)]  # FLOP/s at one FLOP/byte


def test_each_label_of_the_roofline_has_a_line_to_its_point(drawn: report.Drawn) -> None:
    (axes,) = drawn["roofline"][0].axes
    ends = {(xs(line)[0], ys(line)[0]) for line in axes.lines if len(xs(line)) == 3}
    points = {(xs(line)[0], ys(line)[0]) for line in axes.lines if line.get_marker() == "o"}
    assert len(ends & points) == LABELS
    assert len(ends - points) == 2  # the roofs of bf16 and fp8


@pytest.mark.parametrize("width", [figures.WIDE, figures.NARROW])
def test_no_words_of_a_roofline_overlap(whole: Run, width: float) -> None:
    drawn = [figure for run in (*COMMITTED, whole) if (figure := roofline(run, width))]
    assert len(drawn) > 4
    for figure in drawn:
        figure.draw_without_rendering()
        (axes,) = figure.axes
        texts = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and visible(axes, t)]
        shown = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
        assert not [(a, b) for (a, x), (b, y) in combinations(shown, 2) if x.overlaps(y)]


def visible(axes: Axes, text: Text) -> bool:
    """Whether a text is drawn: a tick's label is not, where the tick is beyond the axis."""
    x, y = text.get_position()
    if text in axes.get_xticklabels():
        return axes.get_xlim()[0] <= x <= axes.get_xlim()[1]
    return text not in axes.get_yticklabels() or axes.get_ylim()[0] <= y <= axes.get_ylim()[1]


@pytest.mark.parametrize("intensity", [3.7, 12, 99])
def test_the_axes_of_a_roofline_fit_a_single_case(intensity: float) -> None:
    figure = roofline(replace(TINY_RUN, cases=(replace(TINY_CASE, bytes=TINY_CASE.flops / intensity),)))
    assert figure is not None
    (axes,) = figure.axes
    for low, high, labels in ((*axes.get_xlim(), axes.get_xticklabels()), (*axes.get_ylim(), axes.get_yticklabels())):
        assert high / low < 10
        assert any(visible(axes, label) for label in labels)


@given(st.lists(st.floats(-50, 500), max_size=30))
def test_labels_stand_apart_and_inside(wanted: list[float]) -> None:
    places = _apart(sorted(wanted), 19, 0, 600)
    assert all(b - a >= 19 - 1e-9 for a, b in pairwise(places))
    assert all(-1e-9 <= place <= 600 for place in places)


def test_labels_stay_where_they_may() -> None:
    assert _apart([10, 100, 110], 20, 0, 200) == [10, 100, 120]
    assert _apart([190, 195], 20, 0, 200) == [180, 200]


def test_the_timeline_is_to_scale_with_a_lane_for_each_stream(whole: Run) -> None:
    figure = figures.timeline(replace(whole, variants=whole.variants[-1:]))
    assert figure is not None
    (axes,) = figure.axes
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    traced = [(bar.get_x(), bar.get_width()) for bar in bars]
    assert traced == [pytest.approx(bar) for bar in ((0, 2000), (2000, 300), (2300, 100), (500, 250))]
    heights = [bar.get_y() for bar in bars]
    assert heights[0] == heights[1] == heights[2] < heights[3]
    words = [text.get_text() for text in axes.texts]
    row = tables.variant_rows(whole)[-1]
    assert words == [
        f"fp8-kernels   {tables.duration(row.seconds)}, {row.fps:.1f} FPS",
        "at the same time, on stream 2",
    ]
    (budget,) = (line for line in axes.lines if line.get_color() == figures.BLACK)
    assert xs(budget) == [1120, 1120]  # 28 frames at 25 FPS


def test_an_untraced_chunk_is_drawn_by_its_medians_if_its_stages_do_not_overlap() -> None:
    stages = {"denoise/step": (0.4, 0.42, 0.4, 0.4), "decode": (0.1, 0.1)}
    steps = VariantResult("steps", OK, chunk=(1.0, 1.0), stages=stages)
    overlapping = replace(steps, chunk=(0.85, 0.85))
    for variant, expected in ((steps, [(0, 400), (400, 400), (800, 100)]), (overlapping, [(0, 850)])):
        figure = figures.timeline(replace(TINY_RUN, variants=(variant,)))
        assert figure is not None
        bars = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches if isinstance(bar, Rectangle)]
        assert bars == [pytest.approx(bar) for bar in expected]


def test_history_holds_the_runs_of_this_device_in_order(whole: Run, earlier: list[Run]) -> None:
    elsewhere = replace(earlier[0], machine=replace(runs.GPU, device="another"), started="2026-01-05T00:00:00+00:00")
    undated = replace(earlier[1], started="yesterday")
    found = {(line.subject, line.quantity): line for line in lines(whole, [*reversed(earlier), elsewhere, undated])}
    case = found["chunk_attention/14b-w1/bf16", ""]
    best = [run.case("chunk_attention/14b-w1/bf16").best(True).seconds for run in (*earlier, whole)]  # type: ignore[union-attr]
    assert [point.value for point in case.points] == best
    fps = [tables.variant_rows(run)[0].fps for run in (*earlier, whole)]
    assert [point.value for point in found["bf16-eager", "FPS"].points] == fps
    assert {quantity for _, quantity in found} == {"FPS", "first frame", "chunk", "peak memory", ""}
    assert [subject for subject, quantity in found if not quantity] == sorted(
        (case.case for case in earlier[0].cases),
        key=lambda name: -_chunk_seconds(whole.case(name)),  # type: ignore[arg-type]
    )
    assert lines(whole, [elsewhere]) == []
    assert history(whole, [elsewhere]) is None


@pytest.mark.parametrize(
    ("quantity", "values", "colour"),
    [
        ("FPS", (10, 12), figures.GREEN),
        ("FPS", (12, 10), figures.VERMILLION),
        ("chunk", (1.2, 1.0), figures.GREEN),
        ("chunk", (1.0, 1.2), figures.VERMILLION),
        ("chunk", (1.0, 1.01), figures.GREY),
    ],
)
def test_a_line_of_the_history_says_whether_it_became_better(
    quantity: str, values: tuple[float, float], colour: str
) -> None:
    points = tuple(Point(datetime(2026, 1, 1 + i, tzinfo=UTC), value) for i, value in enumerate(values))
    assert Line("a", quantity, tables.number, points).colour == colour


def test_the_nvml_figure_shows_the_power_limit(whole: Run, drawn: report.Drawn) -> None:
    limit = next(line for line in drawn["gauges"][0].axes[1].lines if line.get_linestyle() == "--")
    assert ys(limit) == [700, 700]
    assert figures.throttling(whole) == "The GPU was throttled: power cap in 17% of the readings."
    assert figures.throttling(replace(whole, nvml=replace(whole.nvml, throttled={}))) == "The GPU was not throttled."
    assert figures.nvml_strips(TINY_RUN) is None
    unread = replace(TINY_RUN, nvml=NvmlTrace(throttled={"power cap": 0.5}, note="read once a measurement"))
    assert figures.throttling(unread) == "The GPU was throttled: power cap in 50% of the readings."


def test_spans_and_dtypes_have_a_colour_each() -> None:
    for colours in (figures.STAGE_COLOURS, figures.DTYPE_COLOURS):
        assert len(set(colours.values())) == len(colours)


def test_an_svg_file_has_dark_colours_too() -> None:
    text = figures.svg(roofline(TINY_RUN)).decode()  # type: ignore[arg-type]
    style = text[text.index("<style>") : text.index("</style>")]
    for light, dark in figures.DARK_SCHEME.items():
        assert f"--{light[1:]}:{light};" in style
        assert f"--{light[1:]}:{dark};" in style[style.index("prefers-color-scheme:dark") :]
        assert light not in text.replace(style, "")


def test_the_same_run_gives_the_same_bytes() -> None:
    first, second = (figures.svg(roofline(TINY_RUN)) for _ in range(2))  # type: ignore[arg-type]
    assert first == second
