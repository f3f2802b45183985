"""The Python API: what it accepts and refuses, and that it makes the frames and the sound of a run by hand."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import kernels
import model
from model.config import PRECISIONS, PRESETS
from model.errors import UserError
from model.image import resize_center_crop
from model.text import tokenize
from model.weights.checkpoint import AUDIO_FOLDER, random_models
from streaming import TalkingHeadPipeline
from streaming.audio_features import stream_featurizer
from streaming.generator import ChunkGenerator
from streaming.session import Session
from streaming.sinks import Sink
from streaming.sources import ArraySource
from streaming.timers import StageTimer
from streaming.video_stream import VideoStream
from tests.small import SMALL, write_checkpoint

RATE = 16_000
LETTERS = replace(SMALL, name="letters", text=replace(SMALL.text, vocab_size=384))  # has the default prompt's letters
NEW = SMALL.chunk.new_frames  # 4 frames a chunk, of 640 samples each


@pytest.fixture(autouse=True)
def small_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    for preset in (SMALL, LETTERS):
        monkeypatch.setitem(PRESETS, preset.name, preset)


def pipeline(**options: Any) -> TalkingHeadPipeline:
    defaults = {"device": "cpu", "random_weights": True, "steps": 2}
    return TalkingHeadPipeline.from_pretrained("letters", **(defaults | options))


def portrait(width: int = 60, height: int = 40) -> Image.Image:
    """A gradient. Where it has another format than the video, a face is looked for, which takes longer than all."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([255 * rows / height, 255 * columns / width, 60 + 0 * rows], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def voice(frames: float, channels: int = 1) -> np.ndarray:
    wave = np.random.default_rng(1).uniform(-0.3, 0.3, (round(frames * 640), channels)).astype(np.float32)
    return wave[:, 0] if channels == 1 else wave


def frames_of(stream: VideoStream) -> np.ndarray:
    return np.concatenate([frames.rgb for frames in stream])


def test_importing_the_package_is_quick_and_names_what_it_has() -> None:
    code = "import sys, streaming, model; assert 'torch' not in sys.modules; print(streaming.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "TalkingHeadPipeline" in done.stdout
    for package in (kernels, model):
        assert all(getattr(package, name) is not None for name in package.__all__)
        with pytest.raises(AttributeError):
            _ = package.nothing_of_that_name


def test_a_stream_gives_what_the_parts_give_by_hand() -> None:
    """Two chunks and a half; the sound in the pieces that belong to the frames."""
    samples = voice(2.5 * NEW)
    with pipeline() as ours:
        stream = ours.stream(portrait(60, 80), (samples, RATE), prompt="AB", seed=3)
        pieces = list(stream)
    assert (stream.fps, stream.rate, stream.channels) == (25, 48_000, 1)
    assert stream.duration == pytest.approx(2.5 * NEW / 25)
    rgb, sound = (np.concatenate(part) for part in zip(*pieces, strict=True))
    assert rgb.shape == (round(2.5 * NEW), 32, 48, 3)
    assert rgb.dtype == np.uint8
    assert stream.frames == len(rgb)

    models = random_models(LETTERS, torch.device("cpu"), PRECISIONS["fp32"])
    timer = StageTimer(torch.device("cpu"))
    generator = ChunkGenerator(models, timer)
    image = resize_center_crop(portrait(60, 80), 32, 48)  # nobody finds a face in it
    ids = tokenize("AB", LETTERS.text, LETTERS.dit.text_len, None)
    session = Session(generator, generator.prepare(image, ids), 3)
    featurizer, wanted, heard = stream_featurizer(models.audio, SMALL.chunk), [], []
    for item in ArraySource(samples, RATE, SMALL.chunk):
        wanted += [frames.rgb for frames in session.frames(featurizer(item))]
        heard.append(item.sound)
    np.testing.assert_array_equal(rgb, torch.cat(wanted)[: len(rgb)].numpy())
    np.testing.assert_array_equal(sound, np.concatenate(heard))
    assert all(len(piece.sound) == 1920 * len(piece.rgb) for piece in pieces[:-1])


