"""The figures of a report: functions that turn runs into a matplotlib figure, or None where there is nothing to draw.

Each is drawn as wide as it is shown: `WIDE` on a page, `NARROW` on a phone. The page's headings are their titles.
Colours are those of Okabe and Ito, which the colour-blind can tell apart. They mean the same in every figure:
`DTYPE_COLOURS` for the dtype of matrix products, `STAGE_COLOURS` for the stages of a chunk. `png` and `svg` turn a
figure into a file; an SVG file has dark colours too, for readers whose system is set to dark.
"""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from model.config import ChunkConfig
from profiling.results import Run, StageInterval, VariantResult
from profiling.tables import STEP, VariantRow, duration, percent, variant_rows

WIDE, NARROW, DPI = 10.0, 4.2, 100  # inches, inches, pixels an inch

BLACK, GREY, FAINT, WHITE = "#222222", "#6b6b6b", "#e4e4e4", "#ffffff"
BLUE, SKY, GREEN, YELLOW, ORANGE, VERMILLION, PURPLE = (
    "#0072b2",
    "#56b4e9",
    "#009e73",
    "#f0e442",
    "#e69f00",
    "#d55e00",
    "#cc79a7",
)
DARK_SCHEME = {  # instead of these, on a dark page
    BLACK: "#e6e6e6",
    GREY: "#a2a2a2",
    FAINT: "#33373d",
    WHITE: "#15181c",
    BLUE: "#3f9fe0",
    GREEN: "#1fb88d",
    VERMILLION: "#f0803c",
}
DTYPE_COLOURS = {"fp32": GREEN, "fp16": PURPLE, "bf16": BLUE, "fp8": VERMILLION, "int8": ORANGE}
STAGE_COLOURS = {"audio": PURPLE, STEP: BLUE, "decode": ORANGE, "color": YELLOW, "motion": GREEN, "emit": SKY}
WHOLE = "whole chunk"  # of a variant whose stages overlap, but nobody traced how
PAPER: Any = {"fc": WHITE, "ec": "none", "pad": 1}  # background of words that a line would cross
BAR = 0.62  # height of a bar, as a share of its lane

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": BLACK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.dpi": DPI,
    "figure.facecolor": WHITE,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so reports look the same everywhere
    "font.size": 10,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "legend.borderaxespad": 0.2,
    "legend.columnspacing": 1.4,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
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
    """The figure as an SVG file that needs no fonts, in light or dark colours as the reader's system asks."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for colour in DARK_SCHEME:
        text = text.replace(colour, f"var(--{colour[1:]})")
    light, dark = (
        "".join(f"--{name[1:]}:{shown};" for name, shown in scheme)
        for scheme in (((name, name) for name in DARK_SCHEME), DARK_SCHEME.items())
    )
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    return text.replace("<defs>", f"<defs>{style}", 1).encode()


def shorten(words: str, length: int) -> str:
    """The words in one line of at most `length` characters."""
    words = " ".join(words.split())
    return words if len(words) <= length else words[: length - 1] + "…"


# --- Chunks ---------------------------------------------------------------------------------------------------------


@styled
def timeline(run: Run, width: float = WIDE) -> Figure | None:
    """When the stages of a chunk ran, to scale: a lane for each CUDA stream of a traced chunk, below each other.

    A variant that was not traced has one lane, with the medians of its stages one after the other.
    """
    rows = [(variant, row) for variant, row in zip(run.variants, variant_rows(run), strict=True) if row.seconds]
    if not rows:
        return None
    lanes = [_lanes(variant, row) for variant, row in rows]
    budgets = {row.frames / ChunkConfig.tgt_fps for _, row in rows if row.frames}
    end = max([row.seconds or 0 for _, row in rows] + [i.end for found in lanes for lane in found for i in lane])
    places = sum(len(found) + 0.85 for found in lanes)
    figure = Figure(figsize=(width, 1.15 + 0.42 * places), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1000 * max(end, *budgets, 0)), ylim=(places, 0), xlabel="since the chunk's beginning (ms)")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    place, used = 0.0, {}
    for (_, row), found in zip(rows, lanes, strict=True):
        words = f"{shorten(row.variant, 26)}   {duration(row.seconds)}" + (f", {row.fps:.1f} FPS" if row.fps else "")
        axes.text(0, place + 0.6, words, weight="bold", va="center", bbox=PAPER)
        place += 0.85
        for stream, lane in enumerate(found):
            used |= _draw_lane(axes, place + 0.5, lane)
            if stream:
                words = f"at the same time, {'on stream' if run.machine.kind == 'cuda' else 'in thread'} {stream + 1}"
                style: Any = {"textcoords": "offset points", "va": "center", "color": GREY, "bbox": PAPER, "zorder": 5}
                axes.annotate(words, (1000 * lane[-1].end, place + 0.5), (6, 0), **style)
            place += 1
    for budget in budgets:
        axes.axvline(1000 * budget, color=BLACK, lw=1.4, ls=(0, (4, 2)), zorder=4)
    handles: list[Any] = [Patch(color=colour, label=name) for name, colour in used.items()]
    if budgets:
        words = f"real time, {duration(min(budgets))} at {ChunkConfig.tgt_fps} FPS"
        handles.append(Line2D([], [], color=BLACK, lw=1.4, ls=(0, (4, 2)), label=words))
    figure.legend(handles=handles, loc="outside upper left", ncols=7 if width == WIDE else 2, handlelength=1.6)
    return figure


def _lanes(variant: VariantResult, row: VariantRow) -> list[list[StageInterval]]:
    """The intervals of each stream; of an untraced chunk, one lane of medians."""
    if variant.timeline:
        streams = sorted({interval.stream for interval in variant.timeline})
        return [sorted((i for i in variant.timeline if i.stream == s), key=lambda i: i.begin) for s in streams]
    lane: list[StageInterval] = []
    for stage in sorted(row.stages, key=[*STAGE_COLOURS, *row.stages].index):
        calls = max(1, round(row.calls[stage]))
        each = row.stages[stage] / (1 if stage == STEP else calls)
        for _ in range(calls):
            begin = lane[-1].end if lane else 0.0
            lane.append(StageInterval(stage, 0, begin, begin + each))
    whole = row.seconds or 0
    return [lane if lane and lane[-1].end <= 1.01 * whole else [StageInterval(WHOLE, 0, 0.0, whole)]]


def _draw_lane(axes: Axes, place: float, lane: Sequence[StageInterval]) -> dict[str, str]:
    """Draws the intervals of a stream; returns the colours by stage."""
    colours = {i.stage: STAGE_COLOURS.get(i.stage, GREY) for i in lane}
    seam = axes.get_xlim()[1] / 250000  # seconds that a white line between two bars covers
    for i in lane:
        line = 0.8 if i.end - i.begin > 3 * seam else 0
        axes.barh(
            place, 1000 * (i.end - i.begin), left=1000 * i.begin, height=BAR, color=colours[i.stage], ec=WHITE, lw=line
        )
    return colours


# --- NVML -----------------------------------------------------------------------------------------------------------


@styled
def nvml_strips(run: Run, width: float = WIDE) -> Figure | None:
    """NVML's readings over the run: clock, power and its limit, temperature, memory."""
    g = run.nvml
    strips = [
        ("SM clock", "MHz", 0, g.sm_mhz, BLUE),
        ("power", "W", 0, g.watts, VERMILLION),
        ("temperature", "\u00b0C", 0, g.celsius, PURPLE),
        ("memory", "GiB", 1, [value / 2**30 for value in g.used_bytes], GREEN),
    ]
    strips = [strip for strip in strips if len(strip[3]) == len(g.seconds) > 1]
    if not strips:
        return None
    figure = Figure(figsize=(width, 0.6 + 1.1 * len(strips)), layout="constrained")
    panels = list(figure.subplots(len(strips), 1, sharex=True, squeeze=False).flat)
    for axes, (name, unit, digits, values, colour) in zip(panels, strips, strict=True):
        axes.plot(g.seconds, values, color=colour, lw=1.3)
        axes.fill_between(g.seconds, values, color=colour, alpha=0.15, lw=0)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        words, top = f"{name}, at most {max(values):.{digits}f} {unit}", max(values)
        if name == "power" and g.power_limit_watts:
            axes.axhline(g.power_limit_watts, color=BLACK, lw=1.2, ls=(0, (4, 2)))
            words, top = f"{words}; limit {g.power_limit_watts:.0f} {unit}", max(top, g.power_limit_watts)
        axes.set_ylim(0, 1.15 * top or 1)
        axes.set_title(words, loc="left", fontsize=10)
    panels[-1].set_xlabel("time since the run began (s)")
    panels[-1].set_xlim(g.seconds[0], g.seconds[-1])
    figure.align_ylabels()
    return figure


def throttling(run: Run) -> str:
    """Whether the GPU was throttled, in words."""
    if run.nvml.throttled:
        reasons = ", ".join(f"{name} in {percent(part)} of the readings" for name, part in run.nvml.throttled.items())
        return f"The GPU was throttled: {reasons}."
    return "The GPU was not throttled." if run.nvml.seconds else f"Throttling unknown: {run.nvml.note or 'not read'}."
