"""A session: slices of sound go in, frames go out to a sink, and the time that it takes is kept.

    source -> slice -> window of audio features -> chunk generator -> uint8 frames + their sound -> sink

*Startup* is the time from receiving the first slice to the first frames being in the sink. *Cold start* is the time
from the start of the process to that moment. *FPS* is new frames over wall time of the whole chunks after the first, so
that neither the start nor a last chunk of few frames counts. Encoding a whole track beforehand counts in cold start
only.
"""

import platform
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ChunkConfig
from model.machine import cpu_name, package_version
from streaming.audio_features import AudioFeaturizer
from streaming.generator import ChunkGenerator, Conditions, Frames, State
from streaming.ranks import LeadingGenerator
from streaming.sinks import Sink
from streaming.sources import Slice
from streaming.timers import StageTimer
from streaming.writer import FrameWriter, Progress


class Session:
    """One portrait and prompt, talking for as long as it is given sound."""

    def __init__(self, generator: ChunkGenerator | LeadingGenerator, conditions: Conditions, seed: int) -> None:
        self.state: State = generator.start(conditions, seed)
        self._generator, self._conditions = generator, conditions

    def frames(self, window: Tensor) -> Iterator[Frames]:
        """The new frames of the next chunk, as `ChunkGenerator.chunk` yields them; at their end `state` moves on."""
        self.state = yield from self._generator.chunk(self._conditions, self.state, window)


class Group(NamedTuple):
    """Frames of a chunk that were decoded together, and their sound."""

    rgb: Tensor  # uint8 [n, height, width, 3] on the device; valid until the next group is asked for
    finite: Tensor  # bool []: whether what they were made from is free of NaN and infinity
    sound: NDArray[np.float32]  # [sample, channel]
    last: bool  # they are the last that are shown of their chunk
    whole: bool  # all new frames of the chunk are shown


def play(
    session: Session, slices: Iterable[Slice], featurizer: AudioFeaturizer, chunk: ChunkConfig, timer: StageTimer
) -> Iterator[Group]:
    """Yields the frames of the slices, each group as soon as it is decoded.

    The video lasts as long as the sound: of the last chunk, as many frames are shown as its slice needs.
    """
    for item in slices:
        wanted = -(-len(item.speech) // chunk.frame_samples)
        whole, shown = wanted == chunk.new_frames, 0
        sound_per_frame = chunk.frame_samples * len(item.sound) // len(item.speech)
        with timer.time("audio"):
            window = featurizer(item)
        for frames in session.frames(window):
            count = min(len(frames.rgb), wanted - shown)
            last = shown + count == wanted
            sound = item.sound[shown * sound_per_frame : None if last else (shown + count) * sound_per_frame]
            yield Group(frames.rgb[:count], frames.finite, sound, last, whole)
            shown += count
            if last and not whole:
                break


def run(
    session: Session,
    slices: Iterable[Slice],
    featurizer: AudioFeaturizer,
    sink: Sink,
    chunk: ChunkConfig,
    timer: StageTimer,
) -> Iterator[Progress]:
    """Plays the slices into the sink; yields the progress after every group of frames, and when the sink has all."""
    with FrameWriter(sink, timer) as writer:
        for group in play(session, _announced(slices, writer), featurizer, chunk, timer):
            writer.put(*group)
            yield writer.progress
    yield writer.progress


def _announced(slices: Iterable[Slice], writer: FrameWriter) -> Iterator[Slice]:
    """The slices; startup counts from the moment when the first one is there."""
    for number, item in enumerate(slices):
        if not number:
            writer.begin()
        yield item


def report(progress: Progress, timer: StageTimer, device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """What a run measured, where and with what, as JSON values; times in seconds."""
    return {
        "frames": progress.frames,
        "chunks": progress.chunks,
        "startup_s": progress.startup,
        "cold_start_s": progress.cold_start,
        "fps": progress.fps,
        "spans": timer.summary(),
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
