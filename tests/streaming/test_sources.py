"""Sources: nothing dropped, nothing shifted, nothing read that is not needed, and every bad input told in one line."""

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
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ChunkConfig
from model.errors import UserError
from streaming.sources import SOUND_RATE, FileSource, Slice, Source, StdinSource, open_source

CHUNK = ChunkConfig()
SIZE = CHUNK.slice_samples
SMALL = ChunkConfig(frame_num=9, motion_frames_num=5)  # 4 new frames: 2560 samples a slice


def written(path: Path, signal: np.ndarray, rate: int, subtype: str | None = None) -> str:
    soundfile.write(path, signal, rate, subtype)
    return str(path)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def joined(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """The whole speech and sound, after checking every slice's shape."""
    slices = list(source)
    assert isinstance(source, FileSource | StdinSource)
    size = source.chunk.slice_samples
    assert [len(piece.speech) for piece in slices[:-1]] == [size] * (len(slices) - 1)
    assert 1 <= len(slices[-1].speech) <= size
    for speech, sound in slices:
        assert speech.dtype == sound.dtype == np.float32
        assert sound.shape == (source.rate // 16000 * len(speech), source.channels)
    return np.concatenate([s.speech for s in slices]), np.concatenate([s.sound for s in slices])


def expected(signal: np.ndarray, rate: int, to: int, length: int) -> np.ndarray:
    """One call of the resampler on the whole signal, its length set to `length`."""
    whole = soxr.resample(signal, rate, to)
    return np.pad(whole[:length], [(0, max(0, length - len(whole)))] + [(0, 0)] * (whole.ndim - 1))


@settings(max_examples=30)
@given(
    rate=st.sampled_from([1000, 8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000, 768000])
    | st.integers(1000, 99999),
    channels=st.sampled_from([1, 2, 3, 6]),
    seconds=st.floats(0, 1.2),
    seed=st.integers(0, 2**32 - 1),
)
def test_slices_join_to_a_resampling_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, rate: int, channels: int, seconds: float, seed: int
) -> None:
    length = max(1, int(seconds * rate))
    signal = noise(seed, length, channels)
    path = tmp_path_factory.mktemp("audio") / "voice.wav"
    with open_source(written(path, signal, rate, subtype="FLOAT"), SMALL) as source:
        assert source.channels == (2 if channels == 2 else 1)
        assert source.duration == length / rate
        speech, sound = joined(source)
        again, _ = joined(source)
    assert len(speech) == max(1, np.floor(length * 16000 / rate + 0.5))
    mono = signal.mean(axis=1)
    np.testing.assert_allclose(speech, expected(mono, rate, 16000, len(speech)), atol=1e-3)
    heard = signal if channels <= 2 else mono[:, None]
    np.testing.assert_allclose(sound, expected(heard, rate, SOUND_RATE, len(sound)), atol=1e-3)
    np.testing.assert_array_equal(again, speech)


@settings(max_examples=20)
@given(rate=st.sampled_from([8000, 16000, 22050, 44100, 48000, 192000]), second=st.floats(0.05, 2.2))
def test_a_click_is_at_the_same_time_in_speech_and_sound(
    tmp_path_factory: pytest.TempPathFactory, rate: int, second: float
) -> None:
    signal = np.zeros(int(2.3 * rate), np.float32)
    click = int(second * rate)
    signal[click] = 0.9
    path = tmp_path_factory.mktemp("audio") / "click.wav"
    with open_source(written(path, signal, rate), CHUNK) as source:
        speech, sound = joined(source)
    for found, unit in ((np.abs(speech).argmax(), 16000), (np.abs(sound[:, 0]).argmax(), SOUND_RATE)):
        assert abs(found / unit - click / rate) <= 1 / unit


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_file_formats(tmp_path: Path, suffix: str) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(3 * 44100) / 44100)
    path = written(tmp_path / f"tone.{suffix}", np.stack([tone, -0.5 * tone], 1), 44100)
    decoded, _ = soundfile.read(
        path, dtype="float32"
    )  # at once; MP3 goes wrong block by block where seeks come between
    with open_source(path, CHUNK) as source:
        first, again = joined(source), joined(source)
    for speech, sound in (first, again):
        np.testing.assert_allclose(speech, expected(decoded.mean(axis=1), 44100, 16000, len(speech)), atol=1e-3)
        np.testing.assert_allclose(sound, expected(decoded, 44100, SOUND_RATE, len(sound)), atol=1e-3)
    assert source.duration == len(decoded) / 44100 == 3


