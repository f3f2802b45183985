"""What long live sessions showed, treated at random by a program or a browser: sections of a results file."""

from collections.abc import Iterator
from dataclasses import dataclass

SERVER_COUNTS = (
    "moments",
    "held_frames",
    "stalls",
    "stalled_seconds",
    "consumer_late_seconds",
    "viewer_dropped_frames",
)
STALL = 0.5  # seconds for which a picture may stand still


@dataclass(frozen=True)
class Latency:
    """How long something took in a live session, each time."""

    name: str  # "silence_to_speech"
    count: int
    p50: float | None  # seconds, of the last 4096; None if it never happened
    p95: float | None
    p99: float | None
    longest: float
    edges: tuple[float, ...]  # seconds, between the bins of a histogram of all
    counts: tuple[int, ...]  # in these bins, one more than edges


@dataclass(frozen=True)
class Soak:
    """A live session under random treatment."""

    setting: str  # "tiny, 64 x 64, 2 steps"
    seconds: float
    frames: int  # handed over
    lost: int  # frames whose index was skipped
    repeated: int  # frames whose index came again
    finished_twice: int  # segments whose end was reported more than once
    lost_sound: float  # seconds of segments that were heard to their end, and are missing
    offset: float  # largest distance of sound and picture in seconds
    grown_bytes: float  # of memory, after it had settled
    bounds: dict[str, int]  # of queues, in frames
    counts: dict[str, float]  # what the session counted
    latencies: tuple[Latency, ...]
    seams: dict[str, float]  # median difference between two frames in levels, by what lies between them
    largest_seams: dict[str, float]
    tracks: dict[str, tuple[float, ...]]  # over time, all of one length: seconds, resident_bytes, descriptors ...

    @property
    def faults(self) -> tuple[str, ...]:
        """What must not happen, and did."""
        checks = {
            f"{self.lost} frames were lost": self.lost > 0,
            f"{self.repeated} frames were repeated": self.repeated > 0,
            f"{self.finished_twice} segments ended twice": self.finished_twice > 0,
            f"{self.lost_sound:.2f} s of sound were lost": self.lost_sound > 0.04,
            f"sound and picture were {self.offset:.3f} s apart": self.offset > 0.04,
            f"memory grew by {self.grown_bytes / 1e6:.1f} MB": self.grown_bytes > 20e6,
            **{f"{name} was above its bound": max(self.tracks[name]) > bound for name, bound in self.bounds.items()},
        }
        return tuple(fault for fault, happened in checks.items() if happened)


@dataclass(frozen=True)
class Spread:
    """How large a distance was, each time, regardless of its sign; in seconds."""

    count: int
    p50: float | None  # None if there was none
    p95: float | None
    most: float | None


@dataclass(frozen=True)
class Visit:
    """A long visit to the page of a served session: what a browser showed and played."""

    setting: str  # "tiny, 64 x 64, 2 steps, WebRTC"
    seconds: float
    frames: int  # different ones that were seen
    missed: int  # frames between the first and the last that were never seen
    back: int  # frames that were seen after a later one
    offset: Spread  # of sound and picture, by marks in both
    told_offset: Spread  # the same as the browser's statistics have it, which knows WebRTC only
    stalls: int  # times that the picture stood still for more than STALL
    longest_stall: float  # seconds for which the picture stood still, interruptions left out
    longest_pause: float  # seconds for which it stood still after an interruption
    concealed: float  # seconds of sound that the browser made up, as it came late or not at all
    interrupts: int  # by the visitor
    ended: bool  # whether the session ended before the visitor left
    complaints: tuple[str, ...]  # of the browser's console
    server_grown_bytes: float  # memory of the server, after it had settled
    browser_grown_bytes: float
    counts: dict[str, float]  # what the server counted, by the names of its metrics
    tracks: dict[str, tuple[float, ...]]  # over time, all of one length: seconds, offset, shown_fps, server_bytes ...

    @property
    def faults(self) -> tuple[str, ...]:
        """What must not happen on any machine, and did. How fast a machine is, goals judge."""
        checks = {
            "the session ended by itself": self.ended,
            f"{len(self.complaints)} complaints in the console: {''.join(self.complaints[:1])}": bool(self.complaints),
            "no picture moved": self.frames < self.seconds,
            "no mark was heard": not self.offset.count,
            f"the server's memory grew by {self.server_grown_bytes / 1e6:.1f} MB": self.server_grown_bytes > 20e6,
        }
        return tuple(fault for fault, happened in checks.items() if happened)


