"""Sources of the voice: an audio file, or a stream on stdin, cut into one slice of sound per chunk of video.

A slice holds the same stretch of time twice: for the speech encoder (mono, 16 kHz), and for the viewer (one or two
channels, at the source's `rate`). The viewer's sample `rate / sample_rate * j` is the encoder's sample `j`.
"""

import io
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import numpy as np
import soxr
from numpy.typing import NDArray
from scipy.signal import butter, sosfilt, sosfilt_zi

from model.config import ChunkConfig
from model.errors import UserError
from streaming.decoding import (
    BIG_ENDIAN_WAV,
    FILE_RATES,
    SNIFFED,
    Block,
    FFmpegDecoder,
    is_container,
    open_decoder,
    soundless_kind,
)

SOUND_RATE = 48_000  # Hz, of the sound that the viewer of a file hears
CANCELLED = 0.1  # power of two channels' sum over that of their difference, below which they cancel each other out
HUM = 200.0  # Hz; hum of the mains and offsets are below, and most of a voice's power is above
SILENCE = 1e-7  # power of a channel that counts as silent, -70 dB as in ITU-R BS.1770
MEMORY = 0.1  # seconds in which what was heard of two channels fades to 1 / e when they are compared


class Slice(NamedTuple):
    """The sound of one chunk's new frames.

    Every slice but a source's last has exactly `chunk.slice_samples` of speech; the last has 1 to that many. Sound has
    `rate / chunk.sample_rate`, a whole number, times as many samples in each. Joined, the slices are the whole signal.
    """

    speech: NDArray[np.float32]  # [sample], mono at `chunk.sample_rate`, full scale 1
    sound: NDArray[np.float32]  # [sample, channel], at the source's rate, in [-1, 1]