def test_generate_writes_the_frames_of_stream(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", voice(NEW + 1), RATE)
    portrait().save(tmp_path / "me.png")
    seen = []
    with pipeline() as ours:
        progress = ours.generate(
            tmp_path / "me.png", tmp_path / "voice.wav", tmp_path / "out", on_progress=lambda p: seen.append(p.frames)
        )
        expected = frames_of(ours.stream(str(tmp_path / "me.png"), str(tmp_path / "voice.wav")))
    files = sorted((tmp_path / "out").glob("*.png"))
    assert progress.frames == len(files) == len(expected) == seen[-1] == NEW + 1
    for path, frame in zip(files, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), frame)
    assert set(ours.timer.summary()) >= {"audio", "denoise/step", "decode", "color", "motion"}


def test_portraits_and_voices_of_any_kind_are_the_same(tmp_path: Path) -> None:
    picture, samples = portrait(), (voice(NEW) * 32768).round() / 32768
    picture.save(tmp_path / "me.png")
    soundfile.write(tmp_path / "voice.wav", samples, RATE, subtype="PCM_16")
    with pipeline() as ours:
        source = ArraySource(samples.astype(np.float64), RATE, ours.config.chunk)
        videos = [
            frames_of(ours.stream(image, sound, prompt="AB"))
            for image, sound in (
                (tmp_path / "me.png", tmp_path / "voice.wav"),
                (picture, (samples, RATE)),
                (np.asarray(picture), source),
            )
        ]
    np.testing.assert_array_equal(videos[0], videos[1])
    np.testing.assert_array_equal(videos[0], videos[2])


def test_the_seed_the_steps_and_the_noise_matter() -> None:
    samples = (voice(NEW), RATE)
    with pipeline() as ours:
        first = frames_of(ours.stream(portrait(), samples))
        np.testing.assert_array_equal(frames_of(ours.stream(portrait(), samples, seed=9999, steps=2)), first)
        assert (frames_of(ours.stream(portrait(), samples, seed=1)) != first).any()
        assert (frames_of(ours.stream(portrait(), samples, steps=1)) != first).any()
        np.testing.assert_array_equal(frames_of(ours.stream(portrait(), samples)), first)
        assert (frames_of(ours.stream(portrait(), samples, audio_mode="once")) != first).any()
    with pipeline(noise="torch") as theirs:
        drawn = frames_of(theirs.stream(portrait(), samples))
        np.testing.assert_array_equal(frames_of(theirs.stream(portrait(), samples)), drawn)
        assert (drawn != first).any()


def test_loudness_as_published_differs_once_the_loudness_changes() -> None:
    samples = np.concatenate([voice(6 * NEW), 0.01 * voice(6 * NEW)])
    with pipeline() as ours:
        steady, published = (
            frames_of(ours.stream(portrait(), (samples, RATE), loudness=name)) for name in ("steady", "published")
        )
    assert len(steady) == len(published)
    assert (steady != published).any()


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (32, 32), (128, 16)])
def test_pictures_of_any_format(size: tuple[int, int]) -> None:
    with pipeline(size=size, device=torch.device("cpu")) as ours:
        cut = ours.portrait(portrait(60, 80))
        video = frames_of(ours.stream(cut, (voice(2), RATE)))
    assert cut.shape == (size[1], size[0], 3)
    assert video.shape == (2, size[1], size[0], 3)


def test_chunks_colours_and_shifts_are_settings() -> None:
    samples = (voice(12), RATE)
    with pipeline() as usual, pipeline(frames=17) as longer, pipeline(color=0.0) as plain, pipeline(shift=1.0) as even:
        assert longer.config.chunk.new_frames == 12
        videos = [frames_of(one.stream(portrait(), samples)) for one in (usual, longer, plain, even)]
    assert all(video.shape == videos[0].shape for video in videos)
    assert all((video != videos[0]).any() for video in videos[1:])
    assert usual.settings["chunk"]["sample_shift"] == 5


def test_one_video_at_a_time_and_none_left_behind() -> None:
    samples = (voice(3 * NEW), RATE)
    with pipeline() as ours:
        first = ours.stream(portrait(), samples)
        next(first)
        with pytest.raises(RuntimeError, match="making another video"):
            ours.stream(portrait(), samples)
        first.close()
        assert next(first, None) is None
        for _ in ours.stream(portrait(), samples):
            break  # what is dropped is closed
        with ours.stream(portrait(), samples) as second:
            next(second)
        assert len(frames_of(ours.stream(portrait(), samples))) == 3 * NEW


