"""Writes frames to a sink in a thread of its own, and keeps the time that it takes them to get there."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import UserError
from streaming.sinks import Sink
from streaming.timers import StageTimer

MAX_QUEUED = 8  # groups of frames that may wait for the sink


@dataclass
class Progress:
    """What is in the sink by now, and how fast it got there."""

    chunks: int = 0
    frames: int = 0
    startup: float | None = None  # seconds from the first slice of sound to the first frames in the sink
    cold_start: float | None = None  # seconds from the start of the process to the same moment
    fps: float | None = None  # new frames over wall time, of whole chunks after the first


def check_finite(finite: bool, frames: int) -> None:
    """Raises `UserError` if the networks gave NaN or infinity after so many good frames."""
    if not finite:
        kept = f"; the {frames} frames before it are kept" if frames else ""
        advice = "check the weights, or use --precision bf16 or fp32"
        raise UserError(f"frame {frames} holds NaN or infinity: {advice}{kept}")


class FrameWriter:
    """Writes frames to a sink in order, in a thread of its own, so that the GPU waits for no encoder and no copy.

    A context manager. Leaving it waits until everything is written; leaving it by an exception waits only for the write
    that is under way.
    """

    def __init__(self, sink: Sink, timer: StageTimer) -> None:
        self.progress = Progress()
        self._sink, self._timer = sink, timer
        self._thread = ThreadPoolExecutor(1, "emit")
        self._queue: deque[Future[None]] = deque()
        self._finite = True  # all frames so far
        self._begin = 0.0
        self._first_chunk = 0.0, 0  # when the first chunk was complete, and its frames

    def begin(self) -> None:
        """Startup counts from now."""
        self._begin = time.perf_counter()

    def put(self, rgb: Tensor, finite: Tensor, sound: NDArray[np.float32], last: bool, whole: bool) -> None:
        """Queues frames uint8 [n, height, width, 3], whose memory may then be reused, and their sound.

        Args:
            rgb: the frames, on any device.
            finite: bool [], on the same device: False if the networks gave NaN or infinity.
            sound: their sound [samples, channels].
            last: these are the last frames of their chunk.
            whole: all frames of the chunk are shown, so that it counts for the FPS.

        Waits while `MAX_QUEUED` groups are in the queue. Raises what the sink raised for earlier frames, or `UserError`
        if they were not finite; nothing is written after such frames.
        """
        pixels, flag, copied = rgb.to("cpu", non_blocking=True), finite.to("cpu", non_blocking=True), None
        if rgb.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self._queue.append(self._thread.submit(self._write, pixels, flag, copied, sound, last, whole))
        while len(self._queue) > MAX_QUEUED or (self._queue and self._queue[0].done()):
            self._queue.popleft().result()

    def _write(
        self,
        rgb: Tensor,
        finite: Tensor,
        copied: torch.cuda.Event | None,
        sound: NDArray[np.float32],
        last: bool,
        whole: bool,
    ) -> None:
        if copied is not None:
            copied.synchronize()
        self._finite &= bool(finite)
        check_finite(self._finite, self.progress.frames)
        begin = time.perf_counter()
        self._sink.write(rgb.numpy(), sound)
        now, progress = time.perf_counter(), self.progress
        self._timer.add("emit", now - begin)
        progress.frames += len(rgb)
        if progress.startup is None:
            progress.startup = now - self._begin
            progress.cold_start = time.time() - psutil.Process().create_time()
        if last:
            progress.chunks += 1
            since, before = self._first_chunk
            if progress.chunks == 1:
                self._first_chunk = now, progress.frames
            elif whole:
                progress.fps = (progress.frames - before) / (now - since)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for write in self._queue:
                write.result()
