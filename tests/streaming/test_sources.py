"""Sources: nothing dropped, nothing shifted, nothing read that is not needed, and every bad input told in one line."""

import io
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO, cast

import av
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from model.config import ChunkConfig
from model.errors import UserError
from streaming.decoding import SndfileDecoder, is_container, soundless_kind
from streaming.sources import SOUND_RATE, FileSource, Slice, Source, StdinSource, open_source

CHUNK = ChunkConfig()
SIZE = CHUNK.slice_samples
# Left, right, centre, subwoofer, left and right surround in the two channels of the stereo mix, by ITU-R BS.775.
MIX = np.array([[1, 0], [0, 1], [0.5**0.5] * 2, [0, 0], [0.5**0.5, 0], [0, 0.5**0.5]])
SMALL = ChunkConfig(frame_num=9, motion_frames_num=5)  # 4 new frames: 2560 samples a slice


def written(path: Path, signal: np.ndarray, rate: int, subtype: str | None = None, form: str | None = None) -> str:
    """A file. Of more than two channels, WAV does not know the places, WAVEX knows those of 4, 6 and 8, FLAC all."""
    soundfile.write(path, signal, rate, subtype, format=form)
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
    signal = np.abs(noise(seed, length, channels))  # so that no two channels cancel each other out
    path = tmp_path_factory.mktemp("audio") / "voice.wav"
    form = "WAVEX" if channels == 6 else "WAV"
    with open_source(written(path, signal, rate, "FLOAT", form), SMALL) as source:
        assert source.channels == (2 if channels in (2, 6) else 1)
        assert source.duration == length / rate
        speech, sound = joined(source)
        again, _ = joined(source)
    assert len(speech) == max(1, np.floor(length * 16000 / rate + 0.5))
    heard = signal
    if channels > 2:
        heard = signal @ MIX / MIX.sum(axis=0) if channels == 6 else signal.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(speech, expected(heard.mean(axis=1), rate, 16000, len(speech)), atol=1e-3)
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


