"""A session: slices of sound go in, frames go out to a sink, and the time it takes is kept.

    source -> slice -> window (as `listener` hears it) -> chunk generator -> uint8 frames + their sound -> sink

*Startup* is the time from receiving the first slice to the first frames being in the sink; *cold start* from the start
of the process to that moment; *FPS* is new frames over wall time of the whole chunks after the first, so that neither
the start nor a last chunk of few frames tells in it. What `once_listener` hears beforehand is in cold start only.
"""

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pyloudnorm  # noqa: F401  (model.audio imports it when first used: that must not be in a startup)
import torch
from torch import Tensor

from model.audio import Ring, SpeechEncoder, normalize_loudness, once_window, stream_window
from model.config import ChunkConfig
from streaming.generator import ChunkGenerator, Conditions, Frames, State
from streaming.machine import cpu_name, package_version
from streaming.sinks import Sink
from streaming.sources import Slice
from streaming.spans import Spans

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
    """What a run has done so far."""

    chunks: int = 0
    frames: int = 0
    startup: float | None = None  # seconds
    cold_start: float | None = None  # seconds
    fps: float | None = None


def run(
    session: Session, slices: Iterable[Slice], listener: Listener, sink: Sink, chunk: ChunkConfig, spans: Spans
) -> Iterator[Progress]:
    """Plays the slices into the sink; yields the progress after every group of frames that the sink has taken.

    The video lasts as long as the sound: of the last chunk, as many frames are generated as its slice needs.
    """
    progress = Progress()
    received = steady_since = time.perf_counter()
    frames_before = 0
    for item in slices:
        if not progress.chunks:
            received = time.perf_counter()
        wanted = -(-len(item.speech) // chunk.frame_samples)
        sound_per_frame = chunk.frame_samples * len(item.sound) // len(item.speech)
        shown = 0
        with spans.span("audio"):
            window = listener(item)
        for frames in session.frames(window):
            count = min(len(frames.rgb), wanted - shown)
            with spans.span("emit"):
                last = shown + count == wanted
                sound = item.sound[shown * sound_per_frame : None if last else (shown + count) * sound_per_frame]
                sink.write(frames.rgb[:count].cpu().numpy(), sound)
            shown += count
            progress.frames += count
            if progress.startup is None:
                progress.startup = time.perf_counter() - received
                progress.cold_start = time.time() - psutil.Process().create_time()
            yield progress
            if last and wanted < chunk.new_frames:
                break
        now = time.perf_counter()
        progress.chunks += 1
        if progress.chunks == 1:
            steady_since, frames_before = now, progress.frames
        elif wanted == chunk.new_frames:
            progress.fps = (progress.frames - frames_before) / (now - steady_since)
        yield progress


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
