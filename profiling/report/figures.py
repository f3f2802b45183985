"""The figures of a report: functions that turn runs into a matplotlib figure 1000 pixels wide.

If there is nothing to draw, the function returns a sentence that says why. Colours are those of Okabe and Ito, which
the colour-blind can tell apart. They mean the same in every figure: `DTYPE_COLOURS` for the dtype of matrix products,
`STAGE_COLOURS` for the stages of a chunk. `png` and `svg` turn a figure into a file.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.dates import date2num
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from model.config import ChunkConfig
from profiling.results import CaseResult, Measurement, Run
from profiling.tables import VariantRow, duration, number, percent, variant_rows

FigureOrReason = Figure | str

BLACK, GREY, FAINT = "#222222", "#767676", "#e4e4e4"
BLUE, SKY, GREEN, YELLOW, ORANGE, VERMILLION, PURPLE = (
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
)
DTYPE_COLOURS = {"fp32": GREEN, "fp16": PURPLE, "bf16": BLUE, "fp8": VERMILLION}
STAGE_COLOURS = {
    "audio": PURPLE,
    "denoise/step": BLUE,
    "decode": ORANGE,
    "color": YELLOW,
    "motion": GREEN,
    "emit": SKY,
}
DARK = {BLUE, GREEN, VERMILLION, GREY}  # white text is readable on these
PALE = "#7FB8D8"  # a lighter BLUE
PAPER = {"fc": "white", "ec": "none", "pad": 1}  # background of words that a line would cross
BETWEEN = "between stages"
BAR = 0.5  # height of a bar, as a share of its row
WIDTH, DPI = 10.0, 100  # inches, pixels an inch
PANELS = 32  # in the history

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": BLACK,
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so reports look the same everywhere
    "font.size": 11,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "savefig.dpi": DPI,
    "svg.fonttype": "path",
    "svg.hashsalt": "flashtalk",  # the same run gives the same bytes
    "text.color": BLACK,
    "text.parse_math": False,  # a name may hold dollar signs
    "xtick.color": GREY,
    "xtick.labelcolor": BLACK,
    "ytick.color": GREY,
    "ytick.labelcolor": BLACK,
}
styled = matplotlib.rc_context(STYLE)


@styled
def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@styled
def svg(figure: Figure) -> bytes:
    """The figure as an SVG file that needs no fonts."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def short_names(cases: Iterable[CaseResult], dtype: bool = True) -> tuple[str, dict[str, str]]:
    """The prefix that all shape names share, such as "14b-w1", and for each case its name without it.

    The dtype is part of the name only if requested and if there are several.
    """
    cases = list(cases)
    split = {c.case: c.shape.split("-") for c in cases}
    common: list[str] = []
    for parts in zip(*split.values(), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    several = dtype and len({c.dtype for c in cases}) > 1
    names = {
        c.case: " ".join(
            filter(None, (c.operation, "-".join(split[c.case][len(common) :]), c.dtype if several else ""))
        )
        for c in cases
    }
    return "-".join(common), names


def title(figure: Figure, words: str, more: str = "", colour: str = GREY) -> None:
    """Writes the title and, below it, a line of explanation in the given colour."""
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.36 / height, words, fontsize=13, weight="bold")
    figure.text(0.02, 1 - 0.62 / height, more, color=colour)


# --- Chunks ---------------------------------------------------------------------------------------------------------


def _bars(rows: Sequence[VariantRow]) -> tuple[Figure, Axes]:
    """Axes for one horizontal bar per variant, the first on top, with a line at the chunk's real-time limit."""
    height = 2.3 + 0.72 * len(rows)
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.16, 0.62 / height, 0.72, 1 - 2.0 / height))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_shorten(row.variant, 18) for row in rows])
    budgets = sorted({1000 * row.frames / ChunkConfig.tgt_fps for row in rows if row.frames and row.seconds})
    # Concurrent stages may add up to more than the chunk.
    longest = max(1000 * max(row.seconds or 0, sum(row.stages.values())) for row in rows)
    axes.set_xlim(0, max(longest, *budgets, 0))
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time of one chunk (ms)")
    for budget in budgets:
        axes.axvline(budget, color=BLACK, lw=1.5, ls=(0, (4, 2)), zorder=4)
        words = f"real time: {number(budget)} ms at {ChunkConfig.tgt_fps} FPS"
        place: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "xytext": (0, 4)}
        axes.annotate(
            words, (budget, 1), ha="left" if budget < axes.get_xlim()[1] / 2 else "right", fontsize=10, **place
        )
    return figure, axes


