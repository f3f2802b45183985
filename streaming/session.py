"""A session: slices of sound go in, frames go out to a sink, and the time it takes is kept.

    source -> slice -> window (as `listener` hears it) -> chunk generator -> uint8 frames + their sound -> sink

*Startup* is the time from receiving the first slice to the first frames being in the sink; *cold start* from the start
of the process to that moment; *FPS* is new frames over wall time of the whole chunks after the first, so that neither
the start nor a last chunk of few frames tells in it. What `once_listener` hears beforehand is in cold start only.
"""

import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import psutil
import pyloudnorm  # noqa: F401  (model.audio imports it when first used: that must not be in a startup)
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.audio import Ring, SpeechEncoder, normalize_loudness, once_window, stream_window
from model.config import ChunkConfig
from model.machine import cpu_name, package_version
from streaming.generator import ChunkGenerator, Conditions, Frames, State
from streaming.sinks import Sink
from streaming.sources import Slice
from streaming.spans import Spans
from streaming.stages import Lane

AHEAD = 8  # groups of frames that may wait for the sink

Listener = Callable[[Slice], Tensor]  # hears a slice, gives the window of its chunk [frame_num, 5, layer, channel]


def stream_listener(encoder: SpeechEncoder, chunk: ChunkConfig) -> Listener:
    """Hears each slice behind the seconds before it, and nothing of what comes after."""
    ring = Ring.empty(chunk)

    def hear(item: Slice) -> Tensor:
        nonlocal ring
        ring = ring.append(item.speech)
        return stream_window(encoder, ring.samples, chunk)

    return hear