def soak_lines(result: Soak) -> Iterator[tuple[str, str]]:
    """The session in words, as (name, value)."""
    yield "session", f"{result.setting}, {result.seconds / 60:.1f} minutes"
    yield "frames shown", f"{result.frames}, {result.lost} lost, {result.repeated} repeated"
    yield "sound and picture apart", f"{1000 * result.offset:.3f} ms at most"
    yield "sound of whole segments lost", f"{result.lost_sound:.3f} s"
    yield "memory grew by", f"{result.grown_bytes / 1e6:.1f} MB"
    for name, bound in result.bounds.items():
        yield f"most {name.replace('_', ' ')}", f"{result.counts[f'most_{name}']:.0f} of {bound}"
    for name in ("descriptors", "threads"):
        track = result.tracks[name]
        yield name, f"{track[0]:.0f} at first, {track[-1]:.0f} at last, {max(track):.0f} at most"
    for latency in result.latencies:
        yield latency.name.replace("_", " "), latency_in_words(latency)
    for name, change in result.seams.items():
        yield f"change of picture, {name}", f"median {change:.2f}, most {result.largest_seams[name]:.2f} levels"
    for name in ("interrupts", "cut", "abandoned", "stalls", "stalled_s", "consumer_late_s", "late_s"):
        yield name.removesuffix("_s").replace("_", " "), f"{result.counts[name]:.4g}{' s' * name.endswith('_s')}"
    distance = result.tracks["distance_lab"]
    yield "distance to the portrait, Lab", f"{min(distance):.2f} to {max(distance):.2f}, {distance[-1]:.2f} at last"
    load = sorted(result.tracks["load"])
    yield "load of the machine", f"median {load[len(load) // 2]:.1f}, {load[-1]:.1f} at most"
    yield "faults", "; ".join(result.faults) or "none"


def latency_in_words(latency: Latency) -> str:
    """Percentiles of a latency: "p50 0.61, p95 0.74, p99 0.80, most 0.91 s of 120"."""
    if latency.p50 is None:
        return "never"
    values = (("p50", latency.p50), ("p95", latency.p95), ("p99", latency.p99), ("most", latency.longest))
    return f"{', '.join(f'{name} {value:.2f}' for name, value in values)} s of {latency.count}"


def visit_lines(result: Visit) -> Iterator[tuple[str, str]]:
    """The visit in words, as (name, value)."""
    counts, memory = result.counts, result.tracks["server_bytes"]
    yield "visit", f"{result.setting}, {result.seconds / 60:.1f} minutes"
    yield "frames seen", f"{result.frames}, {result.missed} missed, {result.back} out of order"
    yield "sound and picture apart, by marks in both", spread_in_words(result.offset)
    yield "sound and picture apart, by the browser's statistics", spread_in_words(result.told_offset)
    yield f"picture stood still for over {STALL} s", f"{result.stalls} times, {result.longest_stall:.2f} s at most"
    yield "interruptions by the visitor", f"{result.interrupts}"
    yield "picture stood still after one", f"{result.longest_pause:.2f} s at most"
    yield "sound that the browser made up", f"{result.concealed:.2f} s"
    yield "server's memory grew by", f"{result.server_grown_bytes / 1e6:.1f} MB, to {memory[-1] / 1e6:.0f} MB"
    yield "browser's memory grew by", f"{result.browser_grown_bytes / 1e6:.1f} MB"
    for name in SERVER_COUNTS:
        yield f"server: {name.replace('_', ' ')}", f"{counts[f'flashtalk_{name}_total']:.4g}"
    load = sorted(result.tracks["load"])
    yield "load of the machine", f"median {load[len(load) // 2]:.1f}, {load[-1]:.1f} at most"
    yield "faults", "; ".join(result.faults) or "none"


def spread_in_words(spread: Spread) -> str:
    """Percentiles of a distance: "p50 20, p95 45, most 58 ms of 900"."""
    if spread.p50 is None:
        return "not measured"
    values = (("p50", spread.p50), ("p95", spread.p95), ("most", spread.most))
    return f"{', '.join(f'{name} {1000 * (value or 0):.0f}' for name, value in values)} ms of {spread.count}"
