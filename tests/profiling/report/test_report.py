"""The report: derived numbers, figures, and a page that opens in a browser and needs nothing else."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation
from PIL import Image
from rich.console import Console

from model.errors import UserError
from profiling import tables
from profiling.__main__ import main
from profiling.report import figures, report
from profiling.report.roofline import LABELS, roofline
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


@pytest.fixture(scope="module")
def drawn(whole: Run, earlier: list[Run]) -> dict[str, Figure]:
    found = report.draw_figures(whole, earlier)
    assert all(isinstance(figure, Figure) for figure in found.values()), found
    return found  # type: ignore[return-value]


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
        (12.3456e-6, "12.3 µs"),
        (0.9996e-3, "1000 µs"),
        (4.5678e-3, "4.57 ms"),
        (1, "1.00 s"),
        (4321, "4321 s"),
    ],
)
def test_duration_has_a_fitting_unit(seconds: float | None, words: str) -> None:
    assert tables.duration(seconds) == words


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


def test_figures_are_1000_pixels_wide_and_their_axes_have_units(drawn: dict[str, Figure]) -> None:
    units = {
        "waterfall": {"time of one chunk (ms)"},
        "timeline": {"time of one chunk (ms)"},
        "streams": {"since the chunk's beginning (ms)"},
        "roofline": {"arithmetic intensity (FLOP/byte)", "speed (TFLOP/s)"},
        "gauges": {
            "time since the run began (s)",
            "SM clock\n(MHz)",
            "power\n(W)",
            "temperature\n(°C)",
            "memory\n(GB)",
        },
        "history": {"time of a call", "date of the run (UTC)"},  # ticks carry the unit
    }
    assert set(drawn) == set(units)
    for name, figure in drawn.items():
        labels = {axes.get_xlabel() for axes in figure.axes} | {axes.get_ylabel() for axes in figure.axes}
        labels |= {figure.get_supxlabel(), figure.get_supylabel()}
        assert labels - {""} == units[name], name
        image = Image.open(io.BytesIO(figures.png(figure)))
        assert image.width == 1000
        assert np.asarray(image.convert("L")).std() > 10
    panels = [axes for axes in drawn["history"].axes if axes.get_visible()]
    ticks = [label.get_text() for axes in panels for label in axes.get_yticklabels()]
    assert all(re.fullmatch(r"[\d.]+ (µs|ms|s)", tick) for tick in ticks)


def test_words_stay_inside_the_figure(drawn: dict[str, Figure]) -> None:
    slow = runs.run(machine=runs.CPU, patterns=("*/tiny-w1/*",), ceilings=Ceilings(1e9, {"fp32": 1e9, "fp8": 1e7}))
    for name, figure in (drawn | {"slow": roofline(slow)}).items():
        assert isinstance(figure, Figure)
        figure.draw_without_rendering()
        box = figure.get_tightbbox()  # of all that is drawn, in inches
        assert box.x0 >= 0.05, name
        assert box.y0 >= 0.05, name
        assert box.x1 <= figure.get_figwidth() - 0.05, name
        assert box.y1 <= figure.get_figheight() - 0.05, name


def test_roofline_places_every_case_under_its_roofs(whole: Run, drawn: dict[str, Figure]) -> None:
    (axes,) = drawn["roofline"].axes
    dots = [(xs(line)[0], ys(line)[0]) for line in axes.lines if line.get_marker() in ("o", "D")]
    expected = [
        (case.flops / case.bytes, case.flops / best.seconds / 1e12)
        for case in whole.cases
        for best in (case.best(True), case.best(False))
        if best and best.seconds
    ]
    assert np.array(sorted(dots)) == pytest.approx(np.array(sorted(expected)))
    words = [text.get_text() for text in axes.texts]
    assert "copy 2.86 TB/s" in words
    assert "bf16 products 690 TFLOP/s" in words
    slopes = [ys(line)[0] / xs(line)[0] for line in axes.lines if line.get_color() == figures.BLACK]
    assert slopes == [pytest.approx(2.86)]  # TFLOP/s at one FLOP/byte


def test_roofline_labels_hide_neither_each_other_nor_the_roofs_names(drawn: dict[str, Figure]) -> None:
    (axes,) = drawn["roofline"].axes
    drawn["roofline"].draw_without_rendering()
    labels = [text.get_window_extent() for text in axes.texts if not text.get_rotation()]
    assert len(labels) == LABELS + 3
    assert not [pair for pair in combinations(labels, 2) if pair[0].overlaps(pair[1])]


def test_timeline_bars_add_up_to_the_chunk(whole: Run, drawn: dict[str, Figure]) -> None:
    (axes,) = drawn["timeline"].axes
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    rows = [row for row in tables.variant_rows(whole) if row.seconds]
    for place, row in enumerate(rows):
        mine = [bar for bar in bars if abs(bar.get_y() + bar.get_height() / 2 - place) < 0.01]
        assert sum(bar.get_width() for bar in mine) == pytest.approx(1000 * (row.seconds or 0))
        steps = [bar for bar in mine if bar.get_facecolor()[:3] == pytest.approx((0, 0x72 / 255, 0xB2 / 255))]
        assert len(steps) == 4
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.variant for row in rows]
    budget = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert xs(budget) == [1120, 1120]  # 28 frames at 25 FPS


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


def test_streams_of_a_traced_chunk(whole: Run) -> None:
    untraced = replace(whole, variants=tuple(replace(v, timeline=()) for v in whole.variants))
    assert "no chunk was traced" in str(figures.streams(untraced))
    figure = figures.streams(whole)
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    bars = sorted((bar.get_x(), bar.get_width()) for bar in axes.patches if isinstance(bar, Rectangle))
    assert bars == [pytest.approx(bar) for bar in ((0, 2000), (500, 250), (2000, 300), (2300, 100))]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fp8-kernels", ""]
    assert "critical path 2.40 s\nall work 2.65 s" in [text.get_text() for text in axes.texts]
    assert "fp8-kernels: the critical path of a chunk is 2.40 s, all its work 2.65 s." in report.headlines(whole)


def test_waterfall_steps_from_variant_to_variant_and_names_the_failed(whole: Run, drawn: dict[str, Figure]) -> None:
    (axes,) = drawn["waterfall"].axes
    words = [text.get_text() for text in axes.texts if isinstance(text, Annotation)]
    first, second = (1000 * (row.seconds or 0) for row in tables.variant_rows(whole)[:2])
    assert f"\u2212{first - second:.0f} ms\n\u2212{1 - second / first:.1%}" in words
    assert "error: OutOfMemoryError: tried to allocate 2.11 GiB" in words
    seconds = [row.seconds for row in tables.variant_rows(whole) if row.seconds]
    assert f"{seconds[0] / min(seconds):.2f} times as fast" in drawn["waterfall"].texts[1].get_text()


def test_a_slower_variant_is_a_loss() -> None:
    variants = tuple(VariantResult(name, OK, chunk=(seconds,)) for name, seconds in (("a", 1.0), ("b", 1.25)))
    figure = figures.waterfall(replace(TINY_RUN, variants=variants))
    assert isinstance(figure, Figure)
    assert "+250 ms\n+25.0%" in [text.get_text() for text in figure.axes[0].texts]
    assert "1.25 times as slow" in figure.texts[1].get_text()


def test_history_holds_the_runs_of_this_device_in_order(whole: Run, earlier: list[Run]) -> None:
    elsewhere = replace(earlier[0], machine=replace(runs.GPU, device="another"), started="2026-01-05T00:00:00+00:00")
    undated = replace(earlier[1], started="yesterday")
    figure = figures.history(whole, [*reversed(earlier), elsewhere, undated])
    assert isinstance(figure, Figure)
    panel = next(a for a in figure.axes if any(t.get_text() == "chunk_attention bf16" for t in a.texts))
    line = next(line for line in panel.lines if len(ys(line)) > 1)
    best = [run.case("chunk_attention/14b-w1/bf16").best(True).seconds for run in (*earlier, whole)]  # type: ignore[union-attr]
    assert ys(line) == best
    assert "fewer than two runs" in str(figures.history(whole, [elsewhere]))


def test_the_nvml_figure_states_throttling(whole: Run, drawn: dict[str, Figure]) -> None:
    said = drawn["gauges"].texts[1]
    assert said.get_text() == "The GPU was throttled: power cap in 17% of the readings."
    assert said.get_color() == figures.VERMILLION
    limit = next(line for line in drawn["gauges"].axes[1].lines if line.get_linestyle() == "--")
    assert ys(limit) == [700, 700]
    assert figures.throttling(replace(whole, nvml=replace(whole.nvml, throttled={})))[0] == (
        "The GPU was not throttled."
    )
    assert figures.nvml_strips(TINY_RUN) == "No NVML strip: fewer than two readings were taken."


def test_spans_and_dtypes_have_a_colour_each() -> None:
    for colours in (figures.STAGE_COLOURS, figures.DTYPE_COLOURS):
        assert len(set(colours.values())) == len(colours)


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
        if tag == "img":
            self.pictures.append(values["id"] or "")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["h2"] and data.strip():
            self.headings.append(data.strip())
        self.text += data


def checked(text: str) -> Page:
    """The page, after what holds for any: no script, nothing fetched, no value that was not there."""
    page = Page(text)
    assert "script" not in page.tags
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in page.links)
    assert "@import" not in text
    assert "url(" not in text
    assert "None" not in page.text
    assert "nan" not in page.text.split()
    return page


@pytest.mark.parametrize("variation", VARIATIONS)
def test_every_kind_of_run_makes_a_page(variation: str, earlier: list[Run]) -> None:
    run = VARIATIONS[variation](runs.run(patterns=SOME, days=9))
    drawn = report.draw_figures(run, earlier)
    page = checked(report.render_page(run, drawn, []))
    shown = {"waterfall", "timeline", "streams"} if run.variants else set()
    shown |= ({"roofline", "history"} if run.cases else set()) | {"gauges"}
    assert page.pictures == [f"figure-{name}" for name in drawn if name in shown and isinstance(drawn[name], Figure)]
    for name in shown:
        if isinstance(sentence := drawn[name], str):
            assert sentence in page.text
    json.dumps(report.report_json(run), allow_nan=False)
    report.show(run, Console(file=io.StringIO()))


def test_hostile_names_are_escaped(earlier: list[Run]) -> None:
    run = hostile(runs.run(patterns=SOME))
    text = report.render_page(run, report.draw_figures(run, earlier), [HOSTILE])
    assert "<script" not in text
    page = checked(text)
    assert page.text.count(HOSTILE) > 20
    names = ("waterfall", "timeline", "streams", "roofline", "gauges")
    assert page.pictures == [f"figure-{name}" for name in names]


def test_the_page_says_what_matters(whole: Run, drawn: dict[str, Figure]) -> None:
    page = checked(report.render_page(whole, dict(drawn), ["old.json has schema version 0, this is version 1"]))
    assert page.headings == [
        "Waterfall",
        "Chunk timeline",
        "Variants",
        "Roofline",
        "Cases and peers",
        "History",
        "Audit",
        "Clock, power, temperature",
    ]
    assert page.pictures == [
        "figure-waterfall",
        "figure-timeline",
        "figure-streams",
        "figure-roofline",
        "figure-history",
        "figure-gauges",
    ]
    for words in (
        "The GPU was throttled: power cap in 17% of the readings. The times below are those of a throttled GPU.",
        "fp8-kernels makes a chunk in 2.",
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
    ):
        assert words in page.text, words


def test_the_same_run_gives_the_same_bytes() -> None:
    first, second = (figures.svg(roofline(TINY_RUN)) for _ in range(2))  # type: ignore[arg-type]
    assert first == second


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
    names = {"waterfall", "timeline", "streams", "roofline", "history", "gauges"}
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
            report.report_command(saved, out, png, tmp_path, False)
    assert sorted(tmp_path.iterdir()) == [saved, taken]
    assert not list(taken.iterdir())


# --- A browser ------------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")
def test_the_page_opens_in_a_browser(whole: Run, drawn: dict[str, Figure], tmp_path: Path) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text(report.render_page(whole, dict(drawn), []))
    options = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,3000"),
    )

    command = [str(BROWSER), *options, "--dump-dom", f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    shown = checked(done.stdout)
    assert shown.headings == checked(page.read_text()).headings
    assert len(shown.pictures) == 6
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (3000, 1000, 3)
    blue, orange = (np.abs(pixels - rgb).sum(-1) < 12 for rgb in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)))
    assert blue.sum() > 20_000  # bars of waterfall and timeline
    assert orange.sum() > 2_000  # decode
