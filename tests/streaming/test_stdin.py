"""The voice on standard input: raw samples, recordings that can be streamed, and what is no sound."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from model.errors import UserError
from streaming.decoding import is_container, soundless_kind
from streaming.sources import Slice, StdinSource
from tests.streaming.recordings import (
    CHUNK,
    RECORDED,
    SIZE,
    SMALL,
    joined,
    level,
    noise,
    pcm,
    piped,
    recorded,
    voice,
    wav_header,
    written,
)


@settings(max_examples=30)
@given(length=st.integers(1, 4 * SMALL.slice_samples), odd=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_stdin_gives_every_sample(length: int, odd: bool, seed: int) -> None:
    data = pcm(noise(seed, length))
    source = StdinSource(io.BytesIO(data + b"\x7f" * odd), SMALL)
    speech, sound = joined(source)
    np.testing.assert_array_equal((speech * 32768).astype("<i2"), np.frombuffer(data, "<i2"))
    np.testing.assert_array_equal(sound[:, 0], speech)
    assert (source.channels, source.rate, source.duration) == (1, 16000, None)


@pytest.mark.parametrize("data", [b"", b"\x01"])
def test_stdin_without_a_sample(data: bytes) -> None:
    with pytest.raises(UserError, match="no sound came on stdin"):
        list(StdinSource(io.BytesIO(data), CHUNK))


def test_stdin_that_is_not_open_for_reading(tmp_path: Path) -> None:
    """As `nohup` leaves it."""
    file = os.fdopen(os.open(tmp_path / "written", os.O_WRONLY | os.O_CREAT), "rb")
    with file, pytest.raises(UserError, match=r"input cannot be read \(Bad file descriptor\); pipe in") as told:
        next(iter(StdinSource(file, CHUNK)))
    assert "\n" not in str(told.value)


def test_wav_on_stdin_is_no_raw_pcm() -> None:
    """48 kHz stereo, as `ffmpeg -f wav -` writes it: without a length."""
    signal = voice(1, 48000, 2)
    content = wav_header(2**32 - 1, 48000, 2) + pcm(signal)
    for file in (piped(content), io.BytesIO(content)):
        speech, sound = joined(StdinSource(file, CHUNK))
        np.testing.assert_allclose(speech, soxr.resample(signal.mean(axis=1), 48000, 16000), atol=1e-3)
        np.testing.assert_array_equal(sound[:, 0], speech)


@pytest.mark.parametrize("name", [*RECORDED, "a.mp3", "a.flac", "a.ogg", "a.aiff", "a.au", "a.rf64", "a.w64"])
def test_containers_on_stdin(tmp_path: Path, name: str) -> None:
    if name in RECORDED:
        form, codec, rate, channels = RECORDED[name]
        options = {"movflags": "faststart"} if form in ("ipod", "mp4", "mov") else {}
        recorded(tmp_path / name, form, codec, voice(1.5, rate, channels), rate, **options)
    else:
        rate, channels = 44100, 2
        written(tmp_path / name, voice(1.5, rate, channels), rate)
    content = (tmp_path / name).read_bytes()
    speech, _ = joined(StdinSource(piped(content), CHUNK))
    assert 1.5 <= len(speech) / 16000 <= 1.5 + 4 * 1152 / rate
    assert level(speech[4000:20000]) == pytest.approx(level(voice(1.5, rate, channels).mean(axis=1)), abs=2)


@pytest.mark.parametrize(("codec", "rate"), [*(("libmp3lame", r) for r in (44100, 32000, 24000, 8000)), ("mp2", 22050)])
def test_mpeg_audio_on_stdin_without_any_tag(tmp_path: Path, codec: str, rate: int) -> None:
    form, options = ("mp2", {}) if codec == "mp2" else ("mp3", {"id3v2_version": "0"})
    path = Path(recorded(tmp_path / "a.mp3", form, codec, voice(1, rate), rate, **options))
    assert path.read_bytes()[0] == 0xFF
    assert 1 <= len(joined(StdinSource(piped(path.read_bytes()), CHUNK))[0]) / 16000 < 1.3


@pytest.mark.parametrize("box", [b"wide", b"free", b"skip"])
def test_quicktime_on_stdin_that_begins_with_another_box(tmp_path: Path, box: bytes) -> None:
    path = recorded(tmp_path / "a.mov", "mov", "aac", voice(1, 48000), 48000, movflags="faststart")
    content = Path(path).read_bytes()
    assert len(joined(StdinSource(piped(content[:4] + box + content[8:]), CHUNK))[0]) >= 16000


def test_containers_on_stdin_that_are_no_streams(tmp_path: Path) -> None:
    """The index of an M4A file stands at its end, unless it was made to be played while it loads."""
    content = Path(recorded(tmp_path / "a.m4a", "ipod", "aac", voice(1, 48000), 48000)).read_bytes()
    soundfile.write(tmp_path / "a.caf", voice(1, 16000), 16000)
    caf = (tmp_path / "a.caf").read_bytes()
    for file in (piped(content), piped(caf), piped(b"RIFF" + bytes(10000)), piped(b"ID3\3" + b"words " * 2000)):
        with pytest.raises(UserError, match="recording on standard input cannot be read as a stream; name its file"):
            list(StdinSource(file, CHUNK))
    assert len(joined(StdinSource(io.BytesIO(content), CHUNK))[0]) > 16000  # from a file, as in `< a.m4a`


def test_bad_samples_in_a_stream() -> None:
    content = io.BytesIO()
    bad = voice(2, 16000)
    bad[20000] = np.nan
    soundfile.write(content, bad, 16000, "FLOAT", format="WAV")
    slices: list[Slice] = []
    with pytest.raises(UserError, match=r"standard input holds a sample that is no finite number at 1\.250 s"):
        slices.extend(StdinSource(piped(content.getvalue()), CHUNK))
    assert len(slices) == 2  # a whole one, and what could be read of the second


@settings(max_examples=100)
@example(value=-1025, kind="still", seed=0)  # 0xFBFF, as MP3 begins
@example(value=-1025, kind="noise", seed=0)
@example(value=-3585, kind="tone", seed=0)  # 0xF1FF, as AAC begins
@example(value=0x4747, kind="still", seed=0)  # "G", as packets of MPEG-TS begin
@example(value=0x47, kind="steady", seed=0)
@example(value=-1281, kind="steady", seed=0)  # 0xFAFF, as MP3 begins, again and again
@given(
    value=st.integers(-(2**15), 2**15 - 1),
    kind=st.sampled_from(["still", "noise", "tone", "steady"]),
    seed=st.integers(0, 1000),
)
def test_raw_samples_are_no_container(value: int, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = {
        "still": np.full(2048, value),
        "noise": np.concatenate([[value], rng.integers(-3, 4, 2047)]),
        "tone": np.concatenate([[value], 9000 * np.sin(np.arange(2047) / 5)]),
        "steady": np.resize([value, *range(93)], 2048),  # with the period of packets of MPEG-TS
    }[kind]
    data = samples.astype("<i2").tobytes()
    assert not is_container(data)
    assert soundless_kind(data) is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_a_picture_on_standard_input_is_no_sound(kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(file, kind)
    file.seek(0)
    with pytest.raises(UserError, match=f"standard input is a {kind} picture, not sound"):
        next(iter(StdinSource(file, CHUNK)))


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html>\n<html><head><title>Not found</title></head></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 465658\n",
        ("Ein Gru\u00df, der nicht klingt.\r\n" * 300).encode()[:-1],
    ],
)
def test_text_on_standard_input_is_no_sound(content: bytes) -> None:
    with pytest.raises(UserError, match="standard input is text, not sound; pipe in a recording"):
        next(iter(StdinSource(piped(content), CHUNK)))


def test_an_empty_recording_on_standard_input_holds_no_sound() -> None:
    with pytest.raises(UserError, match="standard input holds no sound that can be decoded"):
        next(iter(StdinSource(piped(wav_header(0)), CHUNK)))


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_slice_comes_as_soon_as_its_samples_have(buffering: int) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering) as file, os.fdopen(writer, "wb", 0) as pipe:
        signal = noise(5, 2 * SIZE + 100)
        data = pcm(signal)
        thread = threading.Thread(target=lambda: [pipe.write(data[i : i + 999]) for i in range(0, 2 * SIZE, 999)])
        slices = iter(StdinSource(file, CHUNK))
        thread.start()
        first = next(slices)  # the second slice is not there yet: 99 bytes more, and then the pipe stalls
        thread.join()
        assert len(first.speech) == SIZE
        sent = -(-2 * SIZE // 999) * 999
        pipe.write(data[sent : 4 * SIZE])
        assert len(next(slices).speech) == SIZE
        pipe.write(data[4 * SIZE :])
        pipe.close()
        assert [len(piece.speech) for piece in slices] == [100]


def test_dash_is_the_standard_input_of_the_process() -> None:
    program = (
        "from model.config import ChunkConfig; from streaming.sources import open_source\n"
        "for piece in open_source('-', ChunkConfig()): print(len(piece.speech), flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(bytes(2 * SIZE))
        process.stdin.flush()
        assert process.stdout.readline() == b"17920\n"  # while stdin stays open and silent
        process.stdin.write(bytes(6))
        process.stdin.close()
        assert process.stdout.read() == b"3\n"
    assert process.returncode == 0
