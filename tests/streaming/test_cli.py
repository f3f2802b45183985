"""`python -m streaming run` from end to end: what is accepted, what is refused and how, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from fractions import Fraction
from functools import partialmethod
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import streaming.__main__ as command_line
from model import quantize
from model.config import PRESETS
from streaming.session import Session
from tests.processes import Interpreter, Process
from tests.small import SMALL, write_checkpoint
from tests.streaming import command

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMAND = [sys.executable, "-m", "streaming", "run", "--device", "cpu"]
QUICK = ("--steps", 1, "--size", "64x64")


def tone(seconds: float, rate: int = 16000, channels: int = 1) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 220 * t) * (np.sin(2 * np.pi * 2 * t) > -0.5)
    return np.repeat(wave[:, None], channels, 1).astype(np.float32)


@pytest.fixture
def portrait(tmp_path: Path) -> Path:
    """A square, as most videos here: in pictures of other formats a face is looked for, which takes longer."""
    path = tmp_path / "portrait.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 120, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def voice(tmp_path: Path) -> Path:
    path = tmp_path / "voice.wav"
    soundfile.write(path, tone(0.2), 16000)
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return command.call(monkeypatch, "run", "--device", "cpu", *arguments)


def decode(path: Path) -> tuple[list[np.ndarray], float]:
    """The frames of a video, and the seconds its sound lasts."""
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(path) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    return frames, samples / 48000


def test_the_video_lasts_as_long_as_the_sound(portrait: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole chunk and a part of one; the same seed gives the same bytes, another seed other frames."""
    soundfile.write(tmp_path / "v.wav", tone(1.3, 44100, 2), 44100)
    report = tmp_path / "report.json"
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ("--image", portrait, "--audio", tmp_path / "v.wav", "--out", tmp_path / f"{name}.mp4")
        assert call(monkeypatch, *arguments, *QUICK, "--seed", seed, "--report", report) == 0
    a, b, c = (tmp_path / f"{name}.mp4" for name in "abc")
    frames, seconds = decode(a)
    assert len(frames) == 33  # ceil(1.3 s x 25)
    assert frames[0].shape == (64, 64, 3)
    assert seconds == pytest.approx(1.3, abs=0.04)
    assert a.read_bytes() == b.read_bytes()
    assert any((x != y).any() for x, y in zip(frames, decode(c)[0], strict=True))
    values = json.loads(report.read_text())
    assert (values["frames"], values["chunks"]) == (33, 2)
    assert 0 < values["startup_s"] < values["cold_start_s"]
    assert values["fps"] is None  # one whole chunk: no steady state to time
    assert set(values["spans"]) == {"audio", "denoise/step", "decode", "color", "motion", "emit"}
    assert values["settings"]["seed"] == 2
    assert values["versions"]["torch"]
    assert values["device"]["threads"] == torch.get_num_threads()
    assert not list(tmp_path.glob("*.part.mp4"))
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (192000, 2), (16000, 6)])
def test_sound_of_any_form(
    rate: int, channels: int, portrait: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "v.wav", tone(0.2, rate, channels), rate)
    out = tmp_path / "out.mp4"
    assert call(monkeypatch, "--image", portrait, "--audio", tmp_path / "v.wav", "--out", out, *QUICK) == 0
    assert len(decode(out)[0]) == 5