def _legend_line(figure: Figure, handles: Sequence[Patch]) -> None:
    """Puts the legend in one line below the title."""
    place = (0.01, 1 - 0.7 / figure.get_figheight())
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=place, ncols=len(handles), handlelength=1.2)


def _shorten(words: str, length: int) -> str:
    """The words in one line of at most `length` characters."""
    words = " ".join(words.split())
    return words if len(words) <= length else words[: length - 1] + "…"


def _annotate(axes: Axes, words: str, ms: float, row: int, side: int = 1, **style: Any) -> None:
    """Writes words to the right (side 1) or left (-1) of a bar's end."""
    align = "left" if side > 0 else "right"
    axes.annotate(words, (ms, row), xytext=(6 * side, 0), textcoords="offset points", ha=align, va="center", **style)


@styled
def timeline(run: Run) -> FigureOrReason:
    """Where a chunk's time goes: one bar per variant, with its stages in order and the gaps between them."""
    rows = [row for row in variant_rows(run) if row.seconds]
    if not rows:
        return "No chunk timeline: no variant ran a whole chunk."
    figure, axes = _bars(rows)
    title(
        figure,
        f"Stages of a chunk on {run.machine.device}",
        "mean of the measured chunks; white seams separate calls",
    )
    used: dict[str, str] = {}
    for place, row in enumerate(rows):
        used |= _stage_bars(axes, place, row)
    handles = [Patch(color=colour, label=name) for name, colour in used.items() if name != BETWEEN]
    _legend_line(figure, handles + [_gap_patch()] * (BETWEEN in used))
    return figure


def _stage_bars(axes: Axes, place: int, row: VariantRow) -> dict[str, str]:
    """Draws one variant's bar, and below it the stages too short for a label; returns colours by stage."""
    ordered = [name for name in STAGE_COLOURS if name in row.stages]
    ordered += [name for name in row.stages if name not in STAGE_COLOURS]
    used = {name: STAGE_COLOURS.get(name, GREY) for name in ordered}
    left, end, full, short = 0.0, 1000 * (row.seconds or 0), axes.get_xlim()[1], []
    for name, colour in used.items():
        width, calls = 1000 * row.stages[name], max(1, round(row.calls[name]))
        words = (f"{calls} \u00d7 " if calls > 1 else "") + f"{number(width / calls)} ms"
        seam = 0.8 if width / calls > full / 150 else 0  # no seams if calls are that short
        begins = [left + width * call / calls for call in range(calls)]
        axes.barh([place] * calls, width / calls, left=begins, height=BAR, color=colour, ec="white", lw=seam)
        if width > full * 0.0135 * len(words):
            ink, box = "white" if colour in DARK else BLACK, {"fc": colour, "ec": "none", "pad": 1.5}
            axes.text(left + width / 2, place, words, ha="center", va="center", color=ink, fontsize=10, bbox=box)
        else:
            short.append(f"{name} {words}")
        left += width
    if end > left:
        used[BETWEEN] = FAINT
        axes.add_patch(_gap_patch((left, place - BAR / 2), end - left))
        short.append(f"{BETWEEN} {number(end - left)} ms")
    axes.text(0, place + 0.4, ",  ".join(short), va="center", color=GREY, fontsize=9, bbox=PAPER, zorder=5)
    words = f"{number(end)} ms" + (f"\n{number(row.fps)} FPS" if row.fps else "")
    _annotate(axes, words, max(end, left), place, weight="bold", bbox=PAPER, zorder=5)
    return used