class Source(ABC):
    """An iterable of slices, and a context manager that closes what it holds.

    `channels` of the sound: 1 or 2; its `rate` in Hz. `duration` in seconds, None where the end is not known.
    `warning` is a line that the user should read, or None.
    """

    channels: int
    rate: int
    duration: float | None
    warning: str | None = None

    @abstractmethod
    def __iter__(self) -> Iterator[Slice]: ...

    @abstractmethod
    def close(self) -> None:
        """Releases what the source opened; nothing can be read afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class FileSource(Source):
    """An audio file, or the sound of a film: anything that libsndfile or FFmpeg reads, 1 to 768 kHz.

    The sound keeps one or two channels as they are; surround sound is mixed down to two, and other channels to one. The
    speech is their mean, but where two channels cancel each other out, it is half of their difference. n samples at
    r Hz become max(1, floor(n * sample_rate / r + 1/2)) samples of speech, and three times that number of sound. At the
    very end, resampled samples beyond these numbers are cut, and missing ones are zero.

    Construction reads the whole file once, so that its faults are known before anything is generated. Raises
    `UserError` if the file is missing, is not readable audio, is empty, or holds samples that are not finite. Iteration
    raises it too, after the slices that could be read, if the file has become unreadable since.
    """

    def __init__(self, audio: str, chunk: ChunkConfig) -> None:
        if SOUND_RATE % chunk.sample_rate:
            raise ValueError(f"chunk.sample_rate: {chunk.sample_rate} Hz, wanted a divisor of {SOUND_RATE}")
        self.chunk, self.rate = chunk, SOUND_RATE
        self._decoder = open_decoder(audio)
        try:
            self._samples, self.warning = self._heard()
        except BaseException:
            self.close()
            raise
        self.channels = self._decoder.channels
        self.duration = self._samples / self._decoder.rate

    def __iter__(self) -> Iterator[Slice]:
        return _slices(self._blocks(), self._decoder.rate, self.chunk, self.rate, self.channels)

    def close(self) -> None:
        """Closes the file; nothing can be read afterwards."""
        self._decoder.close()

    def _heard(self) -> tuple[int, str | None]:
        """Samples in the file, all of which were read and are good, and what the user should know of their sound."""
        samples, sums, differences, name = 0, 0.0, 0.0, self._decoder.name
        powers = _Powers(self._decoder.rate)
        for block in self._decoder.blocks():
            samples += len(block)
            one, other = powers(block)
            sums, differences = sums + one, differences + other
        if not samples:
            raise UserError(f"{name} holds no sound; give a recording of at least one sample")
        if self._decoder.unheard and (sums + differences) / 4 < SILENCE * samples:
            lost = f"{self._decoder.unheard} is a subwoofer's, which is left out"
            return samples, f"nothing is heard of {name}: {lost}; if the voice is there, give that channel alone"
        if sums < CANCELLED * differences:
            return samples, f"the two channels of {name} cancel each other out; on one loudspeaker they are silent"
        return samples, None

    def _blocks(self) -> Iterator[Block]:
        came = 0
        for block in self._decoder.blocks():
            yield block
            came += len(block)
        if came < self._samples:
            raise self._decoder.damage(came)


class ArraySource(Source):
    """Samples in memory: floating point [n], [n, 1] or [n, 2] in [-1, 1], at `rate` samples a second.

    They become sound and speech as those of a file do (`FileSource`). Raises `ValueError` for other arrays.
    """

    def __init__(self, samples: NDArray[np.floating], rate: int, chunk: ChunkConfig) -> None:
        if not (
            np.issubdtype(samples.dtype, np.floating)
            and (samples.ndim == 1 or (samples.ndim == 2 and samples.shape[1] in (1, 2)))
            and len(samples)
            and np.isfinite(samples).all()
        ):
            found = f"{samples.dtype} {list(samples.shape)}"
            raise ValueError(f"samples: got {found}, wanted finite floating-point [n], [n, 1] or [n, 2], n at least 1")
        if rate not in FILE_RATES:
            raise ValueError(f"rate: got {rate} Hz, wanted {FILE_RATES.start} to {FILE_RATES.stop - 1}")
        self._block = samples.astype(np.float32).reshape(len(samples), -1)
        self._rate, self.chunk, self.rate = rate, chunk, SOUND_RATE
        self.channels, self.duration = self._block.shape[1], len(samples) / rate

    def __iter__(self) -> Iterator[Slice]:
        return _slices([self._block], self._rate, self.chunk, self.rate, self.channels)

    def close(self) -> None:
        """Does nothing: the samples belong to the caller."""


class StdinSource(Source):
    """A pipe that ends whenever it likes: raw PCM, signed 16-bit little-endian, mono, at `chunk.sample_rate`.

    A slice is yielded as soon as its last sample has arrived; the viewer hears the samples as they are. An odd byte at
    the end is ignored. A pipe that begins as an audio file does (WAV, MP3, WebM, ...) is decoded instead, and becomes
    mono at the same rate. Raises `UserError` if the pipe cannot be read, ends before the first sample, is a file
    without sound, or cannot be decoded.
    """

    channels = 1
    duration = None

    def __init__(self, file: BinaryIO, chunk: ChunkConfig) -> None:
        self.chunk, self.rate = chunk, chunk.sample_rate
        self._file = file

    def __iter__(self) -> Iterator[Slice]:
        size = 2 * self.chunk.slice_samples
        head = self._read(min(SNIFFED, size))
        if kind := soundless_kind(head):
            raise UserError(
                f"standard input is {kind}, not sound; pipe in a recording, or 16-bit little-endian mono PCM"
            )
        if head.startswith(BIG_ENDIAN_WAV):
            raise UserError("a big-endian WAV file on standard input cannot be read as a stream; name the file")
        if is_container(head):
            yield from self._decoded(head)
            return
        first = True
        while data := head + self._read(size - len(head)):
            speech = np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
            yield Slice(speech, speech[:, None])
            head, first = b"", False
        if first:
            raise UserError("no sound came on stdin; pipe in signed 16-bit little-endian mono PCM")

    def close(self) -> None:
        """Does nothing: the source did not open stdin."""

    def _decoded(self, head: bytes) -> Iterator[Slice]:
        if self._file.seekable():
            self._file.seek(-len(head), io.SEEK_CUR)
            head = b""
        try:
            decoder = FFmpegDecoder(self._file, "standard input", head)
        except UserError as error:
            if error.__cause__ is None:  # it was read, and holds no sound
                raise
            raise UserError("the recording on standard input cannot be read as a stream; name its file") from error
        yield from _slices(decoder.blocks(), decoder.rate, self.chunk, self.rate, self.channels)

    def _read(self, size: int) -> bytes:
        """The next `size` bytes, waiting for these but for no more; fewer at the end, whole samples only."""
        data = b""
        with telling_of_stdin():
            while len(data) < size and (more := self._file.read(size - len(data))):
                data += more
        return data[: len(data) // 2 * 2]


@contextmanager
def telling_of_stdin() -> Iterator[None]:
    """Raises `UserError` where standard input cannot be read, as where it is open for writing only."""
    try:
        yield
    except OSError as error:
        reason = f"standard input cannot be read ({error.strerror})"
        raise UserError(f"{reason}; pipe in signed 16-bit little-endian mono PCM") from error


def open_source(audio: str, chunk: ChunkConfig) -> Source:
    """Opens the source that the command-line value `audio` names: "-" is a stream on stdin, anything else is a file.

    Raises `UserError` for a file that cannot be used.
    """
    if audio != "-":
        return FileSource(audio, chunk)
    if sys.stdin is None:
        raise UserError("standard input is closed; pipe in signed 16-bit little-endian mono PCM")
    return StdinSource(sys.stdin.buffer, chunk)


def _slices(blocks: Iterable[Block], file_rate: int, chunk: ChunkConfig, rate: int, channels: int) -> Iterator[Slice]:
    """Cuts blocks of a recording at `file_rate` into slices whose sound has `rate` and one or two `channels`.

    A `UserError` of the blocks is raised after the slices before it.
    """
    size, factor = chunk.slice_samples, rate // chunk.sample_rate
    to_speech = soxr.ResampleStream(file_rate, chunk.sample_rate, 1)
    to_sound = soxr.ResampleStream(file_rate, rate, channels)
    to_mono = _Mono(file_rate)
    speech, sound = np.zeros(0, np.float32), np.zeros((0, channels), np.float32)
    came = given = 0  # samples of the recording, of speech
    last, failure, blocks = False, None, iter(blocks)
    while not last:
        try:
            block = next(blocks, None)
        except UserError as error:
            block, failure = None, error
        last = block is None
        if block is None:
            block = np.zeros((0, channels), np.float32)
        came += len(block)
        mono = to_mono(block)
        speech = np.concatenate([speech, to_speech.resample_chunk(mono, last)])
        heard = mono[:, None] if channels == 1 else block
        sound = np.concatenate([sound, to_sound.resample_chunk(heard, last)])
        if last:
            total = max(1, (2 * came * chunk.sample_rate + file_rate) // (2 * file_rate)) if came else 0
            speech, sound = _fitted(speech, total - given), _fitted(sound, (total - given) * factor)
        while len(speech) and (last or (len(speech) >= size and len(sound) >= size * factor)):
            yield Slice(speech[:size], sound[: size * factor].clip(-1, 1))
            given += size
            speech, sound = speech[size:], sound[size * factor :]
    if failure:
        raise failure


class _Mono:
    """The mean of the channels, but half the difference of two that cancelled each other out lately."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._powers = _Powers(rate)
        self._sums = self._differences = 0.0  # power, fading

    def __call__(self, block: Block) -> NDArray[np.float32]:
        kept = math.exp(-len(block) / (MEMORY * self._rate))
        sums, differences = self._powers(block)
        self._sums = kept * self._sums + sums
        self._differences = kept * self._differences + differences
        if self._sums < CANCELLED * self._differences:
            return (block[:, 0] - block[:, 1]) * np.float32(0.5)
        return block.mean(axis=1, dtype=np.float32)


class _Powers:
    """The power of the sum of two channels, and of their difference, for one block after the other.

    Hum is usually the same in both channels, and would hide that the voices cancel each other out, so it is filtered.
    """

    def __init__(self, rate: int) -> None:
        self._filter = butter(4, HUM, "highpass", fs=rate, output="sos")
        self._state: NDArray[np.float64] | None = None

    def __call__(self, block: Block) -> tuple[float, float]:
        if block.shape[1] == 1:
            return float((block.astype(np.float64) ** 2).sum()), 0.0
        if not len(block):
            return 0.0, 0.0
        left, right = block.T.astype(np.float64)
        both = np.stack([left + right, left - right])
        if self._state is None:  # as if the first sample had lasted forever, so that an offset does not click
            self._state = sosfilt_zi(self._filter)[:, None] * both[:, :1]
        both, self._state = sosfilt(self._filter, both, zi=self._state)
        sums, differences = (both**2).sum(axis=1)
        return float(sums), float(differences)


def _fitted(signal: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """`signal`, cut or zero-padded at its end to `length` samples; axis 0 is time."""
    missing = max(0, length - len(signal))
    return np.pad(signal[:length], [(0, missing)] + [(0, 0)] * (signal.ndim - 1))
