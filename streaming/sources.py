"""Sources of the voice: an audio file, or raw samples on stdin, cut into one slice of sound per chunk of video.

A slice holds the same stretch of time twice: for the speech encoder (mono, 16 kHz), and for the viewer (one or two
channels, at the source's `rate`). The viewer's sample `rate / sample_rate * j` is the encoder's sample `j`.
"""

import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from model.config import ChunkConfig
from model.errors import UserError

SOUND_RATE = 48_000  # Hz, of the sound that the viewer of a file hears
LOUDEST = 100  # in units of full scale; a file with larger samples does not hold sound in [-1, 1]
FILE_RATES = range(1_000, 768_001)  # Hz, that files may have
_BLOCK = 1 << 12  # frames of a file decoded at once: its memory, however long the file


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
    """

    channels: int
    rate: int
    duration: float | None

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
    """An audio file: anything libsndfile reads (WAV, FLAC, OGG, MP3, ...), 1 to 768 kHz, any number of channels.

    The speech is the mean of all channels. The sound keeps one or two channels as they are; more than two become their
    mean. n samples at r Hz become max(1, floor(n * sample_rate / r + 1/2)) samples of speech, and three times that
    number of sound. At the very end, resampled samples beyond these numbers are cut, and missing ones are zero.

    Construction reads the whole file once, so that its faults are known before anything is generated. Raises
    `UserError` if the file is missing, is not readable audio, is empty, or holds samples that are not finite. Iteration
    raises it too, after the slices that could be read, if the file has become unreadable since.
    """

    def __init__(self, audio: str, chunk: ChunkConfig) -> None:
        self._factor, rest = divmod(SOUND_RATE, chunk.sample_rate)
        if rest:
            raise ValueError(f"chunk.sample_rate: {chunk.sample_rate} Hz, wanted a divisor of {SOUND_RATE}")
        self.chunk, self.rate = chunk, SOUND_RATE
        self._name = repr(audio)
        self._file = _open_audio(audio)
        self._samples = 0  # at least
        try:
            self._samples = self._validated_length()
        except BaseException:
            self.close()
            raise
        self.channels = 2 if self._file.channels == 2 else 1
        self.duration = self._samples / self._file.samplerate

    def __iter__(self) -> Iterator[Slice]:
        size, rate = self.chunk.slice_samples, self._file.samplerate
        to_speech = soxr.ResampleStream(rate, self.chunk.sample_rate, 1)
        to_sound = soxr.ResampleStream(rate, SOUND_RATE, self.channels)
        speech = np.zeros(0, np.float32)
        sound = np.zeros((0, self.channels), np.float32)
        came = given = 0  # samples of the file, of speech
        last, failure = False, None
        while not last:
            try:
                block = self._read(came)
            except UserError as error:
                block, failure = np.zeros((0, self._file.channels), np.float32), error
            came += len(block)
            last = len(block) == 0
            mono = block.mean(axis=1)
            heard = block if self.channels == block.shape[1] else mono[:, None]
            speech = np.concatenate([speech, to_speech.resample_chunk(mono, last)])
            sound = np.concatenate([sound, to_sound.resample_chunk(heard, last)])
            if last:
                total = max(1, (2 * came * self.chunk.sample_rate + rate) // (2 * rate)) if came else 0
                speech = _fitted(speech, total - given)
                sound = _fitted(sound, (total - given) * self._factor)
            while len(speech) and (last or (len(speech) >= size and len(sound) >= size * self._factor)):
                yield Slice(speech[:size], sound[: size * self._factor].clip(-1, 1))
                given += size
                speech, sound = speech[size:], sound[size * self._factor :]
        if failure:
            raise failure

    def close(self) -> None:
        """Closes the file; nothing can be read afterwards."""
        self._file.close()

    def _read(self, position: int) -> NDArray[np.float32]:
        """The next block of the file, [sample, channel]; empty at its end. Raises `UserError` where it is damaged."""
        block = None
        with suppress(soundfile.LibsndfileError):
            if position == 0:
                self._file.seek(0)
            block = self._file.read(_BLOCK, dtype="float32", always_2d=True).astype(np.float32, copy=False)
        if block is None or (len(block) == 0 and position < self._samples):
            second = position / self._file.samplerate
            raise UserError(f"{self._name} cannot be read any further than {second:.2f} s; give an intact file")
        return block

    def _validated_length(self) -> int:
        """Samples in the file, all of which were read and are finite."""
        rate = self._file.samplerate
        if rate not in FILE_RATES:
            raise UserError(f"{self._name} has {rate} samples a second; give audio of 1 kHz to 768 kHz")
        length = 0
        while len(block := self._read(length)):
            finite = np.isfinite(block).all(axis=1)
            if np.abs(block[finite]).max(initial=0) > LOUDEST:
                raise UserError(f"{self._name} is over {LOUDEST} times as loud as full scale; scale it to [-1, 1]")
            if not finite.all():
                second = (length + int(finite.argmin())) / rate
                raise UserError(f"{self._name} holds a sample that is no finite number at {second:.3f} s; repair it")
            length += len(block)
        if not length:
            raise UserError(f"{self._name} holds no sound; give a recording of at least one sample")
        return length


class StdinSource(Source):
    """Raw PCM, signed 16-bit little-endian, mono, at `chunk.sample_rate`, on a pipe that ends whenever it likes.

    A slice is yielded as soon as its last sample has arrived; the viewer hears the samples as they are. An odd byte at
    the end is ignored. Raises `UserError` if the pipe ends before the first sample.
    """

    channels = 1
    duration = None

    def __init__(self, file: BinaryIO, chunk: ChunkConfig) -> None:
        self.chunk, self.rate = chunk, chunk.sample_rate
        self._file = file

    def __iter__(self) -> Iterator[Slice]:
        first = True
        while data := self._read(2 * self.chunk.slice_samples):
            speech = np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
            yield Slice(speech, speech[:, None])
            first = False
        if first:
            raise UserError("no sound came on stdin; pipe in signed 16-bit little-endian mono PCM")

    def close(self) -> None:
        """Does nothing: the source did not open stdin."""

    def _read(self, size: int) -> bytes:
        """The next `size` bytes, waiting for these but for no more; fewer at the end, whole samples only."""
        data = b""
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        return data[: len(data) // 2 * 2]


def open_source(audio: str, chunk: ChunkConfig) -> Source:
    """Opens the source that the command-line value `audio` names: "-" is raw PCM on stdin, anything else is a file.

    Raises `UserError` for a file that cannot be used.
    """
    if audio != "-":
        return FileSource(audio, chunk)
    if sys.stdin is None:
        raise UserError("standard input is closed; pipe in signed 16-bit little-endian mono PCM")
    return StdinSource(sys.stdin.buffer, chunk)


class _SequentialFile(soundfile.SoundFile):
    """A file that is read from front to back. soundfile would seek after every read, and seeks in MP3 are inexact."""

    def seekable(self) -> bool:
        return False


def _open_audio(audio: str) -> soundfile.SoundFile:
    try:
        if not stat.S_ISREG(Path(audio).stat().st_mode):
            raise UserError(f"{audio!r} is not a file; name an audio file, or '-' for raw PCM on stdin")
        with Path(audio).open("rb"):  # libsndfile would not say why a file cannot be opened
            pass
    except OSError as error:
        raise UserError(f"{audio!r} cannot be read ({error.strerror}); name an audio file") from error
    try:
        return _SequentialFile(audio)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: headerless, by its suffix
        raise UserError(f"{audio!r} is not audio in a known format; give WAV, FLAC, OGG or MP3") from error


def _fitted(signal: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """`signal`, cut or zero-padded at its end to `length` samples; axis 0 is time."""
    missing = max(0, length - len(signal))
    return np.pad(signal[:length], [(0, missing)] + [(0, 0)] * (signal.ndim - 1))