@styled
def streams(run: Run) -> FigureOrReason:
    """When the stages of a traced chunk ran: one row per CUDA stream, or one row on a CPU."""
    traced = [(variant, row) for variant, row in zip(run.variants, variant_rows(run), strict=True) if variant.timeline]
    if not traced:
        return "No streams: no chunk was traced."
    rows = [(v, row, stream) for v, row in traced for stream in sorted({i.stream for i in v.timeline})]
    height = 2.0 + 0.62 * len(rows)
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.16, 0.62 / height, 0.66, 1 - 1.7 / height))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), ["" if stream else _shorten(variant.variant, 18) for variant, _, stream in rows])
    axes.set_xlim(0, 1000 * max(interval.end for variant, _ in traced for interval in variant.timeline))
    axes.set_xlabel("since the chunk's beginning (ms)")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    used = {}
    for place, (variant, row, stream) in enumerate(rows):
        for interval in (s for s in variant.timeline if s.stream == stream):
            used[interval.stage] = colour = STAGE_COLOURS.get(interval.stage, GREY)
            begin, width = 1000 * interval.begin, 1000 * (interval.end - interval.begin)
            axes.barh(place, width, left=begin, height=BAR, color=colour, ec="white", lw=0.8)
        if not stream:
            words = f"critical path {duration(row.critical)}\nall work {duration(row.work)}"
            _annotate(axes, words, axes.get_xlim()[1], place, fontsize=10)
    title(figure, f"Streams of {run.machine.device}", "one traced chunk; bars below each other ran concurrently")
    _legend_line(figure, [Patch(color=colour, label=name) for name, colour in used.items()])
    return figure


def _gap_patch(corner: tuple[float, float] = (0, 0), width: float = 0) -> Rectangle:
    return Rectangle(corner, width, BAR, fc="white", ec=GREY, hatch="//////", lw=0.5, label=BETWEEN)


@styled
def waterfall(run: Run) -> FigureOrReason:
    """From the first variant, the baseline, to the last: what each step saved or cost."""
    rows = variant_rows(run)
    times = [(row.variant, 1000 * row.seconds) for row in rows if row.seconds]
    if len(times) < 2:
        return "No waterfall: it needs a baseline and another variant that ran whole chunks."
    (baseline, first), (newest, last) = times[0], times[-1]
    change = f"{number(first / last)} times as fast" if last < first else f"{number(last / first)} times as slow"
    figure, axes = _bars(rows)
    more = f"{number(first)} ms to {number(last)} ms a chunk, {change}, on {run.machine.device}"
    title(figure, _shorten(f"From {baseline} to {newest}", 80), more)
    colours, before = {"time": BLUE}, None
    for place, row in enumerate(rows):
        if row.seconds:
            now = 1000 * row.seconds
            colours |= _waterfall_step(axes, place, now, before, row.variant in (baseline, newest))
            before = place, now
        else:
            words = _shorten(f"{row.status}: {row.detail or 'no whole chunk was measured'}", 85)
            _annotate(axes, words, 0, place, color=VERMILLION, fontsize=10, bbox=PAPER, zorder=5)
    _legend_line(figure, [Patch(color=colour, label=name) for name, colour in colours.items()])
    return figure


def _waterfall_step(axes: Axes, row: int, now: float, before: tuple[int, float] | None, end: bool) -> dict[str, str]:
    """Draws one variant's time and its difference from the previous one; returns the difference's colour."""
    row_before, then = before or (row, now)
    shorter, longer = sorted((now, then))
    axes.barh(row, shorter, height=BAR, color=BLUE if end else PALE)
    ink = "white" if end else BLACK
    _annotate(axes, f"{number(now)} ms", shorter, row, side=-1, color=ink)
    if before is None:
        return {}
    name, colour = ("saved", GREEN) if now < then else ("lost", VERMILLION)
    axes.barh(row, longer - shorter, left=shorter, height=BAR, color=colour)
    axes.plot([then, then], [row_before + BAR / 2, row - BAR / 2], color=GREY, lw=1, clip_on=False)
    sign = "\u2212" if now < then else "+"
    words = f"{sign}{number(longer - shorter)} ms\n{sign}{abs(now / then - 1):.1%}"
    _annotate(axes, words, longer, row, weight="bold", bbox=PAPER, zorder=5)
    return {name: colour}


