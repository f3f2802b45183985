"""A session's ends: what the frames hear, how frames and sound are dealt out, what is measured."""

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from model.audio import SpeechEncoder
from model.config import ChunkConfig
from model.errors import UserError
from streaming.audio_features import AudioFeaturizer, on_stream, once_featurizer, stream_featurizer
from streaming.generator import Frames
from streaming.session import Session, report, run
from streaming.sinks import Sink
from streaming.sources import Slice
from streaming.streams import SideStream
from streaming.timers import StageTimer
from streaming.writer import MAX_QUEUED, Progress

CPU = torch.device("cpu")
HANGS = 600  # seconds, which no machine takes: a test that would wait forever fails then
CHUNK = ChunkConfig(height=16, width=16)


class LoudnessOfEachFrame(nn.Module):
    """In the speech encoder's place: a frame's one feature is its mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.device = nn.Parameter(torch.zeros(1))

    def forward(self, wave: Tensor, sample_rate: int, fps: int) -> Tensor:
        size = sample_rate // fps
        return wave[: len(wave) // size * size].view(-1, size).square().mean(1)[:, None, None]


def sliced(speech: NDArray[np.float32], factor: int = 1, channels: int = 1) -> list[Slice]:
    size = CHUNK.slice_samples
    sound = np.repeat(np.repeat(speech, factor)[:, None], channels, axis=1)
    starts = range(0, len(speech), size)
    return [Slice(speech[i : i + size], sound[i * factor : (i + size) * factor]) for i in starts]


@pytest.mark.parametrize("mode", ["stream", "once"])
@pytest.mark.parametrize("burst", [0, 1, 27, 28, 40, 66])
def test_the_frame_that_is_shown_hears_the_sound_that_is_heard(mode: str, burst: int) -> None:
    """A burst of one frame's length is in the centre of that frame's window, wherever chunks begin."""
    speech = np.full(67 * 640, 0.01, np.float32)
    speech[burst * 640 : (burst + 1) * 640] = 0.5
    encoder, slices = cast(SpeechEncoder, LoudnessOfEachFrame()), sliced(speech)
    featurizers: dict[str, Callable[[], AudioFeaturizer]] = {
        "stream": lambda: stream_featurizer(encoder, CHUNK),
        "once": lambda: once_featurizer(encoder, CHUNK, slices),
    }
    featurize = featurizers[mode]()
    windows = [featurize(item) for item in slices]
    shown = torch.cat([window[CHUNK.motion_frames_num :, 2, 0, 0] for window in windows])[:67]
    assert shown.argmax() == burst
    # A chunk's motion frames hear what they heard when they were shown.
    for before, after in pairwise(windows):
        torch.testing.assert_close(before[-5:, 2], after[:5, 2])


@pytest.mark.parametrize("frames", [1, 11, 29, 57, 58, 113])
def test_no_frame_of_a_track_heard_at_once_is_stretched(frames: int) -> None:
    """The official arithmetic makes one feature too few of some lengths: the encoder must not be given those."""
    heard = []

    class Encoder(LoudnessOfEachFrame):
        def forward(self, wave: Tensor, sample_rate: int, fps: int) -> Tensor:
            heard.append(len(wave))
            return super().forward(wave, sample_rate, fps)

    once_featurizer(cast(SpeechEncoder, Encoder()), CHUNK, sliced(np.full(frames * 640, 0.1, np.float32)))
    assert math.trunc(heard[0] / 16000 * 25) * 640 == heard[0]


class GroupsOfFour:
    """In a session's place: a chunk's 28 frames, numbered through, in the VAE's groups; one of these is not finite."""

    def __init__(self, broken: int | None = None) -> None:
        self.number = 0
        self._broken = broken  # its first frame

    def frames(self, _window: Tensor) -> Iterator[Frames]:
        for _ in range(7):
            levels = torch.arange(self.number, self.number + 4) % 256
            finite = torch.tensor(self.number != self._broken)
            self.number += 4
            rgb = levels.to(torch.uint8).view(4, 1, 1, 1).expand(4, 16, 16, 3)
            yield Frames(rgb.permute(0, 3, 1, 2) / 127.5 - 1, rgb, finite)