def test_16_khz_mono_reaches_the_speech_encoder_untouched(tmp_path: Path) -> None:
    signal = noise(1, 2 * SIZE)
    with open_source(written(tmp_path / "voice.wav", signal, 16000, subtype="FLOAT"), CHUNK) as source:
        slices = list(source)
    assert len(slices) == 2  # no empty one at the end
    np.testing.assert_array_equal(np.concatenate([piece.speech for piece in slices]), signal)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A slice is given before much more than it was read."""
    path = tmp_path / "long.wav"
    written(path, noise(2, 60 * 16000), 16000)
    with FileSource(str(path), CHUNK) as source:
        for number, _ in enumerate(source, 1):
            assert source._file.tell() <= number * SIZE + 3 * 2**12


def test_bad_files_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not audio\n" * 100)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "bare.raw").write_bytes(bytes(1000))
    written(tmp_path / "no samples.wav", np.zeros(0), 16000)
    written(tmp_path / "slow.wav", np.zeros(100), 999)
    written(tmp_path / "fast.wav", np.zeros(100), 768001)
    bad = np.zeros((48000, 2), np.float32)
    bad[36000, 1] = np.nan
    written(tmp_path / "nan.wav", bad, 48000, subtype="FLOAT")
    bad[36000, 1] = np.inf
    written(tmp_path / "inf\nline.wav", bad, 48000, subtype="FLOAT")
    os.mkfifo(tmp_path / "pipe")
    for name, word in {
        "missing.wav": "No such file",
        "": "not a file",  # the folder itself
        "text.wav/voice.wav": "Not a directory",
        "text.wav": "not audio",
        "empty.wav": "not audio",
        "bare.raw": "not audio",
        "no samples.wav": "no sound",
        "slow.wav": "999 samples a second",
        "fast.wav": "768001 samples a second",
        "nan.wav": "0.750 s",
        "inf\nline.wav": "0.750 s",
        "pipe": "not a file",
    }.items():
        with pytest.raises(UserError, match=word) as raised:
            open_source(str(tmp_path / name), CHUNK)
        assert "\n" not in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file(tmp_path: Path) -> None:
    path = tmp_path / "voice.wav"
    written(path, np.zeros(100), 16000)
    path.chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        open_source(str(path), CHUNK)


def test_a_file_damaged_from_the_start(tmp_path: Path) -> None:
    """Lossless compression tells that something is missing; of plain samples, what is there is the file."""
    for suffix in ("flac", "wav"):
        written(tmp_path / f"voice.{suffix}", noise(3, 20 * 16000), 16000)
        os.truncate(tmp_path / f"voice.{suffix}", (tmp_path / f"voice.{suffix}").stat().st_size // 2)
    with pytest.raises(UserError, match=r"cannot be read any further than 9\.\d\d s"):
        open_source(str(tmp_path / "voice.flac"), CHUNK)
    with open_source(str(tmp_path / "voice.wav"), CHUNK) as source:
        assert len(joined(source)[0]) == pytest.approx(10 * 16000, abs=50)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_file_damaged_on_the_way_gives_what_came_before(tmp_path: Path, suffix: str) -> None:
    signal = noise(4, 60 * 16000)
    path = tmp_path / f"voice.{suffix}"
    written(path, signal, 16000)
    with open_source(str(path), CHUNK) as source:
        os.truncate(path, path.stat().st_size // 2)
        slices: list[Slice] = []
        with pytest.raises(UserError, match=r"cannot be read any further than \d+\.\d\d s") as raised:
            slices.extend(source)
    assert "\n" not in str(raised.value)
    speech = np.concatenate([piece.speech for piece in slices])
    assert 28 * 16000 < len(speech) < 32 * 16000
    np.testing.assert_allclose(speech, signal[: len(speech)], atol=1e-4)


def pcm(signal: np.ndarray) -> bytes:
    return (signal * 32767).astype("<i2").tobytes()


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


def test_another_rate_is_a_programming_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"chunk\.sample_rate: 22050"):
        FileSource(written(tmp_path / "a.wav", noise(0, 100), 16000), ChunkConfig(sample_rate=22050))
