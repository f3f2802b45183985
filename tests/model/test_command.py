"""Command lines print to terminals of every character set."""

import io
import signal
import sys
from pathlib import Path

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


GOALS = """
[[target]]
name = "at least"
cases = ["chunk_attention/14b-w1/bf16"]
tflops = 620

[[target]]
name = "at most"
cases = ["text_image_attention/14b-w1-prompt/bf16"]
seconds = 0.00014
"""


@pytest.mark.parametrize("charset", ["ascii", "latin-1", "cp437"])
def test_tables_on_terminals_of_other_character_sets(
    charset: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    goals = tmp_path / "goals.toml"
    goals.write_text(GOALS)
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, charset))
    monkeypatch.setattr(sys, "argv", ["profiling", "targets", "--file", str(goals)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the command line's handlers are not for tests
    assert profiling.main() in (0, 1)
    sys.stdout.flush()
    text = printed.getvalue().decode(charset)
    at_least, at_most = ("≥", "≤") if charset == "cp437" else (">=", "<=")
    assert f"{at_least} 620 TFLOP/s" in text
    assert f"{at_most} 140 {'us' if charset == 'ascii' else 'µs'}" in text
