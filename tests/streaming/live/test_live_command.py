"""`python -m streaming live`: a pipe becomes a video, mistakes end in one line, and a snapshot goes on."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from model.config import PRESETS
from tests.streaming import command
from tests.streaming.live.stage import LETTERS, tone


@pytest.fixture(autouse=True)
def _small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, LETTERS.name, LETTERS)


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, pcm: bytes, *options: object) -> int:
    portrait = folder / "portrait.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)).save(portrait)
    arguments = ("--preset", "letters", "--random-weights", "--device", "cpu", "--steps", "1", "--image", portrait)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pcm)))
    return command.call(monkeypatch, "live", *arguments, *options)


def test_a_pipe_becomes_a_video_and_a_snapshot_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pcm = (tone(12) * 32767).astype("<i2").tobytes()
    saved, report = tmp_path / "session", tmp_path / "report.json"
    options = ("--snapshots", saved, "--report", report)
    assert call(monkeypatch, tmp_path, pcm, "--out", tmp_path / "one.mp4", *options) == 0
    told = capsys.readouterr().err
    assert "playback_started segment 0, index" in told
    assert "playback_finished segment 0, position 0.48, interrupted False" in told
    first = json.loads(report.read_text())
    assert first["first_frame"] == 0
    assert first["session"]["moments"] >= 12
    with av.open(str(tmp_path / "one.mp4")) as video:
        assert video.streams.video[0].frames == first["session"]["moments"]
        assert video.streams.audio[0].rate == 48_000
    options = ("--resume", saved, "--report", report, "--quiet")
    assert call(monkeypatch, tmp_path, pcm, "--out", tmp_path / "two.mp4", *options) == 0
    again = json.loads(report.read_text())
    assert 0 < again["first_frame"] <= first["session"]["moments"]
    assert "playback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pcm", "options", "problem"),
    [
        (b"12", ("--audio", "voice.wav"), "--audio voice.wav: a live session hears standard input"),
        (b"12", ("--lag", "drop"), "lag drop: only a microphone's sound may be dropped"),
        (b"12", ("--kind", "film"), "kind film"),
        (b"12", ("--resume", "nothing"), "nothing cannot be read"),
        (b"12", ("--rate", "3"), "--rate 3: name 1000 to 768000 samples a second"),
        (b"", (), "no sound came on stdin"),
    ],
)
def test_a_mistake_ends_in_one_line(
    pcm: bytes,
    options: tuple[str, ...],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, tmp_path, pcm, "--out", tmp_path / "talk.mp4", "--quiet", *options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert problem in errors[0]
    assert not (tmp_path / "talk.mp4").exists()
