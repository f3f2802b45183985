"""The roofline: each case's speed over its arithmetic intensity, under the ceilings measured on this machine.

A case's point is at FLOPs / bytes of its formula and at FLOPs / median seconds. The slope is the measured copy
bandwidth, the flat roofs are the measured rates of matrix products by dtype. Labels stand in a column beside the plot,
in the order of their points and at a distance that no two overlap, each with a line to its point. On a phone they are
numbers there, and named below.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from profiling.ceilings import above_ceiling
from profiling.report.figures import BLACK, DTYPE_COLOURS, GREY, WHITE, WIDE, shorten, styled
from profiling.results import CaseResult, Measurement, Run
from profiling.tables import percent, rate

LABELS = 26  # cases; more do not fit beside the plot
LINE = 0.19  # inches from one label to the next
LETTERS = 42  # of a label


@dataclass(frozen=True)
class Dot:
    """A back-end in the plot."""

    case: CaseResult
    measurement: Measurement
    seconds: float
    least: float | None  # seconds at the ceiling

    @property
    def place(self) -> tuple[float, float]:
        """Its coordinates: FLOP/byte, FLOP/s."""
        return self.case.flops / self.case.bytes, self.case.flops / self.seconds

    @property
    def to_gain(self) -> float:
        """Seconds per chunk between it and the ceiling."""
        return (self.case.calls or 1) * (self.seconds - (self.least or 0))

    @property
    def colour(self) -> str:
        """The colour of its dtype."""
        return DTYPE_COLOURS.get(self.case.dtype, GREY)


@dataclass(frozen=True)
class Label:
    """Words beside the plot, and the point that they belong to."""

    words: str
    place: tuple[float, float]
    colour: str
    roof: bool = False


@styled
def roofline(run: Run, width: float = WIDE) -> Figure | None:
    """Draws ours and the best peer of every case, connected by a line."""
    pairs = [pair for case in run.cases if (pair := _dots(case, run))]
    if not pairs:
        return None
    dots = [dot for pair in pairs for dot in pair]
    labelled = sorted((pair[0] for pair in pairs), key=lambda dot: dot.to_gain, reverse=True)[:LABELS]
    roofs = {dtype: flop_s for dtype, flop_s in run.ceilings.matmul_flop_s.items() if _used(dtype, dots)}
    lines = LINE * (len(labelled) + len(roofs))
    below = 0 if width == WIDE else lines + 0.2  # inches for names
    handles, columns = _handles(dots, run, pale=len(pairs) > len(labelled)), 7 if width == WIDE else 2
    above = 0.5 + 0.22 * math.ceil(len(handles) / columns)
    figure = Figure(figsize=(width, above + max(3.2, lines) + 0.6 + below))
    figure.legend(handles=handles, loc="upper left", ncols=columns)
    axes = _add_axes(figure, above, below)
    _scale(axes, dots, roofs.values())
    for pair in pairs:
        _draw(axes, pair, pale=pair[0] not in labelled)
    _draw_roofs(axes, run, roofs)
    _label(figure, axes, [*_case_labels(labelled, run), *_roof_labels(axes, roofs)], below)
    return figure


def _add_axes(figure: Figure, above: float, below: float) -> Axes:
    """Axes with so many inches above and below them, and a column for labels to their right."""
    width, height = figure.get_size_inches()
    left, right = 0.6, 3.55 if width == WIDE else 0.5
    inside = (left / width, (0.6 + below) / height, 1 - (left + right) / width, 1 - (0.6 + below + above) / height)
    return figure.add_axes(inside)


def _scale(axes: Axes, dots: Sequence[Dot], roofs: Collection[float]) -> None:
    """Fits the axes to the points and roofs, and names their units."""
    x, y = zip(*(dot.place for dot in dots), strict=True)
    scale, unit = _unit(max(*y, *roofs))
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP/byte)")
    axes.set_title(unit, loc="left", fontsize=10)
    axes.set_xlim(min(x) / 1.6, max(x) * 1.6)
    axes.set_ylim(min(y) / 1.6, max(*y, *roofs) * 1.6)
    for axis, one, (low, high) in ((axes.xaxis, 1.0, axes.get_xlim()), (axes.yaxis, scale, axes.get_ylim())):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 30 else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _, one=one: f"{value / one:g}"))
        axis.set_minor_formatter(NullFormatter())


def _case_labels(dots: Sequence[Dot], run: Run) -> list[Label]:
    return [Label(_words(dot, run), dot.place, dot.colour) for dot in dots]


def _roof_labels(axes: Axes, roofs: Mapping[str, float]) -> list[Label]:
    end = axes.get_xlim()[1]
    return [
        Label(f"{dtype} products {rate(top, 'FLOP')}", (end, top), DTYPE_COLOURS.get(dtype, GREY), roof=True)
        for dtype, top in roofs.items()
    ]


def _used(dtype: str, dots: Sequence[Dot]) -> bool:
    return any(dot.case.dtype == dtype and dot.case.is_matmul for dot in dots)


def _words(dot: Dot, run: Run) -> str:
    """What a case is called, and its share of the ceiling, with an exclamation mark if that is above it."""
    above = above_ceiling(dot.case, dot.seconds, run.ceilings, run.machine)
    share = f"  {percent(dot.least / dot.seconds)}{'!' if above else ''}" if dot.least else ""
    return shorten(f"{dot.case.operation} {dot.case.shape}", LETTERS - len(share)) + share


def _dots(case: CaseResult, run: Run) -> list[Dot]:
    """The dot of ours and that of the best peer, if they were timed."""
    if not case.flops or not case.bytes:
        return []
    bound = case.bound(run.ceilings)
    best = [m for ours in (True, False) if (m := case.best(ours))]
    return [Dot(case, m, m.seconds, bound[1] if bound else None) for m in best if m.seconds]


def _unit(most: float) -> tuple[float, str]:
    """The unit of the vertical axis: how many FLOP/s it is, and its name."""
    return next(((10.0**n, f"{p}FLOP/s") for n, p in ((12, "T"), (9, "G"), (6, "M")) if most >= 10**n), (1.0, "FLOP/s"))


def _draw(axes: Axes, pair: Sequence[Dot], *, pale: bool) -> None:
    alpha = 0.4 if pale else 1.0
    colour = pair[0].colour
    axes.plot(*zip(*(dot.place for dot in pair), strict=True), color=colour, lw=1, alpha=alpha / 2, zorder=2)
    for dot in pair:
        fill, marker, size = (colour, "o", 7) if dot.measurement.ours else (WHITE, "D", 5.5)
        axes.plot(*dot.place, marker=marker, ms=size, mfc=fill, mec=colour, mew=1.2, alpha=alpha, zorder=3)


def _draw_roofs(axes: Axes, run: Run, roofs: Mapping[str, float]) -> None:
    """Draws the ceilings, each from where the copy's slope meets it."""
    low, high = axes.get_xlim()
    copy = run.ceilings.copy_bytes_s
    for dtype, top in roofs.items():
        begin = min(max(low, top / copy), high) if copy else low
        axes.plot([begin, high], [top, top], color=DTYPE_COLOURS.get(dtype, GREY), lw=2, zorder=1)
    if copy:
        end = max(low, min(high, max(roofs.values(), default=high * copy) / copy))
        axes.plot([low, end], [low * copy, end * copy], color=BLACK, lw=2, zorder=1)


