"""Command lines print to terminals of every character set."""

import io
import signal
import sys

import pytest

from model.command import spell_what_cannot_be_printed
from profiling import __main__ as profiling


@pytest.mark.parametrize(
    ("charset", "wanted"),
    [
        ("ascii", "<= 5 us +-2% ?? ?"),
        ("latin-1", "<= 5 µs ±2% ?? ?"),
        ("cp437", "≤ 5 µs ±2% ?? ?"),
        ("utf-8", "≤ 5 µs ±2% 中文 ?"),
    ],
)
def test_what_a_character_set_lacks_is_spelled(charset: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last character is a byte of a file's name that is no text."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, charset))
    spell_what_cannot_be_printed()
    print("≤ 5 µs ±2% 中文 \udcff", end="", flush=True)
    assert printed.getvalue().decode(charset) == wanted


@pytest.mark.parametrize("charset", ["ascii", "latin-1", "cp437"])
def test_tables_on_terminals_of_other_character_sets(charset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, charset))
    monkeypatch.setattr(sys, "argv", ["profiling", "targets"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the command line's handlers are not for tests
    assert profiling.main() in (0, 1)
    sys.stdout.flush()
    text = printed.getvalue().decode(charset)
    assert "≥" in text if charset == "cp437" else ">=" in text