# --- History --------------------------------------------------------------------------------------------------------


@styled
def history(run: Run, others: Iterable[Run]) -> FigureOrReason:
    """Median seconds of our back-ends over the runs on the same device, one small panel per case, heaviest first."""
    device = run.machine.device
    runs = {when: r for r in (*others, run) if r.machine.device == device and (when := _when(r))}
    lines = {c.case: line for c in run.cases if len(line := _history_line(c.case, runs)) > 1 and c.best(ours=True)}
    if not lines:
        return f"No history: fewer than two runs on {device} timed the same case."
    cases = sorted((c for c in run.cases if c.case in lines), key=_chunk_seconds, reverse=True)[:PANELS]
    tag, names = short_names(cases)
    columns, rows = 4, math.ceil(len(cases) / 4)
    height = 1.75 + 1.3 * rows
    figure = Figure(figsize=(WIDTH, height))
    of = f"the {PANELS} heaviest of {len(lines)} cases, " if len(lines) > PANELS else ""
    title(figure, f"Our fastest back-end over the runs on {device}", f"{of}{tag}: time now, change since the first run")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.subplots_adjust(0.115, 0.75 / height, 0.975, 1 - 1.4 / height, wspace=0.55, hspace=0.85)
    times = [time for line in lines.values() for time, _ in line]
    day = f", {min(times):%d %b %Y}" if min(times).date() == max(times).date() else ""
    figure.supylabel("time of a call", x=0.012, y=0.5 - 0.325 / height, fontsize=11)
    figure.supxlabel(f"date of the run (UTC{day})", y=0.13 / height, fontsize=11)
    for i, (axes, case) in enumerate(zip(panels, cases, strict=False)):
        _panel(axes, names[case.case], lines[case.case], (min(times), max(times)), i + columns >= len(cases))
    for axes in panels[len(cases) :]:
        axes.set_visible(False)
    return figure


def _when(run: Run) -> datetime | None:
    """When the run began, in UTC; None if the file, of another program, does not say so."""
    try:
        when = datetime.fromisoformat(run.started)
    except ValueError:
        return None
    return when.astimezone(UTC) if when.tzinfo else when.replace(tzinfo=UTC)


Line = list[tuple[datetime, Measurement]]


def _history_line(case: str, runs: Mapping[datetime, Run]) -> Line:
    """When each run took place, and the measurement of our fastest back-end."""
    found = ((when, runs[when].case(case)) for when in sorted(runs))
    return [(when, best) for when, result in found if result and (best := result.best(ours=True))]


def _chunk_seconds(case: CaseResult) -> float:
    """Seconds of all the case's calls in a chunk."""
    best = case.best(ours=True)
    return (case.calls or 1) * (best.seconds or 0) if best else 0