def _label(figure: Figure, axes: Axes, labels: Sequence[Label], below: float) -> None:
    """Writes the labels beside the plot; with space `below` it, in inches, their numbers; the words are there."""
    box, inch = axes.get_window_extent(), figure.dpi
    labels = sorted(labels, key=lambda label: label.place[1], reverse=True)
    wanted = [axes.transData.transform(label.place)[1] for label in labels]
    heights = _apart([float(y) for y in reversed(wanted)], LINE * inch, box.y0 + LINE * inch / 2, box.y1)[::-1]
    width, height = figure.get_figwidth() * inch, figure.get_figheight() * inch
    for i, (label, y) in enumerate(zip(labels, heights, strict=True)):
        words, weight = label.words, "bold" if label.roof else "normal"
        if below:
            words = str(i + 1)
            line = (below - 0.1 - LINE * (i + 0.5)) / figure.get_figheight()
            figure.text(0.03, line, f"{words}  {label.words}", color=label.colour, weight=weight, va="center")
        x = box.x1 + 0.25 * inch
        figure.text(x / width, y / height, words, color=label.colour, weight=weight, va="center", fontsize=9.5)
        to = axes.transData.inverted().transform([(box.x1 + 4, y), (x - 4, y)])
        points = [label.place, *map(tuple, to)]
        axes.plot(*zip(*points, strict=True), color=label.colour, lw=0.7, alpha=0.55, zorder=1.5, clip_on=False)


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, which ascend: at least a gap from each other, between `low` and `high`."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + gap if places else low))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - gap if i + 1 < len(places) else high)
    return places


def _handles(dots: Sequence[Dot], run: Run, *, pale: bool) -> list[Line2D | Patch]:
    """The legend: what each kind of point, colour and line means."""
    kinds = {dot.measurement.ours for dot in dots}
    handles: list[Line2D | Patch] = []
    if True in kinds:
        handles.append(Line2D([], [], marker="o", ls="", color=GREY, ms=7, label="fastest of ours"))
    if False in kinds:
        handles.append(Line2D([], [], marker="D", ls="", mfc=WHITE, mec=GREY, ms=5.5, label="best peer"))
    if pale:
        handles.append(Line2D([], [], marker="o", ls="", color=GREY, alpha=0.4, label="not labelled: less to gain"))
    dtypes = dict.fromkeys(dot.case.dtype for dot in dots)
    handles += [Patch(color=DTYPE_COLOURS.get(dtype, GREY), label=dtype) for dtype in dtypes]
    if copy := run.ceilings.copy_bytes_s:
        handles.append(Line2D([], [], color=BLACK, lw=2, label=f"copy {rate(copy, 'B')}"))
    return handles