def test_a_pipeline_loads_when_it_must_and_again_after_closing() -> None:
    ours = pipeline(lazy=True)
    assert ours._models is None
    video = frames_of(ours.stream(portrait(), (voice(1), RATE)))
    ours.close()
    assert ours._models is None
    np.testing.assert_array_equal(frames_of(ours.stream(portrait(), (voice(1), RATE))), video)


def test_a_checkpoint_and_a_speech_encoder_elsewhere(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    with TalkingHeadPipeline.from_pretrained(folder, preset="small", device="cpu") as ours:
        video = frames_of(ours.stream(portrait(), (voice(2), RATE), prompt="AB"))
    assert ours.settings["checkpoint"] == str(folder)
    (folder / AUDIO_FOLDER).rename(tmp_path / "speech")
    with TalkingHeadPipeline.from_pretrained(
        folder, preset="small", device="cpu", wav2vec=tmp_path / "speech"
    ) as elsewhere:
        np.testing.assert_array_equal(frames_of(elsewhere.stream(portrait(), (voice(2), RATE), prompt="AB")), video)
    with pytest.raises(UserError, match="neither in it nor beside it"):
        TalkingHeadPipeline.from_pretrained(folder, preset="small", device="cpu")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        TalkingHeadPipeline.from_pretrained(folder, preset="small", device="cpu", wav2vec=tmp_path / "nowhere")


MISTAKES = {
    "width": ({"size": (50, 32)}, "size 50x32: the width must be a multiple of 16 up to 4096, such as 48 or 64"),
    "height": ({"size": (48, 0)}, "size 48x0: the height must be a multiple of 16 up to 4096, such as 16"),
    "size in words": ({"size": "48x32"}, "size '48x32': give width and height, such as (448, 768), or 'auto'"),
    "size in one number": ({"size": 64}, "size 64: give width and height, such as (448, 768), or 'auto'"),
    "half pixels": ({"size": (48.5, 32)}, "size (48.5, 32): give width and height, such as (448, 768), or 'auto'"),
    "far too wide": ({"size": (8192, 32)}, "size 8192x32: the width must be a multiple of 16 up to 4096, such as 4096"),
    "frames": ({"frames": 10}, "frames 10: a chunk has 9, 13, 17 ... frames, at most 200"),
    "few frames": ({"frames": 5}, "frames 5: a chunk has 9, 13, 17"),
    "steps": ({"steps": 0}, "steps 0: name a number from 1 to 1000"),
    "shift": ({"shift": 0}, "shift 0: name a number above 0"),
    "no shift": ({"shift": float("nan")}, "shift nan: name a number above 0"),
    "color": ({"color": 1.5}, "color 1.5: name a number from 0"),
    "device": ({"device": "tpu"}, "device tpu: there is no such choice; use auto or cpu or cuda"),
    "precision": ({"precision": "fp4"}, "precision fp4: there is no such choice"),
    "noise": ({"noise": "pink"}, "noise pink: there is no such choice; use counter or torch"),
    "preset twice": ({"preset": "tiny"}, "preset tiny: letters is the preset already"),
    "no weights": ({"random_weights": False}, "preset letters needs the folder of a checkpoint"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_option_that_does_not_fit_is_one_line_that_says_what_fits(mistake: str) -> None:
    options, message = MISTAKES[mistake]
    with pytest.raises(UserError) as raised:
        pipeline(lazy=True, **options)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_call_that_does_not_fit_is_one_line() -> None:
    with pipeline() as ours:
        wrong: dict[str, Any]
        for wrong, message in (
            ({"audio_mode": "twice"}, "audio_mode twice"),
            ({"loudness": "loud"}, "loudness loud"),
            ({"steps": 2000}, "steps 2000"),
        ):
            with pytest.raises(UserError, match=message):
                ours.stream(portrait(), (voice(1), RATE), **wrong)
        with pytest.raises(UserError, match="show no portrait"):
            ours.stream(portrait(8, 8), (voice(1), RATE))
        with pytest.raises(UserError, match="no image file"):
            ours.stream("nowhere.png", (voice(1), RATE))
        for samples in (np.zeros(0, np.float32), np.zeros((4, 3), np.float32), np.array([np.nan]), np.zeros(4, int)):
            with pytest.raises(ValueError, match=r"^samples: "):
                ours.stream(portrait(), (samples, RATE))
        with pytest.raises(ValueError, match=r"^rate: "):
            ours.stream(portrait(), (voice(1), 10))
        assert len(frames_of(ours.stream(portrait(), (voice(1), RATE)))) == 1  # and the pipeline is as before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_it_changes_nothing(dtype: torch.dtype) -> None:
    def video() -> np.ndarray:
        with pipeline() as ours:
            return frames_of(ours.stream(portrait(), (voice(NEW), RATE)))

    plain = video()
    with torch.autocast("cpu", dtype):
        assert (video() == plain).all()
    with pipeline() as ours:
        stream = ours.stream(portrait(), (voice(NEW), RATE))
        with torch.autocast("cpu", dtype):
            first = next(stream).rgb
    assert (first == plain[: len(first)]).all()


def test_a_recording_is_not_replaced_by_its_video(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "voice.wav", voice(2), RATE)
    before = (tmp_path / "voice.wav").read_bytes()
    with pipeline() as ours, pytest.raises(UserError, match="is the voice itself, which would be lost"):
        ours.generate(portrait(), tmp_path / "voice.wav", tmp_path / "voice.wav")
    assert (tmp_path / "voice.wav").read_bytes() == before


class Kept(Sink):
    """Keeps frames, and takes only so many writes."""

    def __init__(self, writes: int) -> None:
        super().__init__(48, 32, 1)
        self._writes, self.closed = writes, False

    def _write(self, frames: np.ndarray, sound: np.ndarray) -> None:  # noqa: ARG002
        self._writes -= 1
        if self._writes < 0:
            raise UserError("the disk is full")

    def close(self) -> None:
        self.closed = True


def test_a_sink_of_ones_own_stays_open_and_ends_the_video() -> None:
    with pipeline() as ours:
        sink = Kept(100)
        assert ours.generate(portrait(), (voice(NEW), RATE), sink).frames == NEW == sink.frames
        assert not sink.closed
        with pytest.raises(UserError, match="the disk is full"):
            ours.generate(portrait(), (voice(3 * NEW), RATE), Kept(1))
        assert ours.generate(portrait(), (voice(NEW), RATE), Kept(100)).frames == NEW


def test_weights_that_are_not_finite_end_the_stream_after_what_is_good() -> None:
    with pipeline() as ours:
        models = ours.load()
        stream = ours.stream(portrait(), (voice(3 * NEW), RATE))
        good = [next(stream)]
        next(iter(models.dit.parameters())).data.fill_(float("nan"))
        with pytest.raises(UserError, match="holds NaN or infinity"):
            list(stream)
    assert sum(len(frames.rgb) for frames in good) == stream.frames == NEW


def test_cancelling_channels_warn(tmp_path: Path) -> None:
    wave = voice(2)
    soundfile.write(tmp_path / "voice.wav", np.stack([wave, -wave], 1), RATE)
    with pipeline() as ours:
        with pytest.warns(UserWarning, match="cancel each other out"):
            stream = ours.stream(portrait(), tmp_path / "voice.wav")
        assert next(stream).sound.shape[1] == 2


def test_the_largest_size_that_plays_in_real_time_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own: a chunk takes a tenth of a second for every 1,000 pixels."""

    def seconds(ours: TalkingHeadPipeline, size: tuple[int, int]) -> float:
        ours._resize(size)
        return size[0] * size[1] / 10_000

    monkeypatch.setattr(TalkingHeadPipeline, "_chunk_seconds", seconds)
    ours = pipeline(size="auto", lazy=True)
    width, height = ours.config.chunk.width, ours.config.chunk.height
    lasts = NEW / 25
    assert ours.settings["measured"] == {"size": [width, height], "chunk_s": width * height / 1e4, "lasts_s": lasts}
    assert width * height / 1e4 > 0.9 * lasts  # the smallest size that is tried has 64 pixels, which is too large


def test_a_chunk_is_timed_in_the_size_that_is_asked_for() -> None:
    ours = pipeline(lazy=True)
    assert 0 < ours._chunk_seconds((64, 32)) < 60
    assert (ours.config.chunk.width, ours.config.chunk.height) == (64, 32)
    assert ours.settings["chunk"]["width"] == 64
