"""The history of a run's measurements over earlier runs on the same device: small charts, one for each quantity.

Those of a chunk come first (FPS, first frame, chunk, peak memory of each variant), then the fastest back-end of ours of
each case, the ones that take most of a chunk first. A chart needs two runs.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from matplotlib.axes import Axes
from matplotlib.dates import date2num
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from profiling.report.figures import BLUE, GREEN, GREY, SKY, VERMILLION, WIDE, shorten, styled
from profiling.results import OK, CaseResult, Run, VariantResult
from profiling.tables import duration, memory, number, stage_value

PANELS = 40
OF_A_CHUNK: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "fps": ("FPS", number),
    "first_frame": ("first frame", duration),
    "chunk": ("chunk", duration),
    "peak_bytes": ("peak memory", memory),
}


@dataclass(frozen=True)
class Point:
    """A quantity in one run."""

    when: datetime
    value: float
    spread: float = 0.0  # half the distance between the 20th and 80th percentile


@dataclass(frozen=True)
class Line:
    """A quantity over runs, the earliest first."""

    subject: str  # variant or case
    quantity: str
    words: Callable[[float | None], str]
    points: tuple[Point, ...]

    @property
    def colour(self) -> str:
        """Green if it became better since the first run, red if worse, grey if within 2 % or within the spread."""
        first, last = self.points[0], self.points[-1]
        if abs(last.value - first.value) < max(0.02 * first.value, first.spread + last.spread):
            return GREY
        return GREEN if (last.value > first.value) == (self.quantity == "FPS") else VERMILLION


def lines(run: Run, others: Iterable[Run]) -> list[Line]:
    """The quantities of a run that other runs on its device have measured too."""
    device = run.machine.device
    found = {when: r for r in (*others, run) if r.machine.device == device and (when := _when(r))}
    runs = sorted(found.items())
    cases = sorted((c for c in run.cases if c.best(ours=True)), key=_chunk_seconds, reverse=True)
    candidates = [
        *(
            Line(v.variant, name, words, tuple(_variant_points(runs, v.variant, stage)))
            for v in run.variants
            if v.status == OK
            for stage, (name, words) in OF_A_CHUNK.items()
        ),
        *(Line(c.case, "", duration, tuple(_case_points(runs, c.case))) for c in cases),
    ]
    return [line for line in candidates if len(line.points) > 1]


def _when(run: Run) -> datetime | None:
    """When the run began, in UTC; None if the file, of another program, does not say so."""
    try:
        when = datetime.fromisoformat(run.started)
    except ValueError:
        return None
    return when.astimezone(UTC) if when.tzinfo else when.replace(tzinfo=UTC)


def _variant_points(runs: Iterable[tuple[datetime, Run]], variant: str, stage: str) -> Iterator[Point]:
    for when, run in runs:
        found: VariantResult | None = next((v for v in run.variants if v.variant == variant and v.status == OK), None)
        if found and (value := stage_value(found, stage)):
            yield Point(when, value)


def _case_points(runs: Iterable[tuple[datetime, Run]], name: str) -> Iterator[Point]:
    for when, run in runs:
        case = run.case(name)
        if case and (best := case.best(ours=True)) and best.seconds:
            yield Point(when, best.seconds, (best.spread or 0) * best.seconds)


def _chunk_seconds(case: CaseResult) -> float:
    """Seconds of all the case's calls in a chunk."""
    best = case.best(ours=True)
    return (case.calls or 1) * (best.seconds or 0) if best else 0


@styled
def history(run: Run, others: Iterable[Run], width: float = WIDE) -> Figure | None:
    """A small chart for each line, with its last value."""
    drawn = lines(run, others)[:PANELS]
    if not drawn:
        return None
    columns = 4 if width == WIDE else 2
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(width, 0.3 + 1.45 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    times = [point.when for line in drawn for point in line.points]
    for axes, line in zip(panels, drawn, strict=False):
        _draw_panel(axes, line, (min(times), max(times)), 30 if width == WIDE else 20)
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    figure.supxlabel("date of the run (UTC)", fontsize=10)
    return figure


def _draw_panel(axes: Axes, line: Line, span: tuple[datetime, datetime], letters: int) -> None:
    times: list[Any] = [point.when for point in line.points]
    values, spreads = [p.value for p in line.points], [p.spread for p in line.points]
    axes.errorbar(times, values, yerr=spreads, color=BLUE, ecolor=SKY, marker="o", ms=3.5, lw=1.3, elinewidth=3)
    axes.plot(times[-1], values[-1], marker="o", ms=7, color=line.colour, zorder=3)
    names = [shorten(part, letters) for part in (*_two_parts(line.subject, letters), line.quantity) if part]
    text = "\n".join((*names, line.words(values[-1])))
    axes.set_title(text, loc="left", fontsize=9, color=line.colour)
    low, high = min(p.value - p.spread for p in line.points), max(p.value + p.spread for p in line.points)
    margin = max(0.1 * min(values), 0.15 * (high - low))
    axes.set_ylim(low - margin, high + margin)
    apart = max(values) - min(values) > 0.25 * (high - low + 2 * margin)  # two ticks do not overlap
    axes.set_yticks([min(values), max(values)] if apart else [values[-1]])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: line.words(value)))
    first, last = span
    axes.set_xlim(date2num(first - (last - first) * 0.06), date2num(last + (last - first) * 0.06))
    form = "%d %b" if first.date() != last.date() else "%H:%M"
    axes.set_xticks([date2num(first), date2num(last)], [f"{t:{form}}" for t in span])
    for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    axes.tick_params(labelsize=9)


def _two_parts(name: str, letters: int) -> Sequence[str]:
    """A name, broken after its operation if it is long: "causal_conv3d/14b-w1-level0/bf16"."""
    head, slash, rest = name.partition("/")
    return (head, rest) if slash and len(name) > letters else (name,)
