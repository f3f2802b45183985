"""Quality: a pipeline that draws the truth has the measures of the data, and mistakes take one line."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.config import TINY
from model.distill.clips import draw_motion
from model.distill.face import draw_identity, render
from model.distill.reader import load_reader
from model.distill.takes import LIVELINESS
from model.distill.teacher import GUIDANCE, teacher_models
from model.dit import DiT
from model.rope import rope_table
from profiling.__main__ import main
from profiling.formats import load
from profiling.measure import quality
from profiling.measure.quality import (
    SEED,
    Setting,
    Voice,
    held_out_portraits,
    held_out_voices,
    measure_drift,
    measure_setting,
)
from streaming import TalkingHeadPipeline
from tests.model.distill.conditions import needs_espeak
from tests.tensors import error

SIZE = TINY.chunk.new_frames


class Truth:
    """Draws person 0 with the mouth of the voice it is given, in groups of four frames."""

    config = TINY

    def __init__(self, mouths: dict[int, NDArray[np.float32]]) -> None:
        self._mouths = mouths  # by number of samples

    def stream(self, _: object, sound: tuple[NDArray[np.float32], int], seed: int) -> Iterator[tuple[Any, Any]]:
        mouth = self._mouths[len(sound[0])]
        person = draw_identity(np.random.default_rng([SEED, 0, 1, 1]), textured=False)
        frames = render(person, draw_motion(np.random.default_rng([seed, 9]), mouth, LIVELINESS), 128)
        for begin in range(0, len(frames), 4):
            yield frames[begin : begin + 4], None


def shortened(voice: Voice, chunks: int) -> Voice:
    return Voice(voice.wave[: chunks * TINY.chunk.slice_samples], voice.mouth[: chunks * SIZE])


@needs_espeak
def test_the_truth_has_the_measures_of_the_data() -> None:
    voices = list(map(shortened, held_out_voices(4, 8 * SIZE), (5, 6, 7, 8)))
    pipeline = cast(TalkingHeadPipeline, Truth({len(voice.wave): voice.mouth for voice in voices}))
    streams: list[int] = []
    found = dict(
        measure_setting(pipeline, held_out_portraits(1), voices, load_reader(), lambda: streams.append(len(streams)))
    )
    assert streams == [0, 1, 2, 3]
    assert found["r of open"].value > 0.9
    assert found["r of close"].value > 0.9
    assert found["lag of open, frames"].value == 0
    assert abs(found["r of open with another voice"].value) < 0.4
    assert found["seam ratio"].value == pytest.approx(1, abs=0.35)
    assert found["sharpness, of the portrait's"].value == pytest.approx(1, abs=0.1)
    assert found["distance to the portrait, Lab"].value < 4


@needs_espeak
def test_long_streams_of_the_truth_do_not_drift() -> None:
    (voice,) = held_out_voices(1, 3 * SIZE)
    samples = 20 * TINY.chunk.slice_samples
    pipeline = cast(TalkingHeadPipeline, Truth({samples: np.resize(voice.mouth, (20 * SIZE, 6))}))
    found = {
        name: (drift, track)
        for name, drift, track in measure_drift(pipeline, held_out_portraits(1), voice, 20, load_reader())
    }
    assert set(found) == {
        f"{name}, last over first 10 of 20 chunks"
        for name in ("distance to the portrait", "background's colour", "sharpness")
    }
    drift, track = found["sharpness, last over first 10 of 20 chunks"]
    assert drift.value == pytest.approx(1, abs=0.1)
    assert len(track) == 20
    assert sum(track[10:]) / sum(track[:10]) == pytest.approx(drift.value, abs=1e-3)


def test_settings_are_parsed() -> None:
    assert Setting.parse("bf16", "tiny") == Setting("bf16", 4, 33)
    assert Setting.parse("fp32,2", "tiny") == Setting("fp32", 2, 33)
    assert Setting.parse("fp8,3,17", "tiny").name == "fp8, 3 steps, 17 frames"
    assert Setting.parse("teacher,30", "tiny").name == "teacher, 30 steps, 33 frames"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "tiny-random"), "--preset tiny-random: only tiny draws people"),
        (("--setting", "bf17"), "--setting bf17: write PRECISION"),
        (("--setting", "bf16,two"), "--setting bf16,two: write PRECISION"),
        (("--drift", "3"), "--drift 3: at least 20 chunks"),
    ],
)
def test_mistakes_take_one_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["profiling", "quality", *arguments])
    assert main() == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


@needs_espeak
def test_the_command_writes_a_results_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Opened(SimpleNamespace):
        def __enter__(self) -> Truth:
            voice = held_out_voices(1, 2 * SIZE)[0]
            return Truth({len(voice.wave): voice.mouth})

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(quality.TalkingHeadPipeline, "from_pretrained", lambda *_, **options: Opened(**options))
    arguments = ["--people", "1", "--voices", "1", "--chunks", "2", "--setting", "fp32", "--setting", "bf16,2"]
    monkeypatch.setattr(sys, "argv", ["profiling", "quality", *arguments, "--out", str(tmp_path / "q.json")])
    assert main() == 0
    rows = load(tmp_path / "q.json").quality
    assert {row.setting for row in rows} == {"fp32, 4 steps, 33 frames", "bf16, 2 steps, 33 frames"}
    assert {"r of open", "seam ratio"} <= {row.measure for row in rows}
    assert "fp32, 4 steps, 33 frames" in " ".join(capsys.readouterr().out.split())


def test_a_guided_teacher_is_the_teacher_with_and_without_sound() -> None:
    config = TINY
    guided = teacher_models(config, torch.device("cpu")).dit
    plain, random = DiT(config.dit), torch.Generator().manual_seed(0)
    plain.load_state_dict(guided.state_dict())

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    with torch.inference_mode():
        frames, channels, rows, columns = config.latent_shape
        audio = normal(1, 33, config.dit.audio_window, config.dit.audio_blocks, config.dit.audio_channels)
        context = plain.embed_context(normal(3, config.dit.text_dim), normal(config.dit.img_tokens, config.dit.img_dim))
        condition = normal(frames, config.dit.in_dim - channels, rows, columns)
        inputs = normal(*config.latent_shape), condition, plain.modulate(500.0), rope_table(config.grid, 64), context
        v, v_silent = (plain(*inputs, plain.embed_audio(x), num_motion_latents=2) for x in (audio, 0 * audio))
        found = guided(*inputs, guided.embed_audio(audio), num_motion_latents=2)
    assert error(found, v_silent + GUIDANCE * (v - v_silent)) < 1e-5
    assert error(v, v_silent) > 1e-3
