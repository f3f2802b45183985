"""Pipecat without a transport's server: in its own harness, and in a pipeline with its own output transport."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model.errors import UserError
from streaming import TalkingHeadPipeline
from streaming.live.session import LiveSession
from tests.streaming.agents.stage import HEIGHT, RATE, WIDTH, BigFace, Faces, FastClock, run, speech

pytest.importorskip("pipecat", reason="Pipecat is not installed: pip install -e '.[pipecat]'")

from pipecat.frames.frames import (  # pyright: ignore[reportMissingImports]
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    EndFrame,
    ErrorFrame,
    Frame,
    InterruptionFrame,
    MetricsFrame,
    OutputImageRawFrame,
    StartFrame,
    TextFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
)
from pipecat.metrics.metrics import TTFBMetricsData  # pyright: ignore[reportMissingImports]
from pipecat.pipeline.pipeline import Pipeline  # pyright: ignore[reportMissingImports]
from pipecat.pipeline.worker import PipelineParams, PipelineWorker  # pyright: ignore[reportMissingImports]
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor  # pyright: ignore[reportMissingImports]
from pipecat.tests.utils import run_test  # pyright: ignore[reportMissingImports]
from pipecat.workers.runner import WorkerRunner  # pyright: ignore[reportMissingImports]

from streaming.agents.pipecat import TalkingHeadService
from tests.streaming.agents.pipecat_transport import Loudspeaker

PORTRAIT = Path(__file__).parents[3] / "examples" / "portraits" / "amara.jpg"
FRAME = 1920  # samples


class Viewer(FrameProcessor):
    """Records what comes down and up a pipeline when it is pushed, and does something once there was enough of it."""

    def __init__(self) -> None:
        super().__init__(enable_direct_mode=True)
        self.seen: list[Frame] = []
        self.up: list[Frame] = []
        self._orders: list[tuple[Callable[[], bool], Callable[[], Awaitable[None]]]] = []

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        (self.seen if direction == FrameDirection.DOWNSTREAM else self.up).append(frame)
        await self.push_frame(frame, direction)
        while self._orders and self._orders[0][0]():
            await self._orders.pop(0)[1]()

    def count(self, kind: type[Frame]) -> int:
        return sum(isinstance(frame, kind) for frame in self.seen)

    def when(self, condition: Callable[[], bool], action: Callable[[], Awaitable[None]]) -> None:
        """Does something once a condition is true, in the order in which it was asked for."""
        self._orders.append((condition, action))

    def after(self, count: int, kind: type[Frame], action: Callable[[], Awaitable[None]]) -> None:
        """Does something once it has seen so many frames of a kind."""
        self.when(lambda: self.count(kind) >= count, action)


class Played:
    """A pipeline of a face and a viewer, or of other processors too, while it runs."""

    def __init__(self, faces: Faces, *others: FrameProcessor) -> None:
        self.face, self.viewer, self.errors = TalkingHeadService(faces.pipeline, "me.jpg", seed=3), Viewer(), Viewer()
        pipeline = Pipeline([self.errors, self.face, *others, self.viewer])
        params = PipelineParams(enable_metrics=True, audio_out_sample_rate=48_000)
        self.worker = PipelineWorker(pipeline, params=params, enable_rtvi=False, cancel_on_idle_timeout=False)

    async def queue(self, *frames: Frame) -> None:
        await self.worker.queue_frames(list(frames))

    async def run(self) -> list[Frame]:
        """What the viewer sees until the pipeline has ended."""
        runner = WorkerRunner()
        await runner.add_workers(self.worker)
        await runner.run()
        return [frame for frame in self.viewer.seen if not isinstance(frame, StartFrame | MetricsFrame)]


def spoken(pcm: NDArray[np.int16], rate: int = RATE) -> list[Frame]:
    """What a service of speech pushes, without words."""
    size = rate // 10
    parts = [pcm[k : k + size] for k in range(0, len(pcm), size)]
    return [TTSStartedFrame(), *(TTSAudioRawFrame(part.tobytes(), rate, 1) for part in parts), TTSStoppedFrame()]


def lasting(frame: Frame) -> Frame:
    """The frame as one that no interruption drops."""
    frame.interruptible = False
    return frame


def story(frames: Sequence[Frame]) -> list[Any]:
    """What happened, without pictures: words, names of frames, and how many frames of sound are between them."""
    events: list[Any] = []
    for frame in frames:
        if isinstance(frame, TTSAudioRawFrame):
            events.append(1 + (events.pop() if events and isinstance(events[-1], int) else 0))
        elif isinstance(frame, TextFrame):
            events.append(frame.text)
        elif not isinstance(frame, OutputImageRawFrame):
            events.append(type(frame).__name__.removesuffix("Frame"))
    return events


def heard(frames: Sequence[Frame]) -> NDArray[np.int16]:
    parts = [np.frombuffer(f.audio, np.int16) for f in frames if isinstance(f, TTSAudioRawFrame)]
    return np.concatenate([np.zeros(0, np.int16), *parts])


def test_it_passes_what_pipecat_tests_processors_with() -> None:
    async def main() -> None:
        faces, pcm = Faces(), speech(1.5, 48_000)
        face = TalkingHeadService(faces.pipeline, "me.jpg", name="face", seed=3)
        down, up = await run_test(face, frames_to_send=spoken(pcm, 48_000), start_timeout=60)
        assert faces.asked == {"image": "me.jpg", "kind": "segments", "seed": 3}
        assert faces.open == 0
        assert story(down) == ["TTSStarted", 38, "TTSStopped"]
        assert not up
        np.testing.assert_array_equal(heard(down)[: len(pcm)], pcm)
        assert not heard(down)[len(pcm) :].any()  # the last frame is filled up with silence

    run(main())


def test_each_sound_follows_its_frame() -> None:
    """A frame shows how loud its own sound is, which differs from frame to frame."""

    async def main() -> None:
        played = Played(Faces())
        levels = np.repeat(np.linspace(0.1, 0.9, 25), FRAME)
        await played.queue(*spoken((levels * speech(1.0, 48_000, 1.0)).astype(np.int16), 48_000), EndFrame())
        seen = await played.run()
        places = [k for k, frame in enumerate(seen) if isinstance(frame, TTSAudioRawFrame)]
        assert len(places) == 25
        for k in places:
            image, sound = seen[k - 1 : k + 1]
            assert isinstance(image, OutputImageRawFrame)
            assert (image.size, image.format, image.sync_with_audio) == ((WIDTH, HEIGHT), "RGB", True)
            picture = np.frombuffer(image.image, np.uint8).reshape(HEIGHT, WIDTH, 3)
            loudness = np.abs(heard([sound]) / 32768).mean() * 255
            assert picture[0, WIDTH // 4, 0] == pytest.approx(loudness, abs=2)

    run(main())


def test_words_keep_their_place_in_the_sound() -> None:
    async def main() -> None:
        played = Played(Faces())
        start, *sound, stop = spoken(speech(1.0))
        again = spoken(speech(0.2))
        words = [TextFrame(text) for text in ("before", "half", "end", "later")]
        await played.queue(
            words[0], start, *sound[:5], words[1], *sound[5:], words[2], stop, *again, words[3], EndFrame()
        )
        seen = await played.run()
        assert story(seen) == [
            "before", "TTSStarted", 13, "half", 12, "end", "TTSStopped", "TTSStarted", 5, "TTSStopped", "later", "End",
        ]  # fmt: skip

    run(main())


def test_an_interruption_drops_sound_and_words_and_nothing_of_them_follows() -> None:
    async def main() -> None:
        clock = FastClock()
        played = Played(Faces(clock=clock))
        await played.queue(*spoken(speech(20.0)), TextFrame("unsaid"), lasting(TextFrame("kept")))

        async def interrupt() -> None:
            clock.stands = True
            await played.queue(InterruptionFrame(), *spoken(speech(0.4)), EndFrame())

        async def go_on() -> None:
            clock.stands = False

        played.viewer.after(10, TTSAudioRawFrame, interrupt)
        played.viewer.after(1, InterruptionFrame, go_on)
        start, said, *rest = story(await played.run())
        assert start == "TTSStarted"
        assert said in (10, 11)  # one more may have been due before time stood
        assert rest == ["Interruption", "kept", "TTSStarted", 10, "TTSStopped", "End"]
        assert played.face.stats()["interrupts"] == 1

    run(main())


def test_no_sound_follows_an_interruption_though_its_picture_came_before() -> None:
    """The interruption comes while a picture of speech is being pushed, whose sound would be next."""

    async def main() -> None:
        played = Played(Faces())
        viewer = played.viewer
        await played.queue(*spoken(speech(20.0)))

        async def interrupt() -> None:
            await played.face.queue_frame(InterruptionFrame())
            for _ in range(20):
                await asyncio.sleep(0)

        def is_between() -> bool:
            return viewer.count(TTSAudioRawFrame) == 10 and isinstance(viewer.seen[-1], OutputImageRawFrame)

        viewer.when(is_between, interrupt)
        viewer.after(1, InterruptionFrame, lambda: played.queue(EndFrame()))
        assert story(await played.run()) == ["TTSStarted", 11, "Interruption", "End"]

    run(main())


def test_an_interruption_in_silence_changes_nothing() -> None:
    async def main() -> None:
        played = Played(Faces())
        await played.queue(InterruptionFrame(), *spoken(speech(0.4)), TextFrame("word"), EndFrame())
        assert story(await played.run()) == ["Interruption", "TTSStarted", 10, "TTSStopped", "word", "End"]

    run(main())


def test_speech_that_must_not_be_interrupted_is_said_to_its_end() -> None:
    async def main() -> None:
        clock = FastClock()
        played = Played(Faces(clock=clock))
        await played.queue(*map(lasting, spoken(speech(2.0))), lasting(TextFrame("kept")), EndFrame())

        async def interrupt() -> None:
            clock.stands = True
            await played.face.queue_frame(InterruptionFrame())  # the worker waits for the end

        async def go_on() -> None:
            clock.stands = False

        played.viewer.after(10, TTSAudioRawFrame, interrupt)
        played.viewer.after(1, InterruptionFrame, go_on)
        seen = story(await played.run())
        assert seen[1] in (10, 11)
        assert seen == ["TTSStarted", seen[1], "Interruption", 50 - seen[1], "TTSStopped", "kept", "End"]

    run(main())


def test_a_full_queue_holds_back_what_speaks_and_loses_nothing() -> None:
    async def main() -> None:
        played, pcm = Played(Faces(limit=60)), speech(8.0, 48_000)
        await played.queue(*spoken(pcm, 48_000), EndFrame())
        np.testing.assert_array_equal(heard(await played.run()), pcm)

    run(main())


def test_cancelling_does_not_wait() -> None:
    async def main() -> None:
        clock = FastClock()
        played, cancelling = Played(faces := Faces(clock=clock)), list[asyncio.Future[None]]()
        await played.queue(*spoken(speech(30.0)))

        async def cancel() -> None:
            clock.stands = True
            cancelling.append(asyncio.ensure_future(played.worker.cancel()))  # it waits for the viewer, too

        played.viewer.after(10, TTSAudioRawFrame, cancel)
        await played.run()
        assert played.viewer.count(TTSAudioRawFrame) in (10, 11)
        assert faces.open == 0

    run(main())


def test_without_its_face_the_agent_still_speaks() -> None:
    async def main() -> None:
        played, pcm = Played(Faces(BigFace(fails_at=4))), speech(20.0, 48_000)
        await played.queue(*spoken(pcm, 48_000), TextFrame("word"))

        async def failed(_: object, error: ErrorFrame) -> None:
            assert error.error == "frame 28 holds NaN or infinity"
            await played.queue(*spoken(speech(0.3)), EndFrame())

        played.face.add_event_handler("on_error", failed)
        seen = await played.run()
        assert story(seen)[-6:] == ["TTSStopped", "word", "TTSStarted", 3, "TTSStopped", "End"]
        assert not played.face.is_usable

    run(main())


def test_a_face_that_cannot_be_opened_is_reported_and_left_out() -> None:
    class NoFaces(Faces):
        def live(self, *_: object, **__: object) -> LiveSession:
            raise UserError("me.jpg cannot be read")

    async def main() -> None:
        played = Played(NoFaces())
        await played.queue(*spoken(speech(0.3)), EndFrame())
        assert story(await played.run()) == ["TTSStarted", 3, "TTSStopped", "End"]
        assert not played.face.is_usable

    run(main())


def test_sound_that_no_session_takes_is_reported_and_keeps_nobody_waiting() -> None:
    async def main() -> None:
        played = Played(Faces())
        await played.queue(TTSAudioRawFrame(bytes(60), 500, 1), TextFrame("word"), EndFrame())
        assert story(await played.run()) == ["word", "End"]
        errors = [frame.error for frame in played.errors.up if isinstance(frame, ErrorFrame)]
        assert len(errors) == 1
        assert "rate: got 500 Hz" in errors[0]

    run(main())


def test_the_time_to_the_first_frame_of_speech_is_measured() -> None:
    async def main() -> None:
        played = Played(Faces())
        await played.queue(*spoken(speech(0.32)))
        played.viewer.after(1, TTSStoppedFrame, lambda: played.queue(*spoken(speech(0.32)), EndFrame()))
        await played.run()
        data = [datum for frame in played.viewer.seen if isinstance(frame, MetricsFrame) for datum in frame.data]
        times = [d for d in data if isinstance(d, TTFBMetricsData) and d.processor == played.face.name and d.value]
        assert len(times) == 2
        assert {d.model for d in times} == {"drawn"}

    run(main())


def test_in_a_pipeline_with_an_output_transport() -> None:
    """The bot is seen to start and to stop once an utterance, though it pauses, and is heard behind its pictures."""

    async def main() -> None:
        loudspeaker = Loudspeaker()
        played = Played(Faces(), loudspeaker)
        pcm = np.concatenate([speech(0.6, 48_000), np.zeros(48_000, np.int16), speech(0.4, 48_000)])
        await played.queue(*spoken(pcm, 48_000), *spoken(speech(0.2, 48_000), 48_000), EndFrame())
        seen = await played.run()
        bot = [type(f).__name__ for f in seen if isinstance(f, BotStartedSpeakingFrame | BotStoppedSpeakingFrame)]
        assert bot == ["BotStartedSpeakingFrame", "BotStoppedSpeakingFrame"] * 2
        np.testing.assert_array_equal(np.frombuffer(b"".join(loudspeaker.written), np.int16)[: len(pcm)], pcm)
        media = [f for f in seen if isinstance(f, OutputImageRawFrame | TTSAudioRawFrame)]
        assert all(isinstance(media[k - 1], OutputImageRawFrame) for k in range(len(media)) if is_sound(media[k]))

    run(main())


def is_sound(frame: Frame) -> bool:
    return isinstance(frame, TTSAudioRawFrame)


def test_the_face_idles_as_soon_as_the_transport_is_ready() -> None:
    async def main() -> None:
        played = Played(Faces(), Loudspeaker())
        played.viewer.after(60, OutputImageRawFrame, lambda: played.queue(EndFrame()))
        seen = await played.run()
        assert sum(isinstance(frame, OutputImageRawFrame) for frame in seen) >= 60
        assert not heard(seen).size

    run(main())


def test_the_preset_tiny_talks() -> None:
    async def main() -> None:
        with TalkingHeadPipeline.from_pretrained("tiny", size=(160, 96), steps=2) as pipeline:
            face, pcm = TalkingHeadService(pipeline, PORTRAIT, clock=FastClock()), speech(1.5, 48_000)
            down, _ = await run_test(face, frames_to_send=spoken(pcm, 48_000), start_timeout=60)
            assert story(down) == ["TTSStarted", 38, "TTSStopped"]
            np.testing.assert_array_equal(heard(down)[: len(pcm)], pcm)
            images = [frame for frame in down if isinstance(frame, OutputImageRawFrame)]
            assert {image.size for image in images} == {(160, 96)}
            assert len({image.image for image in images}) > len(images) // 2  # it moves
            pipeline.live(PORTRAIT).close()  # it is free again

    run(main())
