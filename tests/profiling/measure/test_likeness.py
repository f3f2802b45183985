"""PSNR of videos: by its formula, of the frames that are asked for, and mistakes in one line."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profiling.__main__ import main
from profiling.formats import load
from profiling.measure import likeness
from profiling.measure.likeness import EXAMPLES, MEASURE, psnr

LEVEL = {"fp32": 100, "bf16": 101, "fp8": 110, "int8": 100}  # what every byte of a precision's video is


class Fake:
    """A pipeline whose video has one level, in groups of four frames."""

    def __init__(self, level: int) -> None:
        self._level = level

    @classmethod
    def from_pretrained(cls, preset: str, *, device: str, precision: str) -> "Fake":
        assert (preset, device) == ("tiny", "cpu")
        return cls(LEVEL[precision])

    def __enter__(self) -> "Fake":
        return self

    def __exit__(self, *_: object) -> None: ...

    @contextmanager
    def stream(self, image: Path, audio: Path) -> Iterator[Any]:
        assert image.is_file()
        assert audio.is_file()
        yield ((np.full((4, 2, 2, 3), self._level, np.uint8), None) for _ in range(3))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(likeness, "TalkingHeadPipeline", Fake)
    monkeypatch.setattr(sys, "argv", ["profiling", "psnr", "--device", "cpu", *map(str, arguments)])
    return main()


def test_psnr_is_that_of_the_formula() -> None:
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[0, 0, 0, 0] = 255
    assert psnr(a, b) == pytest.approx(10 * math.log10(a.size))
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 5) == psnr(a + 5, a) == pytest.approx(20 * math.log10(51))


def test_only_the_frames_that_are_asked_for_count() -> None:
    pipeline: Any = Fake(7)
    assert likeness.first_frames(pipeline, 6).shape == (6, 2, 2, 3)
    assert likeness.first_frames(pipeline, 100).shape == (12, 2, 2, 3), "the video ends"
    assert EXAMPLES.is_dir()


def test_the_command_writes_a_row_for_each_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--out", tmp_path / "psnr.json", "--frames", 8) == 0
    assert MEASURE in capsys.readouterr().out
    found = load(tmp_path / "psnr.json")
    values = {row.setting: row.value for row in found.quality}
    assert values == {
        "bf16, 4 steps, 33 frames": pytest.approx(20 * math.log10(255)),
        "fp8, 4 steps, 33 frames": pytest.approx(20 * math.log10(25.5)),
        "int8, 4 steps, 33 frames": None,
    }
    assert found.notes == ("the first 8 frames of preset tiny",)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--preset", "flashtalk-14b"), "only tiny has weights in the package"),
        (("--precision", "fp4"), "--precision fp4: there is no such choice"),
    ],
)
def test_mistakes_take_one_line(
    arguments: tuple[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
