"""Figures for Prometheus: of the sessions that are open, and of those that were."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client import Counter as CounterMetric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from streaming.live.stats import EDGES
from streaming.serve.session import Session
from streaming.serve.sessions import Sessions

COUNTED = {  # of `LiveSession.stats`: metric, what it counts
    "moments": ("flashtalk_moments", "Frames that were handed over"),
    "chunks": ("flashtalk_chunks", "Chunks that were generated to their end"),
    "cut": ("flashtalk_cut_chunks", "Chunks of which only the first frames were kept"),
    "interrupts": ("flashtalk_interrupts", "Interruptions"),
    "stalls": ("flashtalk_stalls", "Times that a frame was not there when it was due"),
    "stalled_s": ("flashtalk_stalled_seconds", "Seconds by which frames came late"),
    "consumer_late_s": ("flashtalk_consumer_late_seconds", "Seconds by which frames were taken late by the server"),
    "dropped_s": ("flashtalk_dropped_audio_seconds", "Sound of microphones that was dropped"),
}
MEASURED = {  # histograms
    "sound_to_frame": ("flashtalk_sound_to_frame_seconds", "From sound in to its frame out"),
    "latency": ("flashtalk_latency_seconds", "The same, without the time in which sound before it is heard"),
    "silence_to_speech": ("flashtalk_silence_to_speech_seconds", "From a segment's first sound to its first frame"),
    "interrupt_to_speech": ("flashtalk_interrupt_to_speech_seconds", "The same after an interruption"),
    "begun_to_decoded": ("flashtalk_first_frame_seconds", "From a chunk's beginning to its first frame"),
    "chunk": ("flashtalk_chunk_seconds", "Generation of a chunk"),
}


class Metrics(Collector):
    """Collects from the sessions when Prometheus asks, so that nothing is counted twice.

    Attributes:
        registry: of all metrics.
        refused: requests and messages that were refused, by code.
        encoded: CPU seconds of encoding a moment.
    """

    def __init__(self, sessions: Sessions) -> None:
        """Begins to count."""
        self.registry = CollectorRegistry()
        self.refused = CounterMetric("flashtalk_refused", "What was refused", ["code"], registry=self.registry)
        self.encoded = Histogram(
            "flashtalk_encode_seconds", "CPU time of encoding a moment for all viewers", registry=self.registry,
            buckets=(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032),
        )  # fmt: skip
        self._sessions, self._past, self._ended = sessions, _Totals(), Counter[str]()
        self.registry.register(self)

    def ended(self, session: Session) -> None:
        """Keeps the counts of a session that has ended."""
        self._past.add(session)
        self._ended[session.ended or "closed"] += 1

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        sessions = list(self._sessions.open.values())
        yield GaugeMetricFamily("flashtalk_sessions_capacity", "Sessions that may be open", self._sessions.capacity)
        yield _labelled("flashtalk_sessions", "Open sessions", "state", Counter(str(s.live.state) for s in sessions))
        viewers = Counter(viewer.outlet for session in sessions for viewer in session.broadcast.viewers)
        yield _labelled("flashtalk_viewers", "Viewers", "outlet", viewers)
        queues = dict.fromkeys(("queued_frames", "made_frames"), 0)
        totals = self._past.copy()
        for session in sessions:
            stats = totals.add(session)
            queues = {name: count + stats[name] for name, count in queues.items()}
        yield _labelled("flashtalk_queue_moments", "Frames of sound, and pictures, that wait", "queue", queues)
        ended = CounterMetricFamily("flashtalk_sessions_ended", "Sessions that have ended", labels=["reason"])
        for reason, count in self._ended.items():
            ended.add_metric([reason], count)
        yield ended
        yield from totals.metrics()


class _Totals:
    """Sums over sessions."""

    def __init__(self) -> None:
        self._counts = Counter[str]()
        self._histograms = {name: [0] * (len(EDGES) + 1) for name in MEASURED}

    def copy(self) -> "_Totals":
        copied = _Totals()
        copied._counts = self._counts.copy()
        copied._histograms = {name: list(counts) for name, counts in self._histograms.items()}
        return copied

    def add(self, session: Session) -> dict[str, Any]:
        """Adds what a session has counted; returns its statistics."""
        stats = session.live.stats()
        self._counts.update({name: stats[name] for name in COUNTED})
        self._counts["held"] += session.broadcast.held
        self._counts["lost"] += session.broadcast.lost + sum(v.dropped for v in session.broadcast.viewers)
        for name, counts in self._histograms.items():
            self._histograms[name] = [a + b for a, b in zip(counts, stats[name]["counts"], strict=True)]
        return stats

    def metrics(self) -> Iterator[Metric]:
        for name, (metric, text) in COUNTED.items():
            yield CounterMetricFamily(metric, text, self._counts[name])
        yield CounterMetricFamily("flashtalk_held_frames", "Frames that were shown again", self._counts["held"])
        yield CounterMetricFamily("flashtalk_viewer_dropped_frames", "Frames viewers lost", self._counts["lost"])
        for name, (metric, text) in MEASURED.items():
            yield HistogramMetricFamily(metric, text, _cumulative(self._histograms[name]), sum_value=None)


def _cumulative(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Counts of bins as Prometheus has them: each with all below it."""
    edges = [*map(str, EDGES), "+Inf"]
    return [(edge, float(sum(counts[: index + 1]))) for index, edge in enumerate(edges)]


def _labelled(name: str, text: str, label: str, values: Counter[str] | dict[str, int]) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=[label])
    for value, count in values.items():
        gauge.add_metric([value], count)
    return gauge
