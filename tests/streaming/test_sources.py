"""Voices in files: nothing dropped, nothing shifted, nothing read without need, and every fault told in one line."""

import io
import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.config import ChunkConfig
from model.errors import UserError
from streaming.decoding import SndfileDecoder
from streaming.sources import SOUND_RATE, FileSource, Slice, StdinSource, open_source
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
    rf64_header,
    voice,
    wav_header,
    written,
)

# Left, right, centre, subwoofer, left and right surround in the two channels of the stereo mix, by ITU-R BS.775.
MIX = np.array([[1, 0], [0, 1], [0.5**0.5] * 2, [0, 0], [0.5**0.5, 0], [0, 0.5**0.5]])


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


def test_another_rate_is_a_programming_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"chunk\.sample_rate: 22050"):
        FileSource(written(tmp_path / "a.wav", noise(0, 100), 16000), ChunkConfig(sample_rate=22050))