def picture(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 4), np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels[..., : 3 if mode == "RGB" else 4], "CMYK" if mode == "CMYK" else None)


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "jpg"), ("RGBA", "png"), ("I;16", "png"), ("RGB", "webp")])
def test_pictures_of_any_form(
    mode: str, suffix: str, voice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / f"p.{suffix}", tmp_path / "frames"
    picture(mode).save(path)
    assert call(monkeypatch, "--image", path, "--audio", voice, "--out", out, *QUICK) == 0
    assert len(list(out.glob("*.png"))) == 5


def test_audio_heard_in_one_go(portrait: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "v.wav", tone(1.25), 16000)
    out = tmp_path / "out.mp4"
    arguments = ("--image", portrait, "--audio", tmp_path / "v.wav", "--out", out, *QUICK)
    assert call(monkeypatch, *arguments, "--audio-mode", "once") == 0
    assert len(decode(out)[0]) == 32


def test_official_checkpoint_folder(
    portrait: Path, voice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "small", SMALL)
    checkpoint, out = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "out.mp4"
    arguments = (
        "--image",
        portrait,
        "--audio",
        voice,
        "--out",
        out,
        "--preset",
        "small",
        "--prompt",
        "AB",
    )  # the small vocabulary has no small letters
    assert call(monkeypatch, *arguments, "--checkpoint", checkpoint) == 0
    assert decode(out)[0][0].shape == (32, 48, 3)


def test_a_quantised_checkpoint_runs_in_its_precision_and_in_others(
    portrait: Path, voice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "small", SMALL)
    checkpoint, eight = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "eight"
    monkeypatch.setattr(sys, "argv", ["quantize", "--checkpoint", str(checkpoint), "--out", str(eight)])
    assert quantize.main() == 0
    files = ("--image", portrait, "--audio", voice, "--preset", "small", "--prompt", "AB", "--size", "32x32")
    for precision, used in (("auto", "fp8"), ("fp8-attn", "fp8-attn"), ("bf16", "bf16")):
        report, out = tmp_path / f"{precision}.json", tmp_path / f"{precision}.mp4"
        arguments = (*files, "--checkpoint", eight, "--out", out, "--report", report, "--precision", precision)
        assert call(monkeypatch, *arguments) == 0
        assert json.loads(report.read_text())["settings"]["precision"] == used
        assert decode(out)[0][0].shape == (32, 32, 3)


# One mistake each: what replaces the good arguments, {} being the test's folder.
MISTAKES = {
    "no such image": ["--image", "{}/nowhere.png"],
    "text as image": ["--image", "{}/text.png"],
    "folder as image": ["--image", "{}"],
    "one pixel": ["--image", "{}/pixel.png"],
    "truncated image": ["--image", "{}/truncated.png"],
    "no such audio": ["--audio", "{}/nowhere.wav"],
    "text as audio": ["--audio", "{}/text.wav"],
    "folder as audio": ["--audio", "{}"],
    "no samples": ["--audio", "{}/empty.wav"],
    "a picture as audio": ["--audio", "{}/pixel.png"],
    "a PDF as image": ["--image", "{}/page.pdf"],
    "NaN samples": ["--audio", "{}/nan.wav"],
    "not a checkpoint": ["--checkpoint", "{}/folder"],
    "no such checkpoint": ["--checkpoint", "{}/nowhere"],
    "no such folder": ["--out", "{}/nowhere/out.mp4"],
    "unknown kind of output": ["--out", "{}/out.xyz"],
    "folder in use": ["--out", "{}/folder"],
    "unknown preset": ["--preset", "huge"],
    "unknown device": ["--device", "tpu"],
    "unknown precision": ["--precision", "fp4"],
    "no steps": ["--steps", "0"],
    "endless steps": ["--steps", "5000000000"],
    "deafening": ["--audio", "{}/deafening.wav"],
    "two lines in a name": ["--image", "{}/a\nb.png"],
    "no name": ["--out", "{}/.mp4"],
    "report over the voice": ["--report", "{}/voice.wav"],
    "portrait of a name that is too long": ["--image", "{}/" + "n" * 300 + ".png"],
    "video of a name that is too long": ["--out", "{}/" + "n" * 300 + ".mp4"],
    "folder of a name that is too long": ["--out", "{}/" + "n" * 300 + "/"],
    "voice of a name that is too long": ["--audio", "{}/" + "n" * 300 + ".wav"],
    "report of a name that is too long": ["--report", "{}/" + "n" * 300 + ".json"],
    "video over the voice": ["--out", "{}/voice.wav"],
    "video over the portrait": ["--out", "{}/portrait.png"],
    "report at links in a circle": ["--report", "{}/circle"],
    "steps in words": ["--steps", "four"],
    "unknown option": ["--quality", "high"],
    "14B without weights": ["--preset", "flashtalk-14b"],
    "folder as report": ["--report", "{}/folder"],
    "odd size": ["--size", "100x96"],
    "size in words": ["--size", "big"],
    "odd number of frames": ["--frames", "34"],
    "no shift": ["--shift", "0"],
    "too much colour": ["--color", "2"],
    "unknown noise": ["--noise", "pink"],
    "unknown loudness": ["--loudness", "loud"],
    "no settings": ["--config", "{}/nowhere.toml"],
    "settings that are no TOML": ["--config", "{}/text.png"],
    "unknown setting": ["--config", "{}/unknown.toml"],
    "no folder for the report": ["--report", "{}/nowhere/r.json"],
}


@pytest.fixture
def bad_files(tmp_path: Path) -> None:
    nan = tone(1)
    nan[5000] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "deafening.wav", tone(1, channels=6) * 1e30, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "empty.wav", tone(0), 16000)
    (tmp_path / "text.wav").write_text("these are words, not samples\n" * 100)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "unknown.toml").write_text("quality = 3")
    (tmp_path / "page.pdf").write_text("%PDF-1.7")
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "other.png").write_text("mine")
    (tmp_path / "circle").symlink_to("circle")


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_costs_one_line(
    mistake: str,
    portrait: Path,
    voice: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    option, value = MISTAKES[mistake]
    before = {path: path.lstat() for path in tmp_path.rglob("*")}
    good = {"--image": portrait, "--audio": voice, "--out": tmp_path / "out.mp4"}
    arguments = good | {option: value.format(tmp_path)}
    assert call(monkeypatch, *[x for pair in arguments.items() for x in pair]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    after = {path: path.lstat() for path in tmp_path.rglob("*")}
    assert after.keys() == before.keys()
    assert all(
        (s.st_ino, s.st_mtime_ns) == (after[path].st_ino, after[path].st_mtime_ns)
        for path, s in before.items()
        if path.is_file()
    )


@pytest.mark.parametrize("fault", ["truncated shard", "missing tensor"])
def test_a_broken_checkpoint_costs_one_line(
    fault: str,
    portrait: Path,
    voice: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(PRESETS, "small", SMALL)
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    shard = checkpoint / "diffusion_pytorch_model-00001-of-00002.safetensors"
    if fault == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-5])
    else:
        save_file({"patch_embedding.bias": torch.zeros(256)}, shard)
    out = tmp_path / "out.mp4"
    arguments = ("--image", portrait, "--audio", voice, "--out", out, "--preset", "small", "--checkpoint", checkpoint)
    assert call(monkeypatch, *arguments) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert not list(tmp_path.glob("out*"))


def test_no_space_left(python: Interpreter, portrait: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk; the frames that found room stay.

    All 100 frames take 180 kB. However slow the disk, no more than 36 are written at once, which take 80.
    """
    soundfile.write(tmp_path / "voice.wav", tone(4), 16000)
    arguments = ["--image", portrait, "--audio", tmp_path / "voice.wav", "--out", tmp_path / "out.mp4", "--steps", "1"]
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (120 * 1024, 120 * 1024));"
        "from streaming.__main__ import console; console()"
    )
    done = python.run("-c", program, "run", "--device", "cpu", *arguments, "--quiet")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out.mp4").exists()
    assert len(decode(tmp_path / "out.part.mp4")[0]) > 0


def test_standard_input_that_is_closed(python: Interpreter, portrait: Path, tmp_path: Path) -> None:
    closed = "import os, sys; os.close(0); sys.stdin = None"  # as Python begins with `<&-`
    program = f"{closed}; from streaming.__main__ import console; console()"
    arguments = ["--device", "cpu", "--image", portrait, "--audio", "-", "--out", tmp_path / "out.mp4"]
    done = python.run("-c", program, "run", *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: standard input is closed")


def test_what_only_generates_does_without_media_libraries() -> None:
    """A GPU machine has torch and transformers, and not these."""
    absent = "import sys; sys.modules |= dict.fromkeys(['pyloudnorm', 'ftfy', 'soundfile', 'soxr', 'av']); "
    subprocess.run([sys.executable, "-c", absent + "import streaming.generator"], check=True)


def test_missing_options_and_help(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch) == 2
    assert capfd.readouterr().err.startswith("error: Missing option")
    assert call(monkeypatch, "--help") == 0
    text = capfd.readouterr().out
    assert all(option in text for option in ("--image", "--audio", "--out", "--checkpoint", "--report", "--seed"))


def start(python: Interpreter, portrait: Path, out: Path, seconds: float) -> Process:
    soundfile.write(out.with_suffix(".wav"), tone(seconds), 16000)
    arguments = ["--image", portrait, "--audio", out.with_suffix(".wav"), "--out", out, "--steps", 1]
    return python.start(*COMMAND[1:], *arguments)


def wait_for_chunk(process: Process, chunk: int) -> int:
    """Frames that the progress line says are out once `chunk` chunks are done."""
    for text in process.stderr:
        if text.startswith(f"chunk {chunk} "):
            return int(text.split()[2])
    raise AssertionError("the run ended early")


def test_options_from_a_file_and_from_the_command_line(
    portrait: Path, voice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command line goes before the file; both spellings of a name are taken; quiet says nothing."""
    settings, report = tmp_path / "run.toml", tmp_path / "report.json"
    lines = [f'{name} = "{path}"' for name, path in (("image", portrait), ("audio", voice), ("report", report))]
    settings.write_text("\n".join([*lines, 'size = "96x64"', "steps = 3", 'audio-mode = "once"', "quiet = true"]))
    out = tmp_path / "out.mp4"
    assert call(monkeypatch, "--config", settings, "--out", out, "--steps", 1) == 0
    assert decode(out)[0][0].shape == (64, 96, 3)
    chosen = json.loads(report.read_text())["settings"]
    assert (chosen["steps"], chosen["audio_mode"], chosen["chunk"]["width"]) == (1, "once", 96)
    assert capfd.readouterr().err.startswith("tiny knows drawn people")


@pytest.mark.parametrize("text", ["448x768", "448X768", " 448 x 768 ", "448*768"])
def test_sizes_are_read_as_people_write_them(text: str) -> None:
    assert command_line.parse_size(text) == (448, 768)


def test_the_size_that_was_found_is_said(
    portrait: Path, voice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("streaming.pipeline.largest_in_time", lambda *_: ((64, 64), 0.5))
    out = tmp_path / "out.mp4"
    assert call(monkeypatch, "--image", portrait, "--audio", voice, "--out", out, "--steps", 1, "--size", "auto") == 0
    assert decode(out)[0][0].shape == (64, 64, 3)
    said = "size auto: 64x64 plays in real time: a chunk of 1.12 s takes 0.50 s; --size 64x64 spares the measuring"
    assert said in capfd.readouterr().err


def test_too_little_memory_costs_one_line(
    portrait: Path, voice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "CUDA out of memory. Tried to allocate 2.34 GiB. GPU 0 has 23.52 GiB, of which ...\nMore"
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 22 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 24 * 2**30))
    monkeypatch.setattr(Session, "frames", Mock(side_effect=torch.OutOfMemoryError(reason)))
    assert call(monkeypatch, "--image", portrait, "--audio", voice, "--out", tmp_path / "v.mp4") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "2.34 GiB wanted beside 22.0 GiB, and there are 24.0 GiB" in line
    assert "--precision fp8-vae" in line


def test_compiled_frames_are_the_same(
    portrait: Path, voice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a compiler that leaves the graphs as they are."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setenv("FLASHTALK_CACHE", str(tmp_path / "cache"))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # to be restored
        monkeypatch.setenv(name, str(tmp_path))
    report, stages = tmp_path / "report.json", Mock(return_value=nullcontext())
    monkeypatch.setattr(command_line, "stage", stages)
    for option in ("--compile", "--no-compile"):
        arguments = ("--image", portrait, "--audio", voice, "--out", tmp_path / f"{option}.mp4", "--report", report)
        assert call(monkeypatch, *arguments, option, "--steps", 1, "--frames", 9) == 0
        assert json.loads(report.read_text())["settings"]["compiled"] == (option == "--compile")
    said = [given.args[0] for given in stages.call_args_list if "loading" in given.args[0]]
    assert said == ["loading the models, compiling for 128 x 128", "loading the models"]
    one, two = (decode(tmp_path / f"{option}.mp4")[0] for option in ("--compile", "--no-compile"))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_a_killed_run_leaves_every_frame_it_reported(python: Interpreter, portrait: Path, tmp_path: Path) -> None:
    process = start(python, portrait, tmp_path / "out.mp4", 60)
    emitted = wait_for_chunk(process, 2)
    process.kill()
    process.wait()
    assert not (tmp_path / "out.mp4").exists()
    frames, seconds = decode(tmp_path / "out.part.mp4")
    assert len(frames) >= emitted >= 56  # a busy machine may skip a line of progress
    assert abs(len(frames) / 25 - seconds) < 0.25
    assert len({frame.tobytes() for frame in frames}) > 50


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_finishes_its_file(
    number: signal.Signals, python: Interpreter, portrait: Path, tmp_path: Path
) -> None:
    process = start(python, portrait, tmp_path / "out.mp4", 60)
    emitted = wait_for_chunk(process, 1)
    process.send_signal(number)
    assert process.wait() == 130
    assert not (tmp_path / "out.part.mp4").exists()
    assert len(decode(tmp_path / "out.mp4")[0]) >= emitted >= 28


def test_pcm_in_and_raw_frames_out(python: Interpreter, portrait: Path, tmp_path: Path) -> None:
    (tmp_path / "pcm").write_bytes((tone(0.5)[:, 0] * 32767).astype("<i2").tobytes())
    arguments = ["--image", portrait, "--audio", "-", "--out", "-", "--steps", "1"]
    with (tmp_path / "pcm").open() as pcm:
        process = python.start(*COMMAND[1:], *arguments, stdin=pcm.fileno())
    with os.fdopen(process.stdout.fileno(), "rb", closefd=False) as frames:
        assert len(frames.read()) == 13 * 128 * 128 * 3  # ceil(0.5 s x 25) frames
    assert process.wait() == 0


def test_a_wav_file_on_standard_input(portrait: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One second of 48 kHz stereo is one second, to a file whose name FFmpeg would take for an address."""
    soundfile.write(tmp_path / "v.wav", tone(1, 48000, 2), 48000)
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "v.wav").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        arguments = ("--image", portrait, "--audio", "-", "--out", "2026-11-28T17:30:00.mp4", *QUICK)
        assert call(monkeypatch, *arguments) == 0
    (tmp_path / "2026-11-28T17:30:00.mp4").rename("film.mp4")
    frames, _ = decode(tmp_path / "film.mp4")
    assert len(frames) == 25
    assert not list(tmp_path.glob("*.part.mp4"))


def test_an_inverted_channel_costs_one_line(
    portrait: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "v.wav", tone(0.2, 48000, 2) * [1, -1], 48000)
    arguments = ("--image", portrait, "--audio", tmp_path / "v.wav", "--out", tmp_path / "v.mp4", *QUICK)
    assert call(monkeypatch, *arguments) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert "cancel each other out" in line


def test_a_stranger_called_kernels_is_named() -> None:
    """Another distribution of that name, of which PyPI has one, may come first on the path."""
    stranger = "import runpy, sys, types; sys.modules['kernels'] = k = types.ModuleType('kernels'); k.__path__ = []; "
    program = stranger + "runpy.run_module('streaming', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: something else named 'kernels'")
    assert done.stderr.count("\n") == 1


def test_examples_are_what_the_readme_says() -> None:
    with Image.open(EXAMPLES / "portrait.jpg") as image:
        assert min(image.size) >= 256
    info = soundfile.info(EXAMPLES / "voice.wav")
    assert (info.samplerate, info.channels) == (16000, 1)
    assert 10 <= Fraction(info.frames, info.samplerate) <= 15
