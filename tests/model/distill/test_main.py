"""The command line: clips with their truth, every stage end to end, and mistakes in one line."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from model.command import run_app
from model.distill.__main__ import app
from model.distill.face import MOTION
from model.distill.student_network import load_network
from tests.model.distill.conditions import needs_espeak
from tests.processes import Interpreter


@needs_espeak
def test_data_writes_clips_with_their_truth(python: Interpreter, tmp_path):
    done = python.run(
        "-m", "model.distill", "data", "--clips", 2, "--frames", 10, "--size", 64, "--out", tmp_path, "--seed", 3
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["0003-00000", "0003-00001"]
    folder = tmp_path / "0003-00000"
    assert sorted(p.name for p in folder.iterdir()) == ["portrait.png", "truth.npz", "video.mp4", "voice.wav"]
    assert Image.open(folder / "portrait.png").size == (64, 64)
    assert np.load(folder / "truth.npz")["motion"].shape == (10, len(MOTION))


@pytest.mark.slow
@needs_espeak
def test_smoke_runs_every_stage(python: Interpreter, tmp_path):
    done = python.run("-m", "model.distill", "smoke", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("audio", "clip", "codec", "dmd", "lips", "reader", "student", "takes", "teacher")
    ]
    for folder in ("audio", "codec", "dmd", "lips", "reader", "student", "teacher"):
        name = {"dmd": "student", "lips": "teacher"}.get(folder, folder)
        assert {"checkpoint.pt", "curves.png", f"{name}.safetensors"} <= {p.name for p in (tmp_path / folder).iterdir()}
        assert f"{name} step" in done.stdout
    measured = {
        "teacher": {"r open", "gain at 0.97", "mouth psnr"},
        "student": {"loss at 1", "loss at 0.4", "r open"},
    }
    for folder, numbers in measured.items():
        (*_, last) = json.loads((tmp_path / folder / "history.json").read_text())
        assert numbers <= last.keys()
    shape = load_network(tmp_path / "lips" / "teacher.safetensors").config
    for file in ("teacher/teacher.safetensors", "student/student.safetensors", "dmd/student.safetensors"):
        assert load_network(tmp_path / file).config == shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("codec", "--out", "x"), "give one of the two, --minutes or --steps"),
        (("codec", "--out", "x", "--minutes", "0"), "above zero"),
        (("reader", "--out", "x", "--minutes", "1", "--steps", "1"), "give one of the two"),
        (("data", "--clips", "0", "--out", "x"), "Invalid value for '--clips'"),
        (("audio",), "Missing option '--out'"),
        (("teach",), "No such command"),
    ],
)
def test_mistakes_take_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["model.distill", *arguments])
    assert run_app(app, "") == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())
