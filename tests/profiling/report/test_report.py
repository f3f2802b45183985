"""The report: derived numbers, figures, and a page that opens in a browser and needs nothing else."""

import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

from model.errors import UserError
from profiling import tables
from profiling.__main__ import TARGETS, main
from profiling.analyse.targets import MET, MISSED, UNMEASURED, read_targets
from profiling.cases.evidence import RESULTS, gather
from profiling.formats import as_peers
from profiling.report import figures, report
from profiling.report.history import Line, Point, _chunk_seconds, history, lines
from profiling.report.roofline import LABELS, _apart, roofline
from profiling.report.verdict import Tile, answered_goals, changes
from profiling.results import (
    ERROR,
    OK,
    WRONG,
    CaseResult,
    Ceilings,
    Measurement,
    NvmlTrace,
    Run,
    StageInterval,
    VariantResult,
    save,
)
from tests.profiling import runs

SCRIPT = Path(report.__file__).with_name("sort.js").read_text()
SOME = ("chunk_attention/14b-w1/*", "rms_norm_rope/14b-w1/*", "lab_transfer/14b-w1/*")
HOSTILE = "<script>alert('x')</script> & \"y\" {{ 7 * 7 }} $\\frac$ [red]z[/]"
CASE = CaseResult(
    "op/shape/bf16",
    "op",
    "shape",
    "bf16",
    flops=4e12,
    bytes=2e9,
    calls=10,
    measurements=(
        Measurement("ours", OK, True, error=1e-3, samples=(0.010, 0.011, 0.010, 0.009, 0.010)),
        Measurement("fast", OK, samples=(0.008,)),
        Measurement("slow", OK, samples=(0.020,)),
        Measurement("bad", WRONG, detail="relative error 1", error=1.0),
    ),
)
TINY_RUN = Run("bench", "2026-01-01T00:00:00+00:00", runs.GPU, ceilings=Ceilings(1e12, {"bf16": 1e15}), cases=(CASE,))


@pytest.fixture(scope="module")
def whole() -> Run:
    return runs.run(days=9)


@pytest.fixture(scope="module")
def earlier() -> list[Run]:
    return [runs.run(seed=1 + i, patterns=SOME, days=i) for i in range(3)]


def evidence(run: Run, others: Sequence[Run] = (), unreadable: Sequence[str] = ()) -> report.Evidence:
    named = [(f"{i}.json", other) for i, other in enumerate(others)]
    goals, changed = answered_goals(run, "run.json", read_targets(TARGETS)), changes(run, "run.json", named[::-1])
    return report.Evidence(run, named, list(unreadable), goals, changed)


@pytest.fixture(scope="module")
def drawn(whole: Run, earlier: list[Run]) -> report.Drawn:
    return report.draw_figures(evidence(whole, earlier))


def xs(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata()).tolist()


def ys(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata()).tolist()


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "report", *map(str, arguments)])
    return main()


# --- Numbers --------------------------------------------------------------------------------------------------------


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


def test_rows_without_ceilings_or_peers_leave_those_numbers_out() -> None:
    alone = replace(CASE, measurements=CASE.measurements[:1])
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
    hostile = replace(CASE, case=HOSTILE, measurements=(Measurement(HOSTILE, WRONG, detail="[/] [bold]"),))
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(tables.measurement_table(tables.measurement_rows(replace(TINY_RUN, cases=(CASE, hostile)))))
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


# --- Figures --------------------------------------------------------------------------------------------------------


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


COMMITTED = [run for _, run in gather([RESULTS])[0]]


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
    figure = roofline(replace(TINY_RUN, cases=(replace(CASE, bytes=CASE.flops / intensity),)))
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


# --- The page -------------------------------------------------------------------------------------------------------


def all_wrong(run: Run) -> Run:
    run = each(lambda m: Measurement(m.backend, WRONG, m.ours, "wrong"), run)
    return replace(run, nvml=NvmlTrace(), variants=tuple(VariantResult(v.variant, WRONG) for v in run.variants))