def recorded(path: Path, form: str, codec: str, signal: np.ndarray, rate: int, **options: str) -> str:
    """A file as phones, browsers and cameras write it. `signal` is [sample, channel]."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[signal.shape[1]]
    with av.open(str(path), "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        stream.codec_context.open()
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(signal.T), "fltp", layout)
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate, stream.codec_context.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))
    return str(path)


def voice(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """A tone of 440 Hz, [sample, channel], each channel weaker than the one before."""
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return (wave[:, None] / np.arange(1, channels + 1)).astype(np.float32)


def level(signal: np.ndarray) -> float:
    """Power in dB."""
    return float(10 * np.log10((signal.astype(np.float64) ** 2).mean() + 1e-20))


RECORDED = {  # name: format, codec, rate, channels
    "phone.m4a": ("ipod", "aac", 44100, 2),
    "lossless.m4a": ("ipod", "alac", 48000, 2),
    "browser.webm": ("webm", "libopus", 48000, 1),
    "film.mp4": ("mp4", "aac", 48000, 1),
    "film.mka": ("matroska", "aac", 22050, 1),
    "radio.aac": ("adts", "aac", 48000, 2),
    "old phone.amr": ("amr", "libopencore_amrnb", 8000, 1),
    "camera.ts": ("mpegts", "aac", 48000, 2),
    "radio.mp2": ("mp2", "mp2", 48000, 2),
    "disc.mpg": ("mpeg", "mp2", 48000, 2),
    "editor.mov": ("mov", "pcm_s16le", 48000, 2),
}


@pytest.mark.parametrize("name", RECORDED)
def test_what_phones_and_browsers_record(tmp_path: Path, name: str) -> None:
    form, codec, rate, channels = RECORDED[name]
    path = recorded(tmp_path / name, form, codec, voice(1.5, rate, channels), rate)
    with open_source(path, CHUNK) as source:
        (speech, sound), again = joined(source), joined(source)
    assert source.channels == channels
    assert source.duration is not None
    assert 1.5 <= source.duration <= 1.5 + 3 * 1152 / rate  # encoders begin early, and fill their last packet
    np.testing.assert_array_equal(again[0], speech)
    middle = slice(4000, 20000)
    assert level(speech[middle]) == pytest.approx(level(voice(1.5, rate, channels).mean(axis=1)), abs=2)
    spectrum = np.abs(np.fft.rfft(speech[middle]))
    assert spectrum.argmax() == 440
    assert np.array_equal(again[1], sound)


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        ("WAV", "GSM610"),
        ("AIFF", "GSM610"),
        ("W64", "GSM610"),
        ("AU", "G721_32"),
        ("WAV", "NMS_ADPCM_32"),
        ("XI", "DPCM_16"),
    ],
)
def test_codecs_that_are_only_read_forwards(tmp_path: Path, form: str, subtype: str) -> None:
    """Telephone codecs among them. A block of 320 samples may be filled up at the end."""
    path, rate = str(tmp_path / "voice"), 44100 if form == "XI" else 8000
    soundfile.write(path, voice(2.005, rate), rate, subtype, format=form)
    with open_source(path, CHUNK) as source:
        speech, again = joined(source)[0], joined(source)[0]
    np.testing.assert_array_equal(again, speech)
    assert 32080 <= len(speech) <= 32080 + 2 * 320
    assert level(speech[:32000]) == pytest.approx(level(voice(2, rate)), abs=1)


def test_a_telephone_recording_does_not_end_in_noise(tmp_path: Path) -> None:
    """libsndfile decodes a block too many where the number of blocks is odd."""
    soundfile.write(tmp_path / "voice.wav", voice(3 * 320 / 8000, 8000), 8000, "GSM610")
    with open_source(str(tmp_path / "voice.wav"), CHUNK) as source:
        assert source.duration == 3 * 320 / 8000


def wav_header(data: int, rate: int = 16000, channels: int = 1, riff: int | None = None) -> bytes:
    form = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * 2 * channels, 2 * channels, 16)
    riff = min(data + 36, 2**32 - 1) if riff is None else riff
    return b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + form + b"data" + struct.pack("<I", data)


def rf64_header(data: int, name: bytes = b"RF64") -> bytes:
    """Of 16 kHz mono, before its 64-bit sizes are filled in."""
    return name + b"\xff" * 4 + b"WAVEds64" + struct.pack("<I28x", 28) + wav_header(data)[12:]


def test_unfinished_recordings_are_read(tmp_path: Path) -> None:
    """Their recorder was killed, or wrote to a pipe, so that sizes in the header were never filled in."""
    signal = noise(6, 16000)
    signal[:4] = 0
    data = pcm(signal)
    flac, caf = io.BytesIO(), io.BytesIO()
    soundfile.write(flac, signal, 16000, format="FLAC")
    soundfile.write(caf, signal, 16000, format="CAF", subtype="PCM_16")
    at = caf.getvalue().index(b"data") + 4
    files = {
        "nothing.wav": wav_header(0) + data,
        "nothing, no file.wav": wav_header(0, riff=0) + data,
        "nothing, whole file.wav": wav_header(0, riff=36 + len(data)) + data,
        "nothing, silence first.wav": wav_header(0, riff=36 + len(data)) + bytes(8) + data[8:],
        "nothing.rf64": rf64_header(0) + data,
        "endless.rf64": rf64_header(2**32 - 1) + data,
        "endless.bw64": rf64_header(2**32 - 1, b"BW64") + data,
        "nothing, endless file.wav": wav_header(0, riff=2**32 - 1) + data,
        "endless.wav": wav_header(2**32 - 1) + data,
        "endless.caf": caf.getvalue()[:at] + b"\xff" * 8 + caf.getvalue()[at + 8 :],
        "unknown.flac": flac.getvalue()[:21] + b"\xf0" + bytes(4) + flac.getvalue()[26:],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with open_source(str(tmp_path / name), CHUNK) as source:
            assert source.duration == 1, name
            np.testing.assert_allclose(joined(source)[0], signal, atol=1e-4)
        if "caf" not in name:
            for file in (piped(content), io.BytesIO(content)):
                np.testing.assert_allclose(joined(StdinSource(file, CHUNK))[0], signal, atol=1e-4)


@pytest.mark.parametrize(("channels", "width"), [(1, 2), (2, 3), (2, 4)])
def test_a_recording_cut_within_a_sample_is_read_up_to_it(tmp_path: Path, channels: int, width: int) -> None:
    """FFmpeg cuts plain samples into packets of whole samples; only the last one may be smaller than a sample."""
    block, samples = channels * width, 8192  # whole packets
    form = struct.pack("<IHHIIHH", 16, 1, channels, 16000, 16000 * block, block, 8 * width)
    content = b"RIFF" + bytes(4) + b"WAVEfmt " + form + b"data" + bytes(4) + b"\1" * (samples * block + 1)
    (tmp_path / "cut.wav").write_bytes(content)
    with open_source(str(tmp_path / "cut.wav"), CHUNK) as source:
        assert source.duration == samples / 16000
        assert len(joined(source)[0]) == samples
    assert len(joined(StdinSource(piped(content), CHUNK))[0]) == samples


def test_channels_that_cancel_each_other_out_are_heard(tmp_path: Path) -> None:
    x = voice(2, 48000)[:, 0]
    hums = {f"{rate} Hz": 0.5 * np.sin(2 * np.pi * rate * np.arange(len(x)) / 48000) for rate in (50, 60)}
    common = hums | {"offset": np.full(len(x), 0.5)}  # as loud as the voice, and the same in both channels
    shared = {name: (x + same, same - x) for name, same in common.items()}
    for name, pair in {"inverted": (x, -x), "weaker": (x, -0.7 * x), **shared}.items():
        path = written(tmp_path / f"{name}.wav", np.stack(pair, 1), 48000)
        with open_source(path, CHUNK) as source:
            assert source.warning is not None
            assert "cancel each other out" in source.warning
            assert "\n" not in source.warning
            speech, sound = joined(source)
        np.testing.assert_allclose(speech, soxr.resample((pair[0] - pair[1]) / 2, 48000, 16000), atol=0.01)
        np.testing.assert_allclose(sound, np.stack(pair, 1), atol=1e-3)  # the viewer hears the file
    for other in (x, np.zeros_like(x), np.roll(x, 27), noise(7, len(x))):
        with open_source(written(tmp_path / "fine.wav", np.stack([x, other], 1), 48000), CHUNK) as source:
            assert source.warning is None
            np.testing.assert_allclose(joined(source)[0], soxr.resample((x + other) / 2, 48000, 16000), atol=0.01)


def test_one_of_two_speakers_is_inverted(tmp_path: Path) -> None:
    x = voice(2, 16000)[:, 0]
    right = np.concatenate([x, -x])
    with open_source(written(tmp_path / "a.wav", np.stack([np.tile(x, 2), right], 1), 16000), CHUNK) as source:
        speech = joined(source)[0]
    for half in (speech[:32000], speech[32000 + 2 * 4096 :]):
        assert level(half) == pytest.approx(level(x), abs=0.5)


@pytest.mark.parametrize("channels", [3, 4, 6, 8])
def test_surround_sound_keeps_the_voice(tmp_path: Path, channels: int) -> None:
    """In every channel but the subwoofer, the fourth of 6 and 8. Neither lips nor viewer lose more than 12 dB."""
    x = voice(1, 48000)[:, 0]
    for place in set(range(channels)) - ({3} if channels >= 6 else set()):
        signal = np.zeros((len(x), channels), np.float32)
        signal[:, place] = x
        with open_source(written(tmp_path / "s.flac", signal, 48000, "PCM_24"), CHUNK) as source:
            speech, sound = joined(source)
        assert source.warning is None
        assert source.channels == 2
        assert level(sound * 2**0.5) > level(x) - 12  # of both channels together
        assert level(speech) > level(x) - 18  # its loudness is levelled later


def test_surround_sound_of_full_scale_does_not_clip(tmp_path: Path) -> None:
    signal = np.ones((4800, 6), np.float32)
    with open_source(written(tmp_path / "s.wav", signal, 48000, "FLOAT", "WAVEX"), CHUNK) as source:
        np.testing.assert_allclose(joined(source)[1][100:-100], 1, atol=1e-3)


@pytest.mark.parametrize("channels", [6, 7, 8])
def test_a_voice_in_the_subwoofer_is_not_heard_but_told(tmp_path: Path, channels: int) -> None:
    signal = 1e-4 * noise(9, 16000, channels)
    for place, told in {3: f"channel 4 of {channels} is a subwoofer's", 2: None}.items():
        signal[:, place] = voice(1, 16000)[:, 0]
        with open_source(written(tmp_path / "s.flac", signal, 16000, "PCM_24"), CHUNK) as source:
            assert (told in (source.warning or "")) if told else source.warning is None
            assert "\n" not in (source.warning or "")


@pytest.mark.parametrize("channels", range(3, 9))
def test_channels_whose_places_are_not_known_count_alike(tmp_path: Path, channels: int) -> None:
    """A field recorder's, one microphone each."""
    x = voice(1, 16000)[:, 0]
    for place in range(channels):
        signal = np.zeros((len(x), channels), np.float32)
        signal[:, place] = x
        with open_source(written(tmp_path / "s.wav", signal, 16000, "FLOAT"), CHUNK) as source:
            assert source.channels == 1
            np.testing.assert_allclose(joined(source)[0], x / channels, atol=1e-6)