class Kept(Sink):
    """A sink that keeps what it takes."""

    def __init__(self, channels: int) -> None:
        super().__init__(16, 16, channels)
        self.pictures: list[NDArray[np.uint8]] = []
        self.sounds: list[NDArray[np.float32]] = []

    def _write(self, frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> None:
        self.pictures += [*frames]
        self.sounds.append(sound)
        # Every frame's sound has come with it, of the very last at least its beginning.
        assert sum(map(len, self.sounds)) > (len(self.pictures) - 1) * 640 * self.factor

    def close(self) -> None: ...

    factor = 1


@given(st.integers(1, 4 * 17920), st.sampled_from([1, 3]), st.sampled_from([1, 2]))
def test_every_sample_and_a_frame_for_every_begun_one(samples: int, factor: int, channels: int) -> None:
    speech = np.random.default_rng(samples).uniform(-1, 1, samples).astype(np.float32)
    slices, sink, timer = sliced(speech, factor, channels), Kept(channels), StageTimer(CPU)
    sink.factor = factor
    session = cast(Session, GroupsOfFour())
    progress = Progress()
    for progress in run(session, slices, lambda _: torch.zeros(0), sink, CHUNK, timer):
        assert progress.frames <= len(sink.pictures)  # what is reported is in the sink
    assert progress.frames == -(-samples // 640)
    assert progress.chunks == len(slices)
    assert [picture[0, 0, 0] for picture in sink.pictures] == [k % 256 for k in range(progress.frames)]
    assert np.array_equal(np.concatenate(sink.sounds), np.concatenate([item.sound for item in slices]))
    assert (progress.fps is None) == (progress.frames // 28 < 2)
    values = report(progress, timer, CPU, {"seed": 1})
    assert 0 < values["startup_s"] < values["cold_start_s"]
    assert values["spans"]["audio"]["count"] == len(slices)
    assert values["settings"] == {"seed": 1}


def test_frames_do_not_wait_for_the_next_slice() -> None:
    """A live source has none for a while: what is made of the last one comes into the sink all the same."""
    written, there = threading.Condition(), []

    class Announcing(Kept):
        def write(self, frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> None:
            with written:
                super().write(frames, sound)
                written.notify()

    sink = Announcing(1)

    def source() -> Iterator[Slice]:
        for number, item in enumerate(sliced(np.zeros(3 * 17920, np.float32))):
            with written:
                written.wait_for(lambda shown=28 * number: sink.frames >= shown, HANGS)
            there.append(sink.frames)
            yield item

    list(run(cast(Session, GroupsOfFour()), source(), lambda _: torch.zeros(0), sink, CHUNK, StageTimer(CPU)))
    assert there == [0, 28, 56]


class Failing(Kept):
    """Takes two writes."""

    def _write(self, frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> None:
        if len(self.sounds) == 2:
            raise UserError("the disk is full")
        super()._write(frames, sound)


def test_what_the_sink_raises_ends_the_run() -> None:
    """Within as many groups as may wait for it, and not at the end of an endless sound."""
    sink, endless = Failing(1), itertools.repeat(sliced(np.zeros(17920, np.float32))[0])
    with pytest.raises(UserError, match=r"^the disk is full$"):
        list(run(cast(Session, GroupsOfFour()), endless, lambda _: torch.zeros(0), sink, CHUNK, StageTimer(CPU)))
    assert len(sink.pictures) == 8


def test_at_most_max_queued_groups_wait_for_the_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, made_before_waiting = threading.Event(), []
    wait_for = Future.result

    def result(future: Future[None], timeout: float | None = None) -> None:
        if not gate.is_set():
            made_before_waiting.append(session.number)
            gate.set()
        return wait_for(future, timeout)

    class Slow(Kept):
        def _write(self, frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> None:
            gate.wait(HANGS)
            super()._write(frames, sound)

    monkeypatch.setattr(Future, "result", result)
    sink, session, slices = Slow(1), GroupsOfFour(), sliced(np.zeros(4 * 17920, np.float32))
    list(run(cast(Session, session), slices, lambda _: torch.zeros(0), sink, CHUNK, StageTimer(CPU)))
    assert made_before_waiting == [4 * (MAX_QUEUED + 1)]  # the group that waits is made
    assert len(sink.pictures) == session.number == 4 * 28


def test_an_interruption_waits_for_the_write_under_way_only() -> None:
    sink = Kept(1)
    steps = run(
        cast(Session, GroupsOfFour()), sliced(np.zeros(17920, np.float32)), lambda _: torch.zeros(0), sink, CHUNK,
        StageTimer(CPU),
    )  # fmt: skip
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("emit")]  # the sink may be closed
    assert len(sink.pictures) <= 4


@pytest.mark.parametrize("broken", [0, 4, 24, 28, 80])
def test_numbers_that_are_not_finite_end_the_run_and_keep_the_frames_before_them(broken: int) -> None:
    sink, slices = Kept(1), sliced(np.zeros(3 * 17920, np.float32))
    kept = f"; the {broken} frames before it are kept" if broken else ""
    with pytest.raises(UserError, match=f"^frame {broken} holds NaN or infinity: check the weights, .* or fp32{kept}$"):
        list(run(cast(Session, GroupsOfFour(broken)), slices, lambda _: torch.zeros(0), sink, CHUNK, StageTimer(CPU)))
    assert [picture[0, 0, 0] for picture in sink.pictures] == list(range(broken))


@pytest.mark.gpu
def test_gpu_hears_beside_what_it_is_doing() -> None:
    """The same windows, and without waiting for a stream that is busy."""
    cuda = torch.device("cuda")
    encoder = cast(SpeechEncoder, LoudnessOfEachFrame().to(cuda))
    slices = sliced(np.random.default_rng(0).uniform(-1, 1, 4 * 17920).astype(np.float32))
    there, alone = on_stream(stream_featurizer(encoder, CHUNK), SideStream(cuda)), stream_featurizer(encoder, CHUNK)
    want = [alone(item) for item in slices]
    torch.cuda.synchronize()
    torch.cuda._sleep(2**30)  # clock cycles
    begin = time.perf_counter()
    got = [there(item) for item in slices]
    launched = time.perf_counter() - begin
    torch.cuda.synchronize()
    assert launched < (time.perf_counter() - begin) / 2
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_gpu_frames_reach_the_sink_though_their_memory_is_used_again() -> None:
    sink, slices = Kept(1), sliced(np.zeros(3 * 17920, np.float32))
    place = torch.empty(4, 16, 16, 3, dtype=torch.uint8, device="cuda")

    class Replayed(GroupsOfFour):
        def frames(self, window: Tensor) -> Iterator[Frames]:
            for frames in super().frames(window):
                yield Frames(frames.pixels, place.copy_(frames.rgb), frames.finite.cuda())

    list(
        run(cast(Session, Replayed()), slices, lambda _: torch.zeros(0), sink, CHUNK, StageTimer(torch.device("cuda")))
    )
    assert [picture[0, 0, 0] for picture in sink.pictures] == [k % 256 for k in range(84)]