def hostile(run: Run) -> Run:
    cases = tuple(
        replace(
            c,
            case=f"{HOSTILE}{i}",
            operation=HOSTILE,
            shape=HOSTILE,
            dtype=HOSTILE,
            dims={HOSTILE: 1},
            measurements=tuple(replace(m, backend=HOSTILE, detail=HOSTILE) for m in c.measurements),
        )
        for i, c in enumerate(run.cases)
    )
    variants = tuple(
        replace(v, variant=HOSTILE, detail=HOSTILE, stages={HOSTILE: v.stages.get("decode", ())}) for v in run.variants
    )
    audit = tuple(replace(a, kernel=HOSTILE, case=HOSTILE, faults=(HOSTILE,), warnings=(HOSTILE,)) for a in run.audit)
    machine = replace(run.machine, device=HOSTILE, versions={HOSTILE: HOSTILE}, revision=HOSTILE)
    gauges = replace(run.nvml, throttled={HOSTILE: 0.5})
    return replace(
        run,
        command=HOSTILE,
        cases=cases,
        variants=variants,
        audit=audit,
        machine=machine,
        nvml=gauges,
        notes=(HOSTILE,),
    )


def cases_alone(run: Run) -> Run:
    return replace(run, variants=(), audit=(), nvml=NvmlTrace(note="no NVIDIA GPU in this run"))


def one_sample(m: Measurement) -> Measurement:
    return replace(m, samples=m.samples[:1])


def unsampled(m: Measurement) -> Measurement:
    return replace(m, samples=())


def each(change: Callable[[Measurement], Measurement], run: Run) -> Run:
    cases = (replace(c, measurements=tuple(map(change, c.measurements))) for c in run.cases)
    return replace(run, cases=tuple(cases))


VARIATIONS: dict[str, Callable[[Run], Run]] = {
    "nothing": lambda run: Run(run.command, run.started, run.machine),
    "quality alone": lambda run: Run(run.command, run.started, run.machine, quality=runs.quality()),
    "quality without long streams": lambda run: replace(run, quality=runs.quality()[:4]),
    "a soak alone": lambda run: Run(run.command, run.started, run.machine, soak=(runs.soak(),)),
    "cases alone": cases_alone,
    "audit alone": lambda run: replace(run, variants=(), cases=(), nvml=NvmlTrace()),
    "no ceilings": lambda run: replace(cases_alone(run), ceilings=Ceilings()),
    "no copy": lambda run: replace(cases_alone(run), ceilings=Ceilings(None, run.ceilings.matmul_flop_s)),
    "no products": lambda run: replace(cases_alone(run), ceilings=Ceilings(run.ceilings.copy_bytes_s)),
    "single samples": lambda run: each(one_sample, cases_alone(run)),
    "checked only": lambda run: each(unsampled, cases_alone(run)),
    "undated": lambda run: replace(cases_alone(run), started=""),
    "all wrong": all_wrong,
    "no work": lambda run: replace(cases_alone(run), cases=tuple(replace(c, flops=0, bytes=0) for c in run.cases)),
    "no stages": lambda run: replace(
        run, cases=(), nvml=NvmlTrace(), variants=tuple(replace(v, stages={}, frames=0) for v in run.variants)
    ),
    "one variant": lambda run: replace(run, cases=(), nvml=NvmlTrace(), variants=run.variants[:1]),
    "one reading": lambda run: replace(
        cases_alone(run), nvml=NvmlTrace((0.0,), (1.0,), (1.0,), (1.0,), (1.0,), (1.0,))
    ),
    "ragged readings": lambda run: replace(
        run, cases=(), variants=(), nvml=replace(run.nvml, watts=run.nvml.watts[:-1], sm_mhz=())
    ),
    "idle": lambda run: replace(
        run, cases=(), variants=(), nvml=replace(run.nvml, sm_mhz=(0.0,) * len(run.nvml.seconds))
    ),
}


