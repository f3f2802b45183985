"""Sinks, which frames and sound are written to: an MP4 file, a folder of PNG files, or raw pixels on stdout.

When `write` returns, the operating system has the frames: they survive if the process is killed, even by SIGKILL. Frame
k is shown at k / fps seconds and sample j is heard at j / rate, whatever the sizes of the writes.
"""

import io
import struct
from abc import ABC, abstractmethod
from fractions import Fraction
from io import FileIO, RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from model.errors import UserError
from model.files import check_replaceable, replacing
from streaming.mp4 import Fragments, set_colors, to_yuv

_KINDS = "NAME.mp4 for a video, FOLDER/ for PNG files, or - for raw RGB frames on stdout"

_DELAY = 1024  # samples by which the AAC encoder's first packet comes before the first sample
_LAYOUTS = {1: "mono", 2: "stereo"}
_WAV_HEADER = 44  # bytes


class Sink(ABC):
    """Takes frames and their sound in order; a context manager that closes it, whether or not an exception came.

    Closed after at least one frame, the output is whole and playable; after none, nothing is left behind.
    """

    def __init__(self, width: int, height: int, channels: int) -> None:
        if channels not in _LAYOUTS:
            raise ValueError(f"channels: {channels}, wanted 1 or 2")
        self._wanted = {"frames": ("uint8", (height, width, 3)), "sound": ("float32", (channels,))}
        self.frames = 0  # taken so far

    def write(self, frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> None:
        """Appends frames uint8 [n, height, width, 3], RGB, and sound float32 [m, channels] at `rate` in [-1, 1].

        Either may be empty. Raises `ValueError` for other shapes or dtypes and `UserError` if the output cannot take
        them (disk full, reader gone); then everything written before is still there, and the sink takes no more.
        """
        for name, array in (("frames", frames), ("sound", sound)):
            dtype, shape = self._wanted[name]
            if array.dtype != dtype or array.shape[1:] != shape:
                wanted = f"{dtype} of shape (any, {', '.join(map(str, shape))})"
                raise ValueError(f"{name}: {array.dtype} of shape {array.shape}, wanted {wanted}")
        self._write(frames, sound)
        self.frames += len(frames)

    @abstractmethod
    def _write(self, frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Finishes the output. Raises `UserError` if that fails; the frames are still there, where the error says."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Mp4Sink(Sink):
    """H.264 (BT.709, limited range, 4:2:0) and AAC in an MP4 that can be played while it loads.

    Until the sink is closed, the frames are in `NAME.part.mp4` beside the target, a fragmented MP4. Every `write` adds
    one complete fragment, so the file is playable at any time, even if the process is killed. Its sound then lacks up
    to the last 3071 samples (64 ms at 48 kHz), which the encoder still holds. Closing copies the packets into an
    ordinary MP4 under a temporary name and renames that to the target.

    The AAC encoder's first packet holds 1024 samples of silence, which an edit list of the finished file skips. A
    fragmented file has none, so there both streams begin that much later instead.

    Equal calls give equal bytes: x264 runs on one thread, and nothing records the time.
    """

    def __init__(self, path: Path, width: int, height: int, fps: int, rate: int, channels: int) -> None:
        super().__init__(width, height, channels)
        if width % 2 or height % 2:
            raise ValueError(f"width, height: {width} x {height}, wanted even numbers (4:2:0 halves both)")
        if rate % fps:
            raise ValueError(f"fps: {fps}, wanted a divisor of the sound's {rate} Hz")
        self._path, self._layout = path, _LAYOUTS[channels]
        self._rate, self._tick = rate, Fraction(1, rate)  # the unit of all times is one sample
        self._period = rate // fps  # ticks from frame to frame
        self._samples = self._size = 0
        self._torn = False  # a write was interrupted, so that the encoders are ahead of the file
        self._full = False  # the part file cannot grow any more
        self._reformatter = VideoReformatter()
        self._encoder, self._video, self._audio = _encoders(width, height, fps, rate, channels)
        self._fragments = Fragments((self._video, self._audio))
        self._part = path.with_name(path.stem + ".part.mp4")
        try:
            if path.is_dir():
                raise UserError(f"{str(path)!r} is a directory; name a file, or end it in / for a folder of PNG files")
            check_replaceable(path)  # a link may lead elsewhere than to the folder of the part file
            self._file = self._part.open("xb", buffering=0)
        except FileExistsError as error:
            raise UserError(f"{str(self._part)!r} holds the frames of another run; move or delete it first") from error
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be written ({error.strerror}); name another place") from error
        try:
            self._append(self._fragments.header)
        except UserError:
            self.close()
            raise

    def _write(self, frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> None:
        self._torn = True
        packets: list[Packet] = []
        for index, pixels in enumerate(frames, self.frames):
            frame = to_yuv(self._reformatter, pixels)
            frame.pts, frame.duration, frame.time_base = _DELAY + index * self._period, self._period, self._tick
            packets += self._video.encode(frame)
        if len(sound):
            heard = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.T), format="fltp", layout=self._layout)
            heard.sample_rate, heard.pts, heard.time_base = self._rate, _DELAY + self._samples, self._tick
            packets += self._audio.encode(heard)
            self._samples += len(sound)
        self._append(self._fragments.pack(packets))
        self._torn = False

    def close(self) -> None:
        """Turns the part file into the target. Raises `UserError`, leaving the part file, if there is no room."""
        if self._file.closed:
            return
        try:
            with self._file:
                if self.frames and not self._torn:
                    rest = [*self._video.encode(None), *self._audio.encode(None)]
                    self._append(self._fragments.pack(rest))
            if self.frames and not self._full:
                with replacing(self._path) as temporary:
                    _remux(self._part, temporary)
        except UserError:
            raise
        except Exception as error:  # whatever FFmpeg says at the end of a long run, the part file has the frames
            raise self._failure(error) from error
        if not (self.frames and self._full):
            self._part.unlink()

    def _append(self, data: bytes) -> None:
        """Adds `data` to the part file as a whole or, raising, not at all."""
        self._file.seek(self._size)
        try:
            _write_all(self._file, data)
        except BaseException as error:
            self._file.truncate(self._size)
            if isinstance(error, OSError):
                self._full = True
                raise self._failure(error) from error
            raise
        self._size += len(data)

    def _failure(self, error: Exception) -> UserError:
        rest = (
            f"the {self.frames} frames made so far are in {str(self._part)!r}" if self.frames else "name another place"
        )
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        return UserError(f"{str(self._path)!r} cannot be written ({reason}); {rest}")


class FolderSink(Sink):
    """Frames as 000000.png, 000001.png, ... and the sound as sound.wav (16 bit), all whole after every `write`."""

    def __init__(self, path: Path, width: int, height: int, rate: int, channels: int) -> None:
        super().__init__(width, height, channels)
        self._path = path
        self._rate, self._channels = rate, channels
        self._sound = path / "sound.wav"
        self._size = 0  # bytes of samples
        try:
            self._made = not path.exists()
            if not self._made and not path.is_dir():
                raise UserError(f"{str(path)!r} exists and is no folder; give {_KINDS}")
            path.mkdir(exist_ok=True)
            if any(path.iterdir()):
                raise UserError(f"{str(path)!r} is not empty; name a new folder")
            self._file = self._sound.open("xb", buffering=0)
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be written ({error.strerror}); name another place") from error

    def _write(self, frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> None:
        samples = np.rint(np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes()
        size = self._size + len(samples)
        try:
            self._file.seek(_WAV_HEADER + self._size)
            _write_all(self._file, samples)
            self._file.seek(0)
            _write_all(self._file, _wav_header(self._rate, self._channels, size))
            self._size = size
            for index, pixels in enumerate(frames, self.frames):
                with replacing(self._path / f"{index:06d}.png") as temporary:
                    Image.fromarray(pixels).save(temporary, "PNG", compress_level=1)
        except OSError as error:
            raise UserError(
                f"{str(self._path)!r} takes no more ({error.strerror}); it keeps the frames so far"
            ) from error

    def close(self) -> None:
        """Closes sound.wav; without a frame, removes it, and the folder if it was made here."""
        if self._file.closed:
            return
        self._file.close()
        if not any(self._path.glob("*.png")):
            self._sound.unlink()
            if self._made:
                self._path.rmdir()


class StdoutSink(Sink):
    """Raw RGB24 pixels, frame after frame, on a binary stream. The sound is dropped."""

    def __init__(self, file: RawIOBase, width: int, height: int, channels: int) -> None:
        super().__init__(width, height, channels)
        self._file = file

    def _write(self, frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> None:  # noqa: ARG002
        try:
            _write_all(self._file, np.ascontiguousarray(frames).data.cast("B"))
        except OSError as error:
            reason = f"stdout takes no more after {self.frames} frames ({error.strerror})"
            raise UserError(f"{reason}; keep its reader running") from error

    def close(self) -> None:
        """Does nothing: the sink did not open stdout."""


def open_sink(out: str, width: int, height: int, fps: int, rate: int, channels: int) -> Sink:
    """Opens the sink that the command-line value `out` names.

    NAME.mp4 is a video (`Mp4Sink`). A path that ends in / or has no suffix is a folder of PNG files (`FolderSink`). "-"
    is raw pixels on stdout (`StdoutSink`). Frames are `width` x `height` pixels at `fps` frames a second; the sound has
    `rate` samples a second and 1 or 2 `channels`. Raises `UserError` for another suffix, or a place that cannot be
    written.
    """
    path = Path(out)
    if out == "-":
        return StdoutSink(FileIO(1, "wb", closefd=False), width, height, channels)
    if out.endswith("/") or (path.name and "." not in path.name):
        return FolderSink(path, width, height, rate, channels)
    if path.suffix.lower() == ".mp4":
        return Mp4Sink(path, width, height, fps, rate, channels)
    raise UserError(f"{out!r} is no known kind of output; give {_KINDS}")


def _wav_header(rate: int, channels: int, size: int) -> bytes:
    """The header of `size` bytes of 16-bit samples; beyond 4 GiB the largest length, read as "up to the end"."""
    limit = 2**32 - 1
    riff = struct.pack("<4sI4s", b"RIFF", min(_WAV_HEADER - 8 + size, limit), b"WAVE")
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, 2 * channels * rate, 2 * channels, 16)
    return riff + form + struct.pack("<4sI", b"data", min(size, limit))


def _write_all(file: RawIOBase, data: bytes | memoryview) -> None:
    """Writes all of `data`, of which one system call may take only a part."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _encoders(
    width: int, height: int, fps: int, rate: int, channels: int
) -> tuple[OutputContainer, VideoStream, AudioStream]:
    """The H.264 and AAC encoders, opened, and the container that owns them and is otherwise unused."""
    owner = av.open(io.BytesIO(), "w", format="mp4")
    options = {"crf": "18", "preset": "veryfast", "tune": "zerolatency", "threads": "1"}
    video = owner.add_stream("libx264", rate=fps, options=options)
    video.width, video.height = width, height
    set_colors(video)
    context = video.codec_context
    context.time_base, context.gop_size = Fraction(1, rate), 2 * fps
    audio = owner.add_stream("aac", rate=rate, layout=_LAYOUTS[channels], bit_rate=128_000 * channels)
    owner.start_encoding()
    return owner, video, audio


def _remux(part: Path, target: Path) -> None:
    """Copies the packets of a part file into an ordinary MP4 with its index in front, both streams `_DELAY` earlier."""
    # FFmpeg would take what stands before a colon in a bare name for a protocol.
    with (
        av.open(f"file:{part}") as source,
        av.open(f"file:{target}", "w", format="mp4", options={"movflags": "faststart"}) as output,
    ):
        streams = [output.add_stream_from_template(stream) for stream in source.streams]
        for packet in source.demux():
            if packet.pts is not None and packet.dts is not None:  # not the end mark
                packet.pts, packet.dts = packet.pts - _DELAY, packet.dts - _DELAY
                packet.stream = streams[packet.stream_index]
                output.mux(packet)
