"""What a session counts and measures. Nothing here grows: counts, fixed bins, and the most recent values."""

from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

RECENT = 4096  # values kept of each measure
EDGES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0, 30.0)  # seconds


@dataclass
class Latency:
    """Seconds from one thing to another: percentiles of recent values, a histogram of all."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    counts: list[int] = field(default_factory=lambda: [0] * (len(EDGES) + 1))
    longest: float = 0.0

    def add(self, seconds: float) -> None:
        """Counts a value."""
        self.recent.append(seconds)
        self.counts[bisect_right(EDGES, seconds)] += 1
        self.longest = max(self.longest, seconds)

    def summary(self) -> dict[str, Any]:
        """As JSON values: count, percentiles of the recent values, the longest, and the histogram of all."""
        ordered = sorted(self.recent)
        percentiles = {f"p{p}_s": percentile(ordered, p) for p in (50, 95, 99)}
        return {
            "count": sum(self.counts),
            **percentiles,
            "max_s": self.longest,
            "edges_s": EDGES,
            "counts": self.counts,
        }


def percentile(ordered: Sequence[float], percent: int) -> float | None:
    """The smallest of values in order that so many percent of them do not exceed; None of none."""
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)] if ordered else None


@dataclass
class Counts:
    """How often things happened, and for how long, since the session began."""

    moments: int = 0  # handed over
    chunks: int = 0  # generated to their end
    cut: int = 0  # chunks of which only the first frames were kept
    abandoned: int = 0  # chunks that were given up while they were generated
    discarded_frames: int = 0  # made and never shown
    interrupts: int = 0
    stalls: int = 0  # times that a frame was not there when it was due
    stalled_s: float = 0.0
    consumer_late_s: float = 0.0  # that frames were there and nobody took them
    late_s: float = 0.0  # silence shown within a segment whose sound had not come
    dropped_s: float = 0.0  # sound of a microphone that was dropped
    discarded_s: float = 0.0  # sound that came for a segment after it was interrupted
    most_queued_frames: int = 0  # of sound
    most_made_frames: int = 0  # that waited to be shown


@dataclass
class Stats:
    """Counts, latencies, and the distance of each chunk to the portrait."""

    counts: Counts = field(default_factory=Counts)
    sound_to_frame: Latency = field(default_factory=Latency)  # of every frame of sound, with its time in the queue
    latency: Latency = field(default_factory=Latency)  # the same from when the sound could be heard at the earliest
    silence_to_speech: Latency = field(default_factory=Latency)  # of a segment's first frame, sent in silence
    interrupt_to_speech: Latency = field(default_factory=Latency)  # the same after an interruption, from the later one
    begun_to_decoded: Latency = field(default_factory=Latency)  # of each chunk's first frame
    chunk: Latency = field(default_factory=Latency)  # generation of a whole chunk
    distance: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))  # to the portrait in Lab, each chunk

    LATENCIES = ("latency", "sound_to_frame", "silence_to_speech", "interrupt_to_speech", "begun_to_decoded", "chunk")

    def summary(self, latencies: Collection[str] = LATENCIES) -> dict[str, Any]:
        """Counts, distances and these latencies as JSON values."""
        measured = {name: getattr(self, name).summary() for name in latencies}
        return asdict(self.counts) | measured | {"distance_lab": list(self.distance)}
