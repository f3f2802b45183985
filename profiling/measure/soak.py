"""A live session under random treatment for a long time: speech, silence, bursts, gaps and interruptions from a seed.

It runs against the wall clock, as a user's would. What must not happen is counted: frames that are lost or repeated,
sound that is lost, sound and picture apart, memory, descriptors, threads or queues that grow.
"""

import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import psutil
import soundfile
import soxr
from numpy.typing import NDArray
from PIL import Image

from model.errors import UserError
from profiling.machine import describe_machine, resolve_device
from profiling.measure.quality import held_out_portraits
from profiling.results import Run, as_json_text, now, save, to_json
from profiling.soak import Latency, Soak, soak_lines
from streaming import LiveSession, Moment, TalkingHeadPipeline
from streaming.live.timeline import Event, PlaybackFinished

VOICE = Path(__file__).parents[2] / "examples" / "voice.wav"
RATES = (16_000, 24_000, 44_100, 48_000)
SPEEDS = (3.0, 10.0, 100.0)  # times faster than real time, as voice agents send
POINTS = 150  # of each track in the results
WARM = 60.0  # seconds that memory may take to settle, or a tenth of a short run
Size = tuple[int, int] | Literal["auto"] | None
LATENCIES = ("latency", "sound_to_frame", "silence_to_speech", "interrupt_to_speech", "begun_to_decoded", "chunk")


