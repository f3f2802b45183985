"""A session that hears a pipe: raw samples in, moments to a sink, against the wall clock."""

import threading
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError
from streaming.live.session import LiveSession
from streaming.live.states import State
from streaming.live.timeline import Moment
from streaming.sinks import Sink
from streaming.sources import telling_of_stdin

PIECE = 0.02  # seconds of sound that are read at a time, at most


class Pipe(Protocol):
    """What bytes are read from, as `sys.stdin.buffer` is."""

    def read1(self, size: int, /) -> bytes:
        """At most so many bytes, those that are there if there are any; none at the end."""
        ...


class PipeReader:
    """Pushes signed 16-bit little-endian mono samples from a pipe into a session, in a thread of its own.

    While the session's queue is full nothing is read, so whoever writes into the pipe waits.

    Attributes:
        samples: that were pushed.
        ended: whether the pipe has ended, or the session was closed.
        failure: what ended the reading early.
    """

    def __init__(self, session: LiveSession, pipe: Pipe, rate: int) -> None:
        self.samples, self.ended = 0, False
        self.failure: BaseException | None = None
        self._session, self._pipe, self._rate = session, pipe, rate
        threading.Thread(target=self._read, name="pipe", daemon=True).start()  # it may wait for the pipe for ever

    def _read(self) -> None:
        try:
            for piece in _pieces(self._pipe, max(1, round(PIECE * self._rate))):
                self.samples += self._session.push_audio(piece, self._rate)
            self._session.end_segment()
        except BaseException as error:  # whoever takes moments tells it
            self.failure = error
        self.ended = True


def _pieces(pipe: Pipe, size: int) -> Iterator[NDArray[np.int16]]:
    """Samples as they come, at most so many at a time; an odd byte at the end is ignored."""
    rest = b""
    while data := _read(pipe, 2 * size):
        data = rest + data
        rest = data[len(data) // 2 * 2 :]
        if samples := data[: len(data) // 2 * 2]:
            yield np.frombuffer(samples, "<i2")


def _read(pipe: Pipe, size: int) -> bytes:
    with telling_of_stdin():
        return pipe.read1(size)


def moments_of_pipe(session: LiveSession, pipe: Pipe, rate: int, sink: Sink) -> Iterator[Moment]:
    """Writes the session's moments into the sink, until the pipe has ended and everything was said; yields each.

    Raises `UserError` if the pipe cannot be read or ends before the first sample, or if the sink takes no more.
    """
    resumed = session.state != State.IDLE  # it has something to say as it is
    reader = PipeReader(session, pipe, rate)
    for moment in session.moments():
        if reader.ended and not (reader.samples or reader.failure or resumed):
            raise UserError("no sound came on stdin; pipe in signed 16-bit little-endian mono PCM")
        sink.write(moment.rgb[None], moment.sound[:, None])
        yield moment
        if reader.failure:
            raise reader.failure
        if reader.ended and session.state == State.IDLE:
            return
