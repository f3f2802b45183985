"""Recordings to test with: what they hold, how they are written, and what a source makes of them."""

import io
import struct
from pathlib import Path
from typing import BinaryIO, cast

import av
import numpy as np
import soundfile

from model.config import ChunkConfig
from streaming.sources import FileSource, Source, StdinSource

CHUNK = ChunkConfig()
SIZE = CHUNK.slice_samples
SMALL = ChunkConfig(frame_num=9, motion_frames_num=5)  # 4 new frames: 2560 samples a slice
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


def written(path: Path, signal: np.ndarray, rate: int, subtype: str | None = None, form: str | None = None) -> str:
    """A file. Of more than two channels, WAV does not know the places, WAVEX knows those of 4, 6 and 8, FLAC all."""
    soundfile.write(path, signal, rate, subtype, format=form)
    return str(path)


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


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def voice(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """A tone of 440 Hz, [sample, channel], each channel weaker than the one before."""
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return (wave[:, None] / np.arange(1, channels + 1)).astype(np.float32)


def level(signal: np.ndarray) -> float:
    """Power in dB."""
    return float(10 * np.log10((signal.astype(np.float64) ** 2).mean() + 1e-20))


def pcm(signal: np.ndarray) -> bytes:
    return (signal * 32767).astype("<i2").tobytes()


def wav_header(data: int, rate: int = 16000, channels: int = 1, riff: int | None = None) -> bytes:
    form = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * 2 * channels, 2 * channels, 16)
    riff = min(data + 36, 2**32 - 1) if riff is None else riff
    return b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + form + b"data" + struct.pack("<I", data)


def rf64_header(data: int, name: bytes = b"RF64") -> bytes:
    """Of 16 kHz mono, before its 64-bit sizes are filled in."""
    return name + b"\xff" * 4 + b"WAVEds64" + struct.pack("<I28x", 28) + wav_header(data)[12:]


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