class Speaker:
    """Treats a session at random, from a seed, until it is told to stop.

    Attributes:
        pushed: seconds of sound, by segment.
    """

    def __init__(self, session: LiveSession, seed: int) -> None:
        self.pushed: dict[int, float] = {}
        self._session, self._random, self._stop = session, random.Random(seed), threading.Event()
        wave, rate = soundfile.read(VOICE, dtype="float32")
        self._voice = {r: soxr.resample(wave, rate, r) for r in RATES}
        self._segment = -1
        self._thread = threading.Thread(target=self._treat, name="speaker")

    def __enter__(self) -> "Speaker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _treat(self) -> None:
        acts = (self._say, self._say, self._say_with_a_gap, self._say_and_interrupt, self._say_two)
        while not self._stop.is_set():
            self._random.choice(acts)()
            self._rest(self._random.uniform(0.5, 5.0))

    def _say(self, speed: float | None = None) -> None:
        """A segment, in pieces of random size."""
        self._push(self._sound(self._random.uniform(0.3, 8.0)), speed or self._random.choice(SPEEDS))
        self._session.end_segment()

    def _say_with_a_gap(self) -> None:
        """A segment whose sound pauses."""
        speed = self._random.choice(SPEEDS)
        self._push(self._sound(self._random.uniform(1.0, 4.0)), speed)
        self._rest(self._random.uniform(0.2, 2.0))
        self._push(self._sound(self._random.uniform(0.3, 4.0)), speed, new=False)
        self._session.end_segment()

    def _say_and_interrupt(self) -> None:
        """A segment that is interrupted while it is heard, and another one at once."""
        self._push(self._sound(self._random.uniform(4.0, 8.0)), 100.0)
        self._rest(self._random.uniform(1.0, 4.0))
        self._session.interrupt()
        self._say(100.0)

    def _say_two(self) -> None:
        """Segments that follow each other in a burst."""
        self._say(100.0)
        self._say(100.0)

    def _sound(self, seconds: float) -> tuple[NDArray[np.float32], int]:
        rate = self._random.choice(RATES)
        voice, count = self._voice[rate], int(seconds * rate)
        begin = self._random.randrange(max(1, len(voice) - count))
        return voice[begin : begin + count], rate

    def _push(self, sound: tuple[NDArray[np.float32], int], speed: float, new: bool = True) -> None:
        samples, rate = sound
        self._segment += new
        self.pushed[self._segment] = self.pushed.get(self._segment, 0.0) + len(samples) / rate
        began, done = time.monotonic(), 0
        while done < len(samples) and not self._stop.is_set():
            size = self._random.randint(1, rate // 5)
            self._session.push_audio(samples[done : done + size], rate, self._segment)
            done += size
            self._rest(began + done / rate / speed - time.monotonic())

    def _rest(self, seconds: float) -> None:
        self._stop.wait(max(0.0, seconds))


@dataclass
class Watch:
    """What is seen of a session while its moments are taken.

    Attributes:
        lost, repeated: frames whose index was skipped, or came again.
        offset: the largest distance of sound and picture in seconds, from the counts of samples and frames.
        changes: mean difference in levels between a frame and the one before it, by what lies between them.
        tracks: readings over time, by name; `seconds` since the beginning.
    """

    lost: int = 0
    repeated: int = 0
    offset: float = 0.0
    changes: dict[str, list[float]] = field(default_factory=dict)
    tracks: dict[str, list[float]] = field(default_factory=dict)
    samples: int = 0
    frames: int = 0
    interrupted: bool = False  # since the last frame
    _last: Moment | None = None
    _begun: int = 0  # index of the chunk's first frame

    def see(self, moment: Moment, chunk_frames: int) -> None:
        """A moment was taken."""
        if (last := self._last) is not None:
            self.lost += max(0, moment.index - last.index - 1)
            self.repeated += moment.index <= last.index
            between = "frames of a chunk" if moment.chunk == last.chunk else self._seam(moment, chunk_frames)
            change = float(np.abs(moment.rgb.astype(np.int16) - last.rgb).mean())
            self.changes.setdefault(between, []).append(change)
        self._last, self.interrupted = moment, False
        self.frames += 1
        self.samples += len(moment.sound)
        self.offset = max(self.offset, abs(self.samples / 48_000 - moment.pts - 1 / 25))

    def _seam(self, moment: Moment, chunk_frames: int) -> str:
        whole, self._begun = moment.index - self._begun == chunk_frames, moment.index
        return "after an interruption" if self.interrupted else "whole chunks" if whole else "after a cut"

    def read(self, seconds: float, process: psutil.Process, session: LiveSession) -> None:
        """Readings of this moment."""
        stats = session.stats()
        distance = stats["distance_lab"]
        values = {
            "seconds": seconds,
            "resident_bytes": float(process.memory_info().rss),
            "descriptors": float(process.num_fds()),
            "threads": float(process.num_threads()),
            "queued_frames": float(stats["queued_frames"]),
            "made_frames": float(stats["made_frames"]),
            "distance_lab": distance[-1] if distance else 0.0,
            "load": os.getloadavg()[0],
        }
        for name, value in values.items():
            self.tracks.setdefault(name, []).append(value)


def soak(minutes: float, seed: int, size: Size, steps: int, preset: str) -> Soak:
    """Runs a session for so many minutes."""
    positions: list[PlaybackFinished] = []
    watch, process = Watch(), psutil.Process()

    def on_event(event: Event) -> None:
        if isinstance(event, PlaybackFinished):
            positions.append(event)
            watch.interrupted |= event.interrupted

    portrait = Image.fromarray(held_out_portraits(1)[0])
    with TalkingHeadPipeline.from_pretrained(preset, size=size, steps=steps, device="cpu") as pipeline:
        chunk = pipeline.config.chunk
        limit = 60.0
        with pipeline.live(portrait, seed=seed, max_queued=limit, on_event=on_event) as session:
            began = read = time.monotonic()
            with Speaker(session, seed) as speaker:
                for moment in session.moments():
                    watch.see(moment, chunk.new_frames)
                    if (passed := time.monotonic()) - read >= 1.0:
                        read = passed
                        watch.read(passed - began, process, session)
                    if passed - began >= 60 * minutes:
                        break
            stats = session.stats()
    whole = {e.segment: e.position for e in positions if not e.interrupted}
    lost_sound = sum(max(0.0, speaker.pushed[number] - heard - 0.001) for number, heard in whole.items())
    setting = f"{preset}, {chunk.width} x {chunk.height}, {steps} steps"
    return Soak(
        setting=setting,
        seconds=watch.tracks["seconds"][-1],
        frames=watch.frames,
        lost=watch.lost,
        repeated=watch.repeated,
        finished_twice=len(positions) - len({e.segment for e in positions}),
        lost_sound=lost_sound,
        offset=watch.offset,
        grown_bytes=growth(watch.tracks["seconds"], watch.tracks["resident_bytes"], min(WARM, 6 * minutes)),
        bounds={"queued_frames": int(limit * chunk.tgt_fps) + 1, "made_frames": 2 * chunk.new_frames},
        counts={name: float(value) for name, value in stats.items() if isinstance(value, int | float)},
        latencies=tuple(_latency(name, stats[name]) for name in LATENCIES),
        seams={name: median(values) for name, values in watch.changes.items()},
        largest_seams={name: max(values) for name, values in watch.changes.items()},
        tracks={name: tuple(thinned(values)) for name, values in watch.tracks.items()},
    )


def growth(seconds: Sequence[float], memory: Sequence[float], warm: float) -> float:
    """By how much memory grew from a tenth of the run after warming up to its last tenth, by medians."""
    settled = [value for at, value in zip(seconds, memory, strict=True) if at >= warm]
    part = max(1, len(settled) // 10)
    return median(settled[-part:]) - median(settled[:part]) if settled else 0.0


def _latency(name: str, summary: dict[str, Any]) -> Latency:
    return Latency(
        name,
        summary["count"],
        summary["p50_s"],
        summary["p95_s"],
        summary["p99_s"],
        summary["max_s"],
        tuple(summary["edges_s"]),
        tuple(summary["counts"]),
    )


def thinned(values: Sequence[float]) -> Iterator[float]:
    """At most `POINTS` of the values, evenly spread, with six digits."""
    for k in range(min(POINTS, len(values))):
        yield float(f"{values[k * len(values) // min(POINTS, len(values))]:.6g}")


def soak_command(minutes: float, seed: int, size: Size, steps: int, preset: str, out: Path | None, json: bool) -> int:
    """Implements `python -m profiling soak`; returns 1 if something happened that must not."""
    if minutes <= 0:
        raise UserError(f"--minutes {minutes}: name a number above 0")
    started, began = now(), time.monotonic()
    result = soak(minutes, seed, size, steps, preset)
    run = Run(
        command=f"soak --minutes {minutes:g} --seed {seed}",
        started=started,
        machine=describe_machine(resolve_device("cpu")),
        seconds=time.monotonic() - began,
        soak=(result,),
    )
    if out:
        save(run, out)
    if json:
        print(as_json_text(to_json(run)))
    else:
        for name, value in soak_lines(result):
            print(f"{name}: {value}")
    return int(bool(result.faults))
