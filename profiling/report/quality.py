"""The figures of generated video's quality: each measure in each setting, and the drift of long streams."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from profiling.report.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, WIDE, styled
from profiling.results import Quality, Run

COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)  # of settings, in their order
IDEAL = {  # what the data itself has, where that is one number
    "r of open": 1, "r of wide": 1, "r of close": 1, "r of round": 1, "lag of open, frames": 0, "seam ratio": 1,
    "r of open with another voice": 0, "sharpness, of the portrait's": 1, "blinks, of the data's": 1,
    "sway of yaw, of the data's": 1, "sway of pitch, of the data's": 1, "sway of roll, of the data's": 1,
}  # fmt: skip


@styled
def measures(run: Run, width: float = WIDE) -> Figure | None:
    """A panel for each measure, in it a line for each setting: the value and its 95 % interval."""
    rows = [row for row in run.quality if not row.track and row.value is not None]
    if not rows:
        return None
    settings, names = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("setting", "measure"))
    columns = 4 if width == WIDE else 2
    lines = -(-len(names) // columns)
    figure = Figure(
        figsize=(width, 0.4 + 0.2 * len(settings) + lines * (0.75 + 0.2 * len(settings))), layout="constrained"
    )
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, name, [row for row in rows if row.measure == name], settings)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.legend(handles=_handles(settings), loc="outside upper left", ncols=4 if width == WIDE else 1)
    return figure


def _panel(axes: Axes, name: str, rows: Sequence[Quality], settings: Sequence[str]) -> None:
    for row in rows:
        place, value = settings.index(row.setting), row.value or 0.0
        colour = _colour(place)
        axes.plot([row.low or value, row.high or value], [place, place], color=colour, lw=3, alpha=0.35)
        axes.plot([value], [place], "o", color=colour, ms=6)
    if name in IDEAL:
        axes.axvline(IDEAL[name], color=GREY, lw=1.2, zorder=1.9)
    axes.set_title(name, loc="left", fontsize=9)
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _handles(settings: Sequence[str]) -> list[Line2D]:
    return [Line2D([], [], color=_colour(i), marker="o", lw=2, label=name) for i, name in enumerate(settings)]


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


@styled
def drift(run: Run, width: float = WIDE) -> Figure | None:
    """A panel for each measure of long streams, in it a line for each setting."""
    rows = [row for row in run.quality if row.track]
    if not rows:
        return None
    settings, names = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("setting", "measure"))
    columns = len(names) if width == WIDE else 1
    figure = Figure(figsize=(width, 0.5 + 2.4 * -(-len(names) // columns)), layout="constrained")
    panels = list(figure.subplots(-(-len(names) // columns), columns, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=True):
        title, _, about = name.partition(", last over first")  # 10 of 1000 chunks
        chunks = int(about.split()[-2])
        for row in (row for row in rows if row.measure == name):
            places = [(i + 0.5) * chunks / len(row.track) for i in range(len(row.track))]
            axes.plot(places, row.track, color=_colour(settings.index(row.setting)), lw=1.3)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("chunk")
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, chunks)
    figure.legend(handles=_handles(settings), loc="outside upper left", ncols=2 if width == WIDE else 1)
    return figure
