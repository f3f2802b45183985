"""What a run shows: nothing, a line a chunk, or on a terminal a line in place with a bar and the time left."""

import io
import sys

import pytest

from streaming.progress import line, progress_line, stage
from streaming.timers import StageTimer
from streaming.writer import Progress

SOME = Progress(chunks=3, frames=84, startup=0.5, fps=28.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_says_what_is_known() -> None:
    assert line(Progress(), "audio", 25, None) == "chunk 0  0 frames  0.00 s  audio"
    assert line(SOME, "decode", 25, 5.0) == "chunk 3  84 frames  3.36 of 5.00 s  28.0 FPS  startup 0.50 s  decode"


@pytest.mark.parametrize(("duration", "left"), [(14.56, "0:10"), (3600.0, "53:31"), (7200.0, "1:47:06")])
def test_the_time_left_of_a_long_sound(duration: float, left: str) -> None:
    assert f"  {left} left  " in line(SOME, "decode", 25, duration)


def test_a_line_for_every_chunk_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", errors := io.StringIO())
    with stage("loading"), progress_line(StageTimer.__new__(StageTimer), 25, 5.0, quiet=True) as note:
        note(SOME)
    assert errors.getvalue() == ""
    timer = StageTimer.__new__(StageTimer)
    timer.current = "motion"
    with stage("loading"), progress_line(timer, 25, 5.0) as note:
        for chunks, frames in ((0, 1), (1, 28), (1, 29), (2, 56)):
            note(Progress(chunks, frames))
    lines = errors.getvalue().splitlines()
    assert [text.split("  ")[0] for text in lines] == ["chunk 1", "chunk 2"]


def test_a_terminal_gets_a_bar_for_a_long_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    timer = StageTimer.__new__(StageTimer)
    timer.current = "decode"
    for duration, bar in ((5.0, False), (30.0, True)):
        monkeypatch.setattr(sys, "stderr", errors := Terminal())
        with progress_line(timer, 25, duration) as note:
            note(SOME)
        assert "84 frames" in errors.getvalue()
        assert ("━" in errors.getvalue()) == bar
    monkeypatch.setattr(sys, "stderr", errors := Terminal())
    with stage("loading the models", quiet=True):
        pass
    assert errors.getvalue() == ""
