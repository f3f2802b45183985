"""The roofline: each case's speed over its arithmetic intensity, under the ceilings measured on this machine.

A case's point is at FLOPs / bytes of its formula and at FLOPs / median seconds. The slope is the measured copy
bandwidth, the flat roofs are the measured rates of matrix products by dtype. Labels mark the cases with the most time
to gain in a chunk, calls times (seconds - least seconds), placed so that they hide nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

from profiling.report.figures import BLACK, DTYPE_COLOURS, GREY, WIDTH, FigureOrReason, short_names, styled, title
from profiling.results import CaseResult, Measurement, Run
from profiling.tables import percent, rate

HEIGHT = 6.6  # inches
LABELS = 10  # more would hide the points


@dataclass(frozen=True)
class Dot:
    """A back-end in the plot."""

    case: CaseResult
    measurement: Measurement
    seconds: float
    least: float | None  # seconds at the ceiling

    @property
    def place(self) -> tuple[float, float]:
        """Its coordinates: FLOP/byte, TFLOP/s."""
        return self.case.flops / self.case.bytes, self.case.flops / self.seconds / 1e12

    @property
    def to_gain(self) -> float:
        """Seconds per chunk between it and the ceiling."""
        return (self.case.calls or 1) * (self.seconds - (self.least or 0))

    @property
    def colour(self) -> str:
        """The colour of its dtype."""
        return DTYPE_COLOURS.get(self.case.dtype, GREY)


@styled
def roofline(run: Run) -> FigureOrReason:
    """Draws ours and the best peer of every case, connected by a line."""
    pairs = [pair for case in run.cases if (pair := _dots(case, run))]
    if not pairs:
        return "No roofline: no case has a time."
    dots = [dot for pair in pairs for dot in pair]
    tag, names = short_names([pair[0].case for pair in pairs], dtype=False)
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0.1, 0.65 / HEIGHT, 0.88, 1 - 1.8 / HEIGHT))
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP/byte)", ylabel="speed (TFLOP/s)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    _limit(axes, dots, run)
    labelled = sorted((pair[0] for pair in pairs), key=lambda dot: dot.to_gain, reverse=True)[:LABELS]
    for pair in pairs:
        _draw(axes, pair, faded=pair[0] not in labelled)
    roofs, taken = _roofs(axes, run)
    words = [names[d.case.case] + (f" {percent(d.least / d.seconds)}" if d.least else "") for d in labelled]
    obstacles = axes.transData.transform([dot.place for dot in dots] + roofs)
    _label(axes, labelled, words, obstacles, taken)
    _legend(figure, dots)
    said = [tag] if tag else []
    said += ["labelled: most time to gain in a chunk"] if len(pairs) > len(labelled) else []
    said += ["percent: of the ceiling" if any(dot.least for dot in dots) else "no ceiling was measured"]
    title(figure, f"Roofline of {run.machine.device}", "; ".join(said))
    return figure


def _dots(case: CaseResult, run: Run) -> list[Dot]:
    """The dot of ours and that of the best peer, if they were timed."""
    if not case.flops or not case.bytes:
        return []
    bound = case.bound(run.ceilings)
    best = [m for ours in (True, False) if (m := case.best(ours))]
    return [Dot(case, m, m.seconds, bound[1] if bound else None) for m in best if m.seconds]


def _draw(axes: Axes, pair: Sequence[Dot], faded: bool) -> None:
    alpha = 0.4 if faded else 1.0
    colour = pair[0].colour
    axes.plot(*zip(*(dot.place for dot in pair), strict=True), color=colour, lw=1, alpha=alpha / 2, zorder=2)
    for dot in pair:
        fill, marker, size = (colour, "o", 7) if dot.measurement.ours else ("white", "D", 5.5)
        axes.plot(*dot.place, marker=marker, ms=size, mfc=fill, mec=colour, mew=1.2, alpha=alpha, zorder=3)


def _limit(axes: Axes, dots: Sequence[Dot], run: Run) -> None:
    x, y = map(list, zip(*(dot.place for dot in dots), strict=True))
    tops = [flop_s / 1e12 for flop_s in run.ceilings.matmul_flop_s.values()]
    if run.ceilings.copy_bytes_s:
        x += [top * 1e12 / run.ceilings.copy_bytes_s for top in tops]
    axes.set_xlim(min(x) / 2.5, max(x) * 8)
    axes.set_ylim(min(y) / 2.5, max(y + tops) * 4)


def _roofs(axes: Axes, run: Run) -> tuple[list[tuple[float, float]], list[Bbox]]:
    """Draws and names the ceilings; returns points along them and the boxes of the names, for labels to avoid."""
    low, high = axes.get_xlim()
    copy = (run.ceilings.copy_bytes_s or 0) / 1e12  # TFLOP/s at one FLOP a byte
    tops = {dtype: flop_s / 1e12 for dtype, flop_s in run.ceilings.matmul_flop_s.items()}
    points: list[tuple[float, float]] = []
    boxes: list[Bbox] = []
    for dtype, top in tops.items():
        begin, colour = max(low, top / copy) if copy else low, DTYPE_COLOURS.get(dtype, GREY)
        axes.plot([begin, high], [top, top], color=colour, lw=2, zorder=1)
        points += [(float(x), top) for x in np.geomspace(begin, high, 40)]
        text = axes.annotate(
            f"{dtype} products {rate(1e12 * top, 'FLOP')}",
            (begin, top),
            xytext=(-10, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=colour,
            fontsize=10,
        )
        if text.get_window_extent().x0 < axes.get_window_extent().x0:  # no room left of the roof
            text.set(position=(-2, 4), verticalalignment="bottom")
            text.xy = (high, top)
        boxes.append(Bbox(text.get_window_extent().get_points()))
    if copy:
        end = max((top / copy for top in tops.values()), default=high)
        axes.plot([low, end], [low * copy, end * copy], color=BLACK, lw=2, zorder=1)
        points += [(float(x), float(x) * copy) for x in np.geomspace(low, end, 60)]
        begin = max(low, axes.get_ylim()[0] / copy)
        middle = begin * (end / begin) ** 0.3
        (x0, y0), (x1, y1) = axes.transData.transform([(low, low * copy), (end, end * copy)])
        text = axes.annotate(
            f"copy {rate(1e12 * copy, 'B')}",
            (middle, middle * copy),
            xytext=(-6, 6),
            textcoords="offset points",
            rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)),
            rotation_mode="anchor",
            fontsize=10,
        )
        boxes.append(text.get_window_extent())
    return points, boxes


def _legend(figure: Figure, dots: Sequence[Dot]) -> None:
    dtypes = [name for name in DTYPE_COLOURS if any(dot.case.dtype == name for dot in dots)]
    handles = [
        Line2D([], [], marker="o", ls="", color=GREY, ms=7, label="ours"),
        Line2D([], [], marker="D", ls="", mfc="white", mec=GREY, ms=5.5, label="best peer"),
        *(Patch(color=DTYPE_COLOURS[name], label=name) for name in dtypes),
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.01, 1 - 0.72 / HEIGHT),
        ncols=len(handles),
        handlelength=1.2,
    )


# --- Labels ---------------------------------------------------------------------------------------------------------


def _label(axes: Axes, dots: Sequence[Dot], words: Sequence[str], points: np.ndarray, taken: Sequence[Bbox]) -> None:
    """Writes each word near its dot, where it hides as little as possible, with a line to the dot.

    `points` [n, 2] and the boxes `taken` are in pixels and must stay visible. Each label takes the best placement that
    the others leave. This is repeated four times, since the first labels were placed without regard to the last.
    """
    texts = [axes.text(0, 0, word, color=d.colour, fontsize=10, zorder=5) for d, word in zip(dots, words, strict=True)]
    sizes = np.array([text.get_window_extent().size for text in texts])
    pixels = axes.transData.transform([dot.place for dot in dots])
    places = [_LabelPlacements(pixel, size) for pixel, size in zip(pixels, sizes, strict=True)]
    inside = np.array(axes.get_window_extent().extents)
    fixed = np.array([box.extents for box in taken]).reshape(-1, 4)
    chosen: dict[int, int] = {}
    for _ in range(4):
        for i, mine in enumerate(places):
            others = [(places[j].boxes[k], places[j].lines[k]) for j, k in chosen.items() if j != i]
            boxes = np.concatenate([fixed, *(box[None] for box, _ in others)])
            marks = np.concatenate([points, *(line for _, line in others)])
            chosen[i] = int(mine.costs(marks, boxes, inside).argmin())
    to_data = axes.transData.inverted().transform
    for i, k in chosen.items():
        texts[i].set_path_effects([withStroke(linewidth=3, foreground="white")])
        texts[i].set(position=to_data(places[i].boxes[k, :2]), verticalalignment="bottom")
        axes.plot(*to_data(places[i].lines[k]).T, color=dots[i].colour, lw=0.8, zorder=2.5)


class _LabelPlacements:
    """Candidate placements of a label around its dot, in pixels.

    `boxes` [n, 4] are (left, bottom, right, top); `lines` [n, 12, 2] are points on the line from the dot to each box.
    """

    def __init__(self, dot: np.ndarray, size: np.ndarray) -> None:
        self._distance, angle = map(
            np.ravel, np.meshgrid((10, 18, 30, 48, 72, 100, 140), np.arange(24) * math.tau / 24)
        )
        way = np.stack((np.cos(angle), np.sin(angle)), axis=1)
        corner = dot + self._distance[:, None] * way - size * (1 - way) / 2
        self.boxes = np.concatenate((corner, corner + size), axis=1)
        nearest = np.clip(dot, corner, corner + size)
        self.lines = dot + np.linspace(0, 1, 12)[:, None] * (nearest - dot)[:, None]

    def costs(self, points: np.ndarray, taken: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """The cost of each placement, [n]: its distance and what it would hide. The weights were chosen by eye."""
        covered = _within(points[None], _padded(self.boxes, 4)[:, None]).sum(1)
        crossed = _within(self.lines[:, :, None], _padded(taken, 2)[None, None]).sum((1, 2))
        wide, other = _padded(self.boxes, 2)[:, None], taken[None]
        overlaps = (
            (np.maximum(wide[..., :2], other[..., :2]) < np.minimum(wide[..., 2:], other[..., 2:])).all(-1).sum(1)
        )
        beside = np.abs(self.lines[:, 3:, None] - points).max(-1) < 4  # the line begins on its own dot
        struck = beside.any(1).sum(1)
        outside = ((self.boxes[:, :2] < inside[:2]) | (self.boxes[:, 2:] > inside[2:])).any(1)
        near = 1.5 * self._distance + 50 * covered + 20 * struck
        return near + 100 * crossed + 400 * overlaps + 2000 * outside


def _padded(boxes: np.ndarray, by: float) -> np.ndarray:
    return boxes + by * np.array((-1, -1, 1, 1))


def _within(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    return np.all((points > boxes[..., :2]) & (points < boxes[..., 2:]), axis=-1, keepdims=False)