def once_listener(encoder: SpeechEncoder, chunk: ChunkConfig, slices: list[Slice]) -> Listener:
    """Has heard the whole track beforehand, so that lips can prepare for the sound to come."""
    speech = np.concatenate([item.speech for item in slices])
    # Loudness needs 0.4 s; and the encoder makes one frame too few of some lengths, which would stretch the others.
    frames = max(-(-len(speech) // chunk.frame_samples), chunk.tgt_fps // 2)
    while math.trunc(frames * chunk.frame_samples / chunk.sample_rate * chunk.tgt_fps) < frames:
        frames += 1
    speech = np.pad(speech, (0, frames * chunk.frame_samples - len(speech)))
    wave = torch.from_numpy(normalize_loudness(speech, chunk.sample_rate)).float()
    embedding = encoder(wave.to(next(encoder.parameters()).device), chunk.sample_rate, chunk.tgt_fps)
    windows = (once_window(embedding, c, chunk) for c in range(len(slices)))
    return lambda _: next(windows)


def beside(listener: Listener, lane: Lane) -> Listener:
    """The listener in a lane of its own: a GPU hears the next slice while it is still at work on the last one."""
    heard = lane.mark()  # what the listener has heard beforehand

    def hear(item: Slice) -> Tensor:
        with lane.turn(heard):
            window = listener(item)
        lane.join(window)
        return window

    return hear


class Session:
    """One portrait and prompt, talking for as long as it is given sound."""

    def __init__(self, generator: ChunkGenerator, conditions: Conditions, seed: int) -> None:
        self.state: State = generator.start(conditions, seed)
        self._generator, self._conditions = generator, conditions

    def frames(self, window: Tensor) -> Iterator[Frames]:
        """The new frames of the next chunk, as `ChunkGenerator.chunk` yields them; then the state has moved on."""
        self.state = yield from self._generator.chunk(self._conditions, self.state, window)


@dataclass
class Progress:
    """What is in the sink by now, and how fast it came there."""

    chunks: int = 0
    frames: int = 0
    startup: float | None = None  # seconds
    cold_start: float | None = None  # seconds
    fps: float | None = None


class Emitter:
    """Writes frames to a sink in a thread of its own, in order: the GPU need not wait for the encoder, nor for a copy.

    A context manager: its end waits until all is written; that by an exception, only until the write that is under way.
    """

    def __init__(self, sink: Sink, spans: Spans) -> None:
        self.progress = Progress()
        self._sink, self._spans = sink, spans
        self._thread = ThreadPoolExecutor(1, "emit")
        self._pending: deque[Future[None]] = deque()
        self._begin = 0.0
        self._steady = 0.0, 0  # when the first chunk was done, and its frames

    def begin(self) -> None:
        """Startup counts from now."""
        self._begin = time.perf_counter()

    def put(self, rgb: Tensor, sound: NDArray[np.float32], last: bool, whole: bool) -> None:
        """Takes frames uint8 [n, height, width, 3], whose memory may be used again afterwards, and their sound.

        `last` of their chunk; `whole`: the chunk is shown to its end. Waits while the sink is `AHEAD` groups behind.
        Raises what the sink raised for earlier ones.
        """
        host, copied = rgb.to("cpu", non_blocking=True), None
        if rgb.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(self._thread.submit(self._write, host, copied, sound, last, whole))
        while len(self._pending) > AHEAD or (self._pending and self._pending[0].done()):
            self._pending.popleft().result()

    def _write(
        self, rgb: Tensor, copied: torch.cuda.Event | None, sound: NDArray[np.float32], last: bool, whole: bool
    ) -> None:
        if copied is not None:
            copied.synchronize()
        begin = time.perf_counter()
        self._sink.write(rgb.numpy(), sound)
        now, progress = time.perf_counter(), self.progress
        self._spans.add("emit", now - begin)
        progress.frames += len(rgb)
        if progress.startup is None:
            progress.startup = now - self._begin
            progress.cold_start = time.time() - psutil.Process().create_time()
        if last:
            progress.chunks += 1
            since, before = self._steady
            if progress.chunks == 1:
                self._steady = now, progress.frames
            elif whole:
                progress.fps = (progress.frames - before) / (now - since)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for write in self._pending:
                write.result()


def run(
    session: Session, slices: Iterable[Slice], listener: Listener, sink: Sink, chunk: ChunkConfig, spans: Spans
) -> Iterator[Progress]:
    """Plays the slices into the sink; yields the progress after every group of frames, and when the sink has all.

    The video lasts as long as the sound: of the last chunk, as many frames are generated as its slice needs.
    """
    with Emitter(sink, spans) as emitter:
        for number, item in enumerate(slices):
            if not number:
                emitter.begin()
            wanted = -(-len(item.speech) // chunk.frame_samples)
            whole, shown = wanted == chunk.new_frames, 0
            sound_per_frame = chunk.frame_samples * len(item.sound) // len(item.speech)
            with spans.span("audio"):
                window = listener(item)
            for frames in session.frames(window):
                count = min(len(frames.rgb), wanted - shown)
                last = shown + count == wanted
                sound = item.sound[shown * sound_per_frame : None if last else (shown + count) * sound_per_frame]
                emitter.put(frames.rgb[:count], sound, last, whole)
                shown += count
                yield emitter.progress
                if last and not whole:
                    break
    yield emitter.progress


def report(progress: Progress, spans: Spans, device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """What a run measured, where and with what, as JSON values; seconds and frames a second."""
    return {
        "frames": progress.frames,
        "chunks": progress.chunks,
        "startup_s": progress.startup,
        "cold_start_s": progress.cold_start,
        "fps": progress.fps,
        "spans": spans.summary(),
        "settings": settings,
        "device": _device(device),
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in _PACKAGES},
    }


_PACKAGES = ("flashtalk-triton", "torch", "triton", "transformers", "numpy", "av")


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        peak = torch.cuda.max_memory_allocated(device)
        return {"name": properties.name, "memory_bytes": properties.total_memory, "peak_allocated_bytes": peak}
    return {
        "name": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "resident_bytes": psutil.Process().memory_info().rss,
    }
