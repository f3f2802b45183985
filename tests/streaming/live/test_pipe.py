"""A session that hears a pipe: everything is said, and the pipe's faults are told."""

import io
import os
from pathlib import Path

import numpy as np
import pytest

from model.errors import UserError
from streaming.live.pipe import moments_of_pipe
from tests.streaming.live.stage import tone
from tests.streaming.live.test_session import session
from tests.streaming.test_session import Kept


class Pipe(io.BytesIO):
    """Gives what it has in odd pieces, and waits for nobody."""

    def read1(self, size: int | None = -1, /) -> bytes:  # noqa: ARG002
        return super().read1(333)


def sink() -> Kept:
    kept = Kept(1)
    kept._wanted["frames"] = ("uint8", (1, 4, 3))
    kept.factor = 3  # 48 kHz
    return kept


def test_everything_that_comes_is_said() -> None:
    pcm = (tone(70) * 32767).astype("<i2")
    written = sink()
    with session() as live:
        moments = list(moments_of_pipe(live, Pipe(pcm.tobytes() + b"x"), 16000, written))
    assert sum(m.segment == 0 for m in moments) == 70
    assert len(written.pictures) == len(moments)
    assert sum(map(len, written.sounds)) == 1920 * len(moments)
    heard = np.concatenate([m.sound[::3] for m in moments if m.segment == 0])
    assert np.abs(heard).mean() == pytest.approx(np.abs(tone(70)).mean(), abs=0.01)


def test_a_pipe_that_is_not_open_for_reading_is_told(tmp_path: Path) -> None:
    file = os.fdopen(os.open(tmp_path / "written", os.O_WRONLY | os.O_CREAT), "rb")
    with file, session() as live, pytest.raises(UserError, match=r"cannot be read \(Bad file descriptor\); pipe in"):
        list(moments_of_pipe(live, file, 16000, sink()))


def test_an_empty_pipe_and_a_wrong_rate_are_told() -> None:
    with session() as live, pytest.raises(UserError, match="no sound came on stdin"):
        list(moments_of_pipe(live, Pipe(b""), 16000, sink()))
    with session() as live, pytest.raises(ValueError, match=r"^rate: got 3"):
        list(moments_of_pipe(live, Pipe(b"1234"), 3, sink()))