def test_twenty_channels_become_their_mean(tmp_path: Path) -> None:
    signal = np.abs(noise(8, 16000, 20))
    with open_source(written(tmp_path / "s.wav", signal, 16000, "FLOAT"), CHUNK) as source:
        assert source.channels == 1
        np.testing.assert_allclose(joined(source)[0], signal.mean(axis=1), atol=1e-5)


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
        assert isinstance(source._decoder, SndfileDecoder)
        for number, _ in enumerate(source, 1):
            assert source._decoder.file.tell() <= number * SIZE + 3 * 2**12


def test_bad_files_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not audio\n" * 100)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "pointer.m4a").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    (tmp_path / "page.mp3").write_text("<html>404</html>" * 100)
    (tmp_path / "bare.raw").write_bytes(bytes(1000))
    written(tmp_path / "no samples.wav", np.zeros(0), 16000)
    written(tmp_path / "slow.wav", np.zeros(100), 999)
    written(tmp_path / "fast.wav", np.zeros(100), 768001)
    bad = np.zeros((48000, 2), np.float32)
    bad[36000, 1] = np.nan
    written(tmp_path / "nan.wav", bad, 48000, subtype="FLOAT")
    bad[36000, 1] = np.inf
    written(tmp_path / "inf\nline.wav", bad, 48000, subtype="FLOAT")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.wav", "PNG")
    (tmp_path / "list.m3u").write_text("ffconcat version 1.0\nfile nan.wav\n")  # FFmpeg would open what it names
    with av.open(str(tmp_path / "mute.mp4"), "w") as film:
        stream = film.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        film.mux([*stream.encode(av.VideoFrame(32, 32, "yuv420p")), *stream.encode(None)])
    (tmp_path / "header.wav").write_bytes(wav_header(0))
    (tmp_path / "header.rf64").write_bytes(rf64_header(2**32 - 1) + b"LIST\4\0\0\0INFO")
    (tmp_path / "odd title only.wav").write_bytes(wav_header(0, riff=49) + b"LIST\5\0\0\0INFO!")
    (tmp_path / "title only.wav").write_bytes(wav_header(0, riff=48) + b"LIST\4\0\0\0INFO")
    os.mkfifo(tmp_path / "pipe")
    for name, word in {
        "missing.wav": "No such file",
        "": "not a file",  # the folder itself
        "text.wav/voice.wav": "Not a directory",
        "text.wav": "not audio",
        "empty.wav": "is empty",
        "pointer.m4a": "git lfs pull",
        "page.mp3": "is a web page",
        "bare.raw": "not audio",
        "picture.wav": "no sound that can be decoded; give WAV",
        "list.m3u": "not audio",
        "mute.mp4": "no sound that can be decoded; give WAV",
        "header.wav": "no sound",
        "header.rf64": "no sound",
        "odd title only.wav": "no sound",
        "title only.wav": "no sound",
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


@pytest.mark.parametrize("name", ["phone.m4a", "radio.aac", "old phone.amr"])
def test_a_recording_that_was_cut_is_told(tmp_path: Path, name: str) -> None:
    form, codec, rate, channels = RECORDED[name]
    options = {"movflags": "faststart"} if form == "ipod" else {}
    path = Path(recorded(tmp_path / name, form, codec, voice(2, rate, channels), rate, **options))
    os.truncate(path, path.stat().st_size * 3 // 5 + 7)
    with pytest.raises(UserError, match=r"cannot be read any further than [01]\.\d\d s; give an intact file"):
        open_source(str(path), CHUNK)


def test_a_stream_that_was_cut_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = Path(recorded(tmp_path / "a.webm", "webm", "libopus", voice(2, 48000), 48000))
    os.truncate(path, path.stat().st_size // 2)
    with open_source(str(path), CHUNK) as source:
        assert 0.7 < len(joined(source)[0]) / 16000 < 1.3


def test_a_recording_that_changes_its_rate(tmp_path: Path) -> None:
    one, two = (recorded(tmp_path / f"{rate}.aac", "adts", "aac", voice(1, rate), rate) for rate in (44100, 48000))
    (tmp_path / "both.aac").write_bytes(Path(one).read_bytes() + Path(two).read_bytes())
    with pytest.raises(UserError, match=r"changes its rate or channels at 1\.0\d s"):
        open_source(str(tmp_path / "both.aac"), CHUNK)


def test_tags_in_another_encoding(tmp_path: Path) -> None:
    path = Path(recorded(tmp_path / "a.mka", "matroska", "aac", voice(1, 48000), 48000))
    content = path.read_bytes()
    (tmp_path / "b.mka").write_bytes(content.replace(b"Lavf", b"\xe4\xf6\xfc\xff"))
    with open_source(str(tmp_path / "b.mka"), CHUNK) as source:
        assert len(joined(source)[0]) > 16000


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


def test_stdin_that_is_not_open_for_reading(tmp_path: Path) -> None:
    """As `nohup` leaves it."""
    file = os.fdopen(os.open(tmp_path / "written", os.O_WRONLY | os.O_CREAT), "rb")
    with file, pytest.raises(UserError, match=r"input cannot be read \(Bad file descriptor\); pipe in") as told:
        next(iter(StdinSource(file, CHUNK)))
    assert "\n" not in str(told.value)


class Pipe(io.RawIOBase):
    """Gives no more than 999 bytes at once."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        return self._content.read(min(size, 999))


def piped(content: bytes) -> BinaryIO:
    return cast("BinaryIO", Pipe(content))


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


def test_big_endian_wav(tmp_path: Path) -> None:
    """FFmpeg takes its samples for little-endian ones, so that libsndfile reads it, if it can be sought in."""
    for channels in (1, 2, 3):
        path = tmp_path / f"{channels}.wav"
        signal = voice(1, 16000, channels)
        soundfile.write(path, signal, 16000, endian="BIG")
        assert path.read_bytes()[:4] == b"RIFX"
        with open_source(str(path), CHUNK) as source:
            np.testing.assert_allclose(joined(source)[0], signal.reshape(len(signal), -1).mean(axis=1), atol=1e-4)
        with pytest.raises(UserError, match="big-endian WAV file on standard input cannot be read as a stream"):
            next(iter(StdinSource(piped(path.read_bytes()), CHUNK)))


def test_a_film_without_its_index_is_told_so(tmp_path: Path) -> None:
    path = Path(recorded(tmp_path / "a.m4a", "ipod", "aac", voice(1, 48000), 48000))
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"moov") - 4])
    with pytest.raises(UserError, match=r"a\.m4a' is a film or M4A file without its index"):
        open_source(str(path), CHUNK)


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


def test_another_rate_is_a_programming_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"chunk\.sample_rate: 22050"):
        FileSource(written(tmp_path / "a.wav", noise(0, 100), 16000), ChunkConfig(sample_rate=22050))