def _panel(axes: Axes, name: str, line: Line, span: tuple[datetime, datetime], lowest: bool) -> None:
    """Draws one case: a point with its spread per run, and how the last run compares with the first."""
    times: list[Any] = [time for time, _ in line]
    values = [m.seconds or math.nan for _, m in line]
    spreads = [(m.spread or 0) * (m.seconds or 0) for _, m in line]
    change = values[-1] / values[0] - 1
    same = abs(values[-1] - values[0]) < max(0.02 * values[0], spreads[0] + spreads[-1])
    colour = GREY if same else VERMILLION if change > 0 else GREEN
    axes.errorbar(times, values, yerr=spreads, color=BLUE, ecolor=SKY, marker="o", ms=3.5, lw=1.3, elinewidth=3)
    axes.plot(times[-1], values[-1], marker="o", ms=7, color=colour, zorder=3)
    axes.text(-0.36, 1.34, _shorten(name, 29), transform=axes.transAxes, fontsize=9.5, weight="bold")
    words = f"{duration(values[-1])}, {round(change, 3) + 0.0:+.1%}".replace("-", "\u2212")
    axes.text(-0.36, 1.1, words, transform=axes.transAxes, fontsize=9.5, color=colour)
    low, high = (sign * max(sign * v + s for v, s in zip(values, spreads, strict=True)) for sign in (-1, 1))
    margin = max(0.1 * min(values), 0.15 * (high - low))
    axes.set_ylim(low - margin, high + margin)
    apart = max(values) - min(values) > 0.25 * (high - low + 2 * margin)  # two ticks do not overlap
    axes.set_yticks([min(values), max(values)] if apart else [values[-1]])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    first, last = span
    axes.set_xlim(date2num(first - (last - first) * 0.06), date2num(last + (last - first) * 0.06))
    form = "%d %b %y" if first.date() != last.date() else "%H:%M"
    axes.set_xticks([date2num(first), date2num(last)], [f"{t:{form}}" for t in span] if lowest else ["", ""])
    for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    axes.tick_params(labelsize=9)


# --- NVML -------------------------------------------------------------------------------------------------------------


@styled
def nvml_strips(run: Run) -> FigureOrReason:
    """NVML's readings over the run: clock, power and its limit, temperature, memory."""
    g = run.nvml
    strips = [
        ("SM clock", "MHz", g.sm_mhz, BLUE),
        ("power", "W", g.watts, VERMILLION),
        ("temperature", "\u00b0C", g.celsius, PURPLE),
        ("memory", "GB", [value / 1e9 for value in g.used_bytes], GREEN),
    ]
    strips = [strip for strip in strips if len(strip[2]) == len(g.seconds) > 1]
    if not strips:
        return f"No NVML strip: {g.note or 'fewer than two readings were taken'}."
    height = 1.7 + 1.3 * len(strips)
    figure = Figure(figsize=(WIDTH, height))
    title(figure, f"{run.machine.device} during the run", *throttling(run))
    panels = list(figure.subplots(len(strips), 1, sharex=True, squeeze=False).flat)
    figure.subplots_adjust(0.1, 0.65 / height, 0.86, 1 - 0.9 / height, hspace=0.28)
    for axes, (name, unit, values, colour) in zip(panels, strips, strict=True):
        axes.plot(g.seconds, values, color=colour, lw=1.3)
        axes.fill_between(g.seconds, values, color=colour, alpha=0.12, lw=0)
        axes.set_ylabel(f"{name}\n({unit})")
        axes.yaxis.set_major_locator(MaxNLocator(3))
        words, top = f"max {max(values):.0f} {unit}", max(values)
        if name == "power" and g.power_limit_watts:
            axes.axhline(g.power_limit_watts, color=BLACK, lw=1.2, ls=(0, (4, 2)))
            words, top = f"{words}\nlimit {g.power_limit_watts:.0f} {unit}", max(top, g.power_limit_watts)
        axes.set_ylim(0, 1.15 * top or 1)
        place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(words, (1, max(values)), xytext=(6, 0), va="center", fontsize=10, **place)
    panels[-1].set_xlabel("time since the run began (s)")
    panels[-1].set_xlim(g.seconds[0], g.seconds[-1])
    figure.align_ylabels()
    return figure


def throttling(run: Run) -> tuple[str, str]:
    """Whether the GPU was throttled, in words, and the colour of these words."""
    if not run.nvml.seconds:
        return f"Throttling unknown: {run.nvml.note or 'NVML was not read'}.", GREY
    if not run.nvml.throttled:
        return "The GPU was not throttled.", GREY
    reasons = ", ".join(f"{name} in {percent(part)} of the readings" for name, part in run.nvml.throttled.items())
    return f"The GPU was throttled: {reasons}.", VERMILLION