class Page(HTMLParser):
    """Collects what a browser would fetch or show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.links += [values[name] or "" for name in ("src", "href", "srcset", "data", "action") if name in values]
        if tag == "picture":
            self.pictures.append(values["id"] or "")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["h2"] and data.strip():
            self.headings.append(data.strip())
        if self.tags[-1:] != ["script"]:
            self.text += data


def checked(text: str) -> Page:
    """The page, after what holds for any: one script, which is ours, nothing fetched, no value that was not there."""
    page = Page(text)
    assert page.tags.count("script") == 1
    assert f"<script>{SCRIPT}</script>" in text
    assert base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode() in text  # which the policy allows
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in page.links)
    assert "@import" not in text
    assert "url(" not in text
    assert "None" not in page.text
    assert "nan" not in page.text.split()
    return page


def page_of(run: Run, others: Sequence[Run] = (), unreadable: Sequence[str] = ()) -> str:
    found = evidence(run, others, unreadable)
    return report.render_page(found, report.draw_figures(found))


@pytest.mark.parametrize("variation", VARIATIONS)
def test_every_kind_of_run_makes_a_page(variation: str, earlier: list[Run]) -> None:
    found = evidence(VARIATIONS[variation](runs.run(patterns=SOME, days=9)), earlier)
    drawn = report.draw_figures(found)
    page = checked(report.render_page(found, drawn))
    assert page.pictures == [f"figure-{name}" for name in drawn]
    anchors = [link[1:] for link in page.links if link.startswith("#")]
    assert len(anchors) == len(page.headings) > 0  # no section is empty, or cannot be reached
    json.dumps(report.report_json(found.run), allow_nan=False)
    report.show(found, Console(file=io.StringIO()))


def test_a_run_of_nothing_has_no_empty_section() -> None:
    page = checked(page_of(VARIATIONS["nothing"](runs.run(patterns=SOME))))
    assert page.headings == ["Machine"]
    assert page.pictures == []


def test_hostile_names_are_escaped(earlier: list[Run]) -> None:
    text = page_of(hostile(runs.run(patterns=SOME)), earlier, [HOSTILE])
    assert "<script>alert" not in text
    page = checked(text)
    assert page.text.count(HOSTILE) > 20
    assert page.pictures == ["figure-timeline", "figure-roofline", "figure-gauges"]


def test_the_page_says_what_matters(whole: Run, earlier: list[Run]) -> None:
    page = checked(page_of(whole, earlier, ["old.json has schema version 0, this is version 1"]))
    assert page.headings == [
        "Goals",
        "Chunk",
        "Roofline",
        "Cases and peers",
        "History",
        "Audit",
        "Clock, power, temperature",
        "Machine",
    ]
    assert page.pictures == ["figure-timeline", "figure-roofline", "figure-history", "figure-gauges"]
    assert page.text.count(runs.GPU.device) == 2  # in the title of the window, and in that of the page
    for words in (
        "The GPU was throttled: power cap in 17% of the readings. The times below are those of a throttled GPU.",
        "fp8-kernels, 1.94 times as fast as bf16-eager",
        "torch-compiled on rms_norm_rope/14b-w1/bf16",
        "No module named 'flash_attn'",
        "spills 312 bytes, budget 0",
        "48 HGMMA",
        "tensor 14.7 ms",
        "torchao was not installed",
        "old.json has schema version 0",
        runs.GPU.revision or "",
        "2026-01-10 09:30:00 UTC, took 431 s",
        "torch 2.11.0+cu130",
        "denoise/step, each of 4",
        "160 calls a chunk",
    ):
        assert words in page.text, words


def test_one_call_is_not_one_calls() -> None:
    once = replace(TINY_RUN, cases=(replace(CASE, calls=1),))
    assert "; 1 call a chunk" in checked(page_of(once)).text


def test_uncommitted_changes_are_marked() -> None:
    machine = replace(runs.GPU, revision="0123456789abcdef-dirty-77")
    text = page_of(replace(TINY_RUN, machine=machine))
    assert '<span class="bad">012345678, with uncommitted changes</span>' in text


def test_a_kernel_without_a_bound_is_not_modelled() -> None:
    kernel = replace(runs.audit()[0], bounds={}, tile={}, tflops=None)
    page = checked(page_of(Run("audit", "2026-01-01T00:00:00+00:00", runs.GPU, audit=(kernel,))))
    assert "not modelled" in page.text
    assert "0.00" not in page.text


def test_the_default_back_end_is_marked_even_if_it_is_slower() -> None:
    text = page_of(runs.run(patterns=("chunk_attention/14b-w1/bf16",)))
    lead, *others = re.findall(r'<tr class="ours[^>]*>.*?</tr>', text, re.DOTALL)
    assert "gluon" in lead
    assert ">default<" in lead
    assert len(others) == 1
    assert "triton" in others[0]
    assert ">default<" not in others[0]


def test_a_default_that_was_not_timed_is_named() -> None:
    run = runs.run(patterns=("chunk_attention/14b-w1/bf16",))
    (case,) = run.cases
    others = tuple(m for m in case.measurements if m.backend != "gluon")
    page = checked(page_of(replace(run, cases=(replace(case, measurements=others),))))
    assert "by default runs gluon, not timed here" in page.text


# --- The verdict ----------------------------------------------------------------------------------------------------


def tile_of(found: report.Evidence, name: str) -> Tile | None:
    return next((tile for tile in found.tiles if tile.name == name), None)


def test_goals_are_those_that_the_run_is_about() -> None:
    run = runs.run(patterns=("chunk_attention/14b-w1/bf16",))
    found = evidence(replace(run, variants=()))
    assert {goal.target.subject for goal in found.goals} == {"chunk_attention/14b-w1/bf16"}
    verdicts = [goal.verdict for goal in found.goals]
    assert verdicts == sorted(verdicts, key=(MISSED, UNMEASURED, MET).index)
    tile = tile_of(found, "Goals met")
    assert tile is not None
    assert tile.value == f"{verdicts.count(MET)} of {len(verdicts)}"
    assert evidence(replace(run, machine=runs.CPU, variants=())).goals == []
    assert evidence(as_peers(replace(run, variants=()))).goals == []  # kernels of another program answer no goal


def test_the_biggest_loss_and_gain_are_against_the_newest_earlier_run() -> None:
    names = ("chunk_attention/14b-w1/bf16", "rms_norm_rope/14b-w1/bf16", "lab_transfer/14b-w1/fp32")
    oldest, before = (cases_alone(runs.run(seed=i, patterns=names, days=i, spoilt=False)) for i in (1, 2))
    factors = {names[0]: 0.8, names[1]: 1.1, names[2]: 1.4}
    now = cases_alone(runs.run(seed=3, patterns=names, days=3, slower=factors, spoilt=False))
    later = cases_alone(runs.run(seed=4, patterns=names, days=4, slower={names[0]: 9}, spoilt=False))
    found = evidence(now, [oldest, before, later])
    assert {row.files for row in found.changed} == {("1.json", "run.json")}
    regressed, loss, gain = (tile_of(found, name) for name in ("Regressed", "Biggest loss", "Biggest gain"))
    assert regressed is not None
    assert (regressed.value.split()[0], regressed.detail, regressed.tone) == ("2", "since 1", "bad")
    assert loss is not None
    assert names[2] in loss.detail
    assert 35 < float(loss.value.strip("+%")) < 45
    assert gain is not None
    assert names[0] in gain.detail
    assert gain.value.startswith("\u2212")


@pytest.mark.parametrize(
    "others",
    [
        [],
        [runs.run(patterns=("linear/14b-w1-out/bf16",))],
        [runs.run(patterns=("*/tiny-w1/*",), machine=runs.CPU)],
        [runs.run(patterns=SOME, machine=replace(runs.GPU, driver="1.0"))],
    ],
    ids=["none", "other cases", "another device", "another driver"],
)
def test_without_a_comparable_run_one_line_says_so(others: list[Run]) -> None:
    found = evidence(cases_alone(runs.run(patterns=SOME, days=3)), list(map(cases_alone, others)))
    assert found.changed == []
    tile = tile_of(found, "Since the last run")
    assert tile is not None
    assert tile.detail.startswith("no comparable run")


def test_shares_of_a_ceiling_that_was_measured_too_low_are_the_true_ones(tmp_path: Path) -> None:
    slow = replace(runs.run(patterns=SOME), ceilings=Ceilings(2.4e12, {"bf16": 7e14}))
    launched = replace(runs.run(patterns=SOME, days=2), ceilings=Ceilings(3.0e12, {"bf16": 7e14}, copy_launched=True))
    save(slow, tmp_path / "slow.json")
    save(launched, tmp_path / "results" / "launched.json")
    found = report.gather_evidence(tmp_path / "slow.json", tmp_path / "results", TARGETS)
    assert found.run.ceilings.copy_bytes_s == 3.0e12
    assert [run.started for _, run in found.others] == [launched.started]
    assert "copy's ceiling is 3.00 TB/s, of launched.json" in checked(page_of(found.run)).text


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_committed_run_is_not_its_own_predecessor(file: Path) -> None:
    found = report.gather_evidence(file, RESULTS, TARGETS)
    assert len(found.others) == len(COMMITTED) - 1
    assert found.run not in [run for _, run in found.others]


# --- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    save(runs.run(patterns=SOME, days=9), path)
    return path


def test_the_command_writes_page_and_pictures(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results"
    save(runs.run(seed=1, patterns=SOME), folder / "old.json")
    (folder / "broken.json").write_text("{")
    page, pictures = tmp_path / "new" / "report.html", tmp_path / "pictures"
    assert call(monkeypatch, saved, "-o", page, "--png", pictures, "--results", folder) == 0
    assert "broken.json is not JSON" in checked(page.read_text()).text
    names = {"timeline", "roofline", "history", "gauges"}
    assert {path.name for path in pictures.iterdir()} == {f"{name}.png" for name in names}
    assert all(Image.open(path).width == 1000 for path in pictures.iterdir())


def test_json_is_all_that_is_printed(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, saved, "--json", "--results", saved.parent / "none") == 0
    values = json.loads(capsys.readouterr().out)
    run = runs.run(patterns=SOME, days=9)
    assert [row["ratio"] for row in values["cases"]] == [row.ratio for row in tables.measurement_rows(run)]
    assert [row["fps"] for row in values["variants"]] == [row.fps for row in tables.variant_rows(run)]
    assert values["throttled"] == run.nvml.throttled


def test_tables_are_printed_where_no_file_is_asked_for(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, saved) == 0
    out = capsys.readouterr().out
    for words in (
        "lab_transfer/14b-w1/fp32",
        "sageattention: not",
        "fp8-kernels",
        "attention_kernel",
        "The GPU was throttled",
    ):
        assert words in " ".join(out.split())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no results"),
        ('{"schema": "flashtalk-profile", "version": 99}', "has schema version 99"),
        ('{"schema": "flashtalk-profile", "version": 1, "command": 7}', "is damaged"),
    ],
)
def test_a_malformed_run_is_refused_in_one_line(
    content: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    assert call(monkeypatch, path, "-o", tmp_path / "report.html") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} ")
    assert why in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    save(TINY_RUN, saved)
    taken = tmp_path / "taken"
    taken.mkdir()
    for out, png in ((taken, None), (saved / "report.html", None), (None, saved)):
        with pytest.raises(UserError, match="cannot be written"):
            report.report_command(saved, out, png, tmp_path, TARGETS, False)
    assert sorted(tmp_path.iterdir()) == [saved, taken]
    assert not list(taken.iterdir())


# --- A browser ------------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# An iframe as wide as a phone, since a browser's own window may not be that narrow.
ON_A_PHONE = """<iframe id="phone" style="width:390px;height:800px;border:0" srcdoc="{page}"></iframe><script>
onload = () => {{
  const page = document.getElementById("phone").contentDocument, wide = [];
  for (const element of page.querySelectorAll("body *"))
    if (!element.closest(".scroll table") && element.getBoundingClientRect().right > 390) wide.push(element.outerHTML);
  const sources = [...page.images].map(image => image.currentSrc === image.src);
  document.title = JSON.stringify([page.documentElement.scrollWidth, wide, sources]);
}}</script>"""
# Sorts each table by its second column, then writes down the order of the first one.
SORTED = """<iframe id="page" srcdoc="{page}"></iframe><script>
onload = () => {{
  const page = document.getElementById("page").contentDocument;
  const table = page.querySelector("#cases table");
  const order = () => [...table.tBodies].map(body => body.rows[0].textContent.split(" ")[0].trim());
  const found = [order()];
  for (let i = 0; i < 2; i++) {{ table.tHead.rows[0].cells[1].click(); found.push(order()); }}
  document.title = JSON.stringify(found);
}}</script>"""


def browse(page: Path, folder: Path, *options: str) -> str:
    """What a browser makes of the page, as HTML."""
    command = [str(BROWSER), *OPTIONS, f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout


def measured(script: str, text: str, folder: Path) -> Any:
    """What a script finds out about a page inside of its own."""
    outer = folder / "outer.html"
    outer.write_text(script.format(page=html.escape(text)))
    title = re.search(r"<title>(.*?)</title>", browse(outer, folder), re.DOTALL)
    assert title is not None
    return json.loads(html.unescape(title[1]))


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_in_a_browser(scheme: str, whole: Run, earlier: list[Run], tmp_path: Path) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text(page_of(replace(whole, cases=()), earlier))
    prefers = f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"
    shown = checked(browse(page, tmp_path, "--window-size=1000,4000", prefers, f"--screenshot={picture}"))
    assert shown.headings == checked(page.read_text()).headings
    assert shown.pictures == ["figure-timeline", "figure-history", "figure-gauges"]
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (4000, 1000, 3)
    paper, blue = ((figures.DARK_SCHEME if scheme == "dark" else {}).get(c, c) for c in (figures.WHITE, figures.BLUE))
    assert near(pixels, paper).mean() > 0.8  # also of the figures, which are a large part of the page
    assert near(pixels, blue).sum() > 20_000  # denoising
    assert near(pixels, figures.ORANGE).sum() > 2_000  # decode


def near(pixels: np.ndarray, colour: str) -> np.ndarray:
    return np.abs(pixels - [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).sum(-1) < 12


@needs_browser
@pytest.mark.parametrize("kind", ["whole", "hostile", "audit alone"])
def test_on_a_phone_nothing_is_wider_than_the_screen(kind: str, whole: Run, earlier: list[Run], tmp_path: Path) -> None:
    small = replace(whole, cases=whole.cases[:5])
    run = {"whole": small, "hostile": hostile(small), "audit alone": VARIATIONS["audit alone"](small)}[kind]
    width, wide, for_a_page = measured(ON_A_PHONE, page_of(run, earlier), tmp_path)
    assert wide == []
    assert width == 390
    assert not any(for_a_page)  # each figure is the one for phones


@needs_browser
def test_a_click_on_a_heading_sorts_the_cases(earlier: list[Run], tmp_path: Path) -> None:
    run = cases_alone(earlier[0])
    before, up, down = measured(SORTED, page_of(run), tmp_path)
    by_time = sorted(run.cases, key=lambda case: (case.best(ours=True) or case.measurements[0]).seconds or 0)
    assert before == [case.case for case in run.cases]
    assert up == [case.case for case in by_time]
    assert down == up[::-1]
