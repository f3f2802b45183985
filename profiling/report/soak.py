"""The figures of long live sessions and visits: readings over time, and histograms of latencies."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from profiling.report.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, WIDE, styled
from profiling.results import Run

TRACKS = {  # title, unit's size, colour
    "resident_bytes": ("memory (MB)", 1e6, BLUE),
    "queued_frames": ("sound that waits (frames)", 1, ORANGE),
    "made_frames": ("frames that wait (frames)", 1, GREEN),
    "descriptors": ("file descriptors", 1, SKY),
    "threads": ("threads", 1, PURPLE),
    "distance_lab": ("distance to the portrait (Lab)", 1, VERMILLION),
    "load": ("load of the machine", 1, GREY),
}
VISIT_TRACKS = {
    "told_offset": ("sound behind its picture, as the browser says (ms)", 1e-3, VERMILLION),
    "shown_fps": ("different frames seen a second", 1, GREEN),
    "server_bytes": ("memory of the server (MB)", 1e6, BLUE),
    "browser_bytes": ("memory of the browser (MB)", 1e6, SKY),
    "descriptors": ("file descriptors of the server", 1, ORANGE),
    "threads": ("threads of the server", 1, PURPLE),
    "load": ("load of the machine", 1, GREY),
}
SHOWN = {  # latencies that are drawn
    "silence_to_speech": "silence to speech",
    "interrupt_to_speech": "interruption to speech",
    "latency": "sound that could be heard to its frame",
    "sound_to_frame": "sound in to frame out",
    "begun_to_decoded": "chunk begun to first frame",
    "chunk": "a whole chunk",
}


@styled
def soak_tracks(run: Run, width: float = WIDE) -> Figure | None:
    """A strip for each reading of the first soak, over its time."""
    if not run.soak:
        return None
    return _strips(run.soak[0].tracks, TRACKS, run.soak[0].bounds, width)


@styled
def visit_tracks(run: Run, width: float = WIDE) -> Figure | None:
    """A strip for each reading of the first visit, over its time."""
    return _strips(run.visits[0].tracks, VISIT_TRACKS, {}, width) if run.visits else None


def _strips(
    tracks: Mapping[str, Sequence[float]],
    shown: Mapping[str, tuple[str, float, str]],
    bounds: Mapping[str, int],
    width: float,
) -> Figure:
    minutes = [seconds / 60 for seconds in tracks["seconds"]]
    names = [name for name in shown if name in tracks]
    figure = Figure(figsize=(width, 0.5 + 1.05 * len(names)), layout="constrained")
    panels = list(figure.subplots(len(names), 1, sharex=True, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=True):
        title, unit, colour = shown[name]
        values = [value / unit for value in tracks[name]]
        axes.plot(minutes, values, color=colour, lw=1.3)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        words, top = f"{title}, at most {max(values):.4g}", max(values)
        if bound := bounds.get(name):
            words = f"{words}; bound {bound}"
        axes.set_ylim(min(0, 1.15 * min(values)), 1.15 * top if top > 0 else 1)
        axes.set_title(words, loc="left", fontsize=10)
    panels[-1].set_xlabel("time since the session began (minutes)")
    panels[-1].set_xlim(0, max(minutes[-1], 1e-3))
    return figure


@styled
def soak_latencies(run: Run, width: float = WIDE) -> Figure | None:
    """A histogram for each latency of the first soak, with its 50th and 95th percentile."""
    found = [latency for latency in run.soak[0].latencies if latency.count] if run.soak else []
    if not found:
        return None
    columns = 3 if width == WIDE else 1
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(width, 0.3 + 1.9 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, latency in zip(panels, found, strict=False):
        used = [k for k, count in enumerate(latency.counts) if count]
        places = range(used[0], used[-1] + 1)
        edges = [0.0, *latency.edges]
        axes.bar(list(places), [latency.counts[k] for k in places], color=BLUE, width=0.9)
        axes.set_xticks(list(places), [f"{edges[k]:g}" for k in places], fontsize=8)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        words = f"p50 {latency.p50:.2f}, p95 {latency.p95:.2f} s" if latency.p50 is not None else ""
        axes.set_title(f"{SHOWN.get(latency.name, latency.name)}: {words}", loc="left", fontsize=9, color=BLACK)
        axes.set_xlabel("from this many seconds on", fontsize=8)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    return figure
