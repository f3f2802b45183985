"""What has happened to a session since its last snapshot: sound that came, moments that were handed over.

A snapshot is written for every chunk, and a process may be killed at any moment. What happens in between is written
into a small file beside the snapshot, a *journal*, before anybody sees its effect. A snapshot names the journal that
follows it, which is a new file, so that a kill between the two loses nothing: all journals from that one on are read.

The operating system keeps what was written if the process is killed, not if the machine loses power.
"""

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streaming.live.director import Director

_RECORD = struct.Struct("<BBBxIqQ")  # kind, dtype, channels, rate, number, bytes that follow
_SOUND, _END, _TAKEN, _INTERRUPT = range(1, 5)
_DTYPES = ("<i2", "<f2", "<f4", "<f8")
_ANY = -1  # segment None


@dataclass(frozen=True, eq=False)
class Sound:
    """Samples that were taken for a segment."""

    pcm: NDArray
    rate: int
    segment: int | None


@dataclass(frozen=True)
class End:
    """The segment that was arriving was ended."""


@dataclass(frozen=True)
class Taken:
    """Moments were handed over; `shown` is the next one."""

    shown: int


@dataclass(frozen=True)
class Interrupt:
    """Speech was stopped before moment `shown`."""

    shown: int


Record = Sound | End | Taken | Interrupt


class Journal:
    """The journals beside a snapshot at `path`. Not for several threads at once."""

    def __init__(self, path: Path) -> None:
        """Writes nothing before the first `rotate`."""
        self._path, self._file = path, None
        self._number = self._oldest = 0  # of the files that there are

    _file: FileIO | None

    def rotate(self) -> int:
        """Begins a new file, whose number a snapshot of this moment has to name."""
        self.close()
        if not self._number and (there := _numbers(self._path)):  # later ones are all this journal's
            self._oldest, self._number = min(there), max(there)
        self._number += 1
        self._file = FileIO(_name(self._path, self._number), "x")
        return self._number

    def forget(self, number: int) -> None:
        """Removes the files before this one, once no snapshot names them any more."""
        for old in range(self._oldest, number):
            with suppress(OSError):
                _name(self._path, old).unlink()
        self._oldest = number

    def note(self, record: Record) -> None:
        """Writes what has happened. Raises `OSError` if it cannot be written."""
        match record:
            case Sound():
                pcm = np.ascontiguousarray(record.pcm)
                dtype = _DTYPES.index(pcm.dtype.newbyteorder("<").str)
                channels = 0 if pcm.ndim == 1 else pcm.shape[1]
                segment = _ANY if record.segment is None else record.segment
                self._write(_SOUND, dtype, channels, record.rate, segment, pcm.astype(_DTYPES[dtype]).tobytes())
            case End():
                self._write(_END)
            case Taken():
                self._write(_TAKEN, number=record.shown)
            case Interrupt():
                self._write(_INTERRUPT, number=record.shown)

    def _write(
        self, kind: int, dtype: int = 0, channels: int = 0, rate: int = 0, number: int = 0, body: bytes = b""
    ) -> None:
        if self._file is None:
            return
        data = _RECORD.pack(kind, dtype, channels, rate, number, len(body)) + body
        if self._file.write(data) < len(data):  # which is all that a full disk says
            self.close()  # nothing may follow the part that was written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
        self._file = None


def records(path: Path, number: int | None) -> Iterator[Record]:
    """What happened after the snapshot at `path`, which names journal `number`; a last record that is cut is left out.

    Nothing for None, or if the files were not kept.
    """
    while number is not None:
        try:
            data = memoryview(_name(path, number).read_bytes())
        except OSError:
            return
        yield from _parsed(data)
        number += 1


def _parsed(data: memoryview) -> Iterator[Record]:
    while len(data) >= _RECORD.size:
        kind, dtype, channels, rate, number, size = _RECORD.unpack_from(data)
        body, data = data[_RECORD.size : _RECORD.size + size], data[_RECORD.size + size :]
        if len(body) < size:
            return
        if kind == _SOUND:
            pcm = np.frombuffer(body, _DTYPES[dtype])
            yield Sound(pcm.reshape(-1, channels) if channels else pcm, rate, None if number == _ANY else number)
        elif kind == _END:
            yield End()
        elif kind == _TAKEN:
            yield Taken(number)
        elif kind == _INTERRUPT:
            yield Interrupt(number)
        else:
            return


def replay(director: Director, happened: Iterable[Record], position: int | None, now: float) -> None:
    """Brings a restored session to where it was: what came since is said, what was handed over is not shown again.

    With a `position`, moments from that one on are shown again if they can be made again: those since the snapshot and
    since the last interruption. Nothing is told of it: it has been told.
    """
    for record in happened:
        match record:
            case Sound():
                director.push(record.pcm, record.rate, record.segment, now)
            case End():
                director.end()
            case Taken():
                director.skip_to(record.shown if position is None else min(record.shown, position), now)
            case Interrupt():
                director.skip_to(record.shown, now)
                director.interrupt(now)
    director.playback.events.clear()


def _name(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.journal-{number}")


def _numbers(path: Path) -> list[int]:
    """The numbers of the journals that there are."""
    ends = (file.name.rpartition("-")[2] for file in path.parent.glob(f"{path.name}.journal-*"))
    return [int(end) for end in ends if end.isdecimal()]
