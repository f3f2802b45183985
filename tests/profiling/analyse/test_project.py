"""Projections of chunks that are made of calls with known times, compared with sums made by hand."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from model.config import PRESETS
from model.errors import UserError
from profiling.__main__ import main
from profiling.analyse import project
from profiling.analyse.calls import Call
from profiling.analyse.project import Projector, Setting, config_of, parse_links, parse_size, parse_world_sizes
from profiling.analyse.recipe import AUDIO, COLOR, DECODE, MOTION, STEP, Recipe, StageWork
from profiling.analyse.recorder import Exchange
from profiling.devices import devices
from profiling.results import Run, save
from tests.profiling.analyse.made_up import chunk, run

LINK = devices()["H800"]
RATE, LATENCY = LINK.link_one_way_bytes_s, LINK.link_latency_s


def a_pass(seconds: float) -> Call:
    """A call that takes so long on the made-up GPU, which copies 4 TB/s."""
    return Call("fused pass", (), "bf16", 0.0, 4e12 * seconds)


def made_up_recipes(_precision: str, setting: Setting) -> tuple[Recipe, ...]:
    """A chunk whose work is divided by the GPUs, and which grows with the picture; exchanges of 1 GB a step.

    On one GPU: 1 s for each step, 0.2 s beside the second, then twice 0.1 s of decoding, 0.01 s of colour, and 0.1 s.
    Rank 0 computes half as much as the busiest, but gathers the frames after the colours.
    """
    ranks = (False,) if setting.world == 1 else (False, True)
    return tuple(made_up_recipe(setting, gathers) for gathers in ranks)


def made_up_recipe(setting: Setting, gathers: bool) -> Recipe:
    share = setting.width * setting.height / (448 * 768) / setting.world * (0.5 if gathers else 1)

    def work(stage: str, seconds: float, *exchanges: Exchange, beside: bool = False) -> StageWork:
        sent = Counter(exchanges if setting.world > 1 else ())
        return StageWork(stage, Counter({a_pass(seconds * share): 1}), beside, sent)

    heads, rows = Exchange("ulysses", 1e9), Exchange("all", 1e6, (a_pass(0.1 * share),))
    frames = [Exchange("all", 1e12)] if gathers else []
    steps = [work(STEP, 1.0, heads) for _ in range(setting.steps)]
    shown = [work(DECODE, 0.1, rows), work(COLOR, 0.01, *frames)] * 2
    return (work(AUDIO, 0.001), steps[0], work(DECODE, 0.2, beside=True), *steps[1:], *shown, work(MOTION, 0.1))


MEASURED = run(
    variants=(
        chunk(
            "fp8", 3.5, audio=(0.002,), denoise_step=(1.2, 1.45), decode=(9.0, 0.15, 0.15), color=(0.01,) * 2,
            motion=(0.15,),
        ),
    )
)  # fmt: skip
STUDENT, VAE, REST = 1.2, 1.5, 3.5 - (0.002 + 2.65 + 0.3 + 0.02 + 0.15)


@pytest.fixture(scope="module")
def projector() -> Projector:
    return Projector([("results/run.json", MEASURED)], made_up_recipes)


def test_one_gpu_takes_the_calibrated_calls_and_the_rest(projector: Projector) -> None:
    one = projector.project(projector.setting(1, "H800"))
    stages = {
        "audio": STUDENT * 0.001,
        "denoise/step": STUDENT * 2,
        "decode beside the steps": VAE * 0.2,
        "decode": VAE * 0.2,
        "color": VAE * 0.02,
        "motion": VAE * 0.1,
    }
    assert one.stages == pytest.approx(stages)
    assert (one.exchange, one.rest) == (0, pytest.approx(REST))
    assert one.chunk == pytest.approx(sum(stages.values()) + REST)
    assert one.fps == pytest.approx(PRESETS["flashtalk-14b"].chunk.new_frames / one.chunk)


FRAMES = LATENCY + 1e12 / RATE  # seconds in which rank 0 gathers frames


def test_factors_fall_on_a_ranks_share_and_the_rest_on_every_chunk(projector: Projector) -> None:
    """Four GPUs compute a quarter each; two exchanges of heads are seen, those of rows are hidden.

    The others wait for rank 0 when it gathers frames; its own colours take it half the time.
    """
    four = projector.project(projector.setting(4, "H800"))
    assert sum(four.stages.values()) == pytest.approx((STUDENT * 2.001 + VAE * 0.51) / 4)
    assert four.exchange == pytest.approx(2 * (LATENCY + 1e9 / RATE) + 2 * FRAMES)
    assert four.chunk == pytest.approx((STUDENT * 2.001 + VAE * 0.51) / 4 + four.exchange + REST)


def test_an_exchange_is_seen_where_nothing_is_left_to_hide_it(projector: Projector) -> None:
    """With a millionth of the work, 1 MB of rows takes longer than the convolution that it travels behind."""
    many = projector.project(projector.setting(10**6, "H800"))
    least = devices()["B200"].kernel_s
    seen = 2 * (LATENCY + 1e9 / RATE) + 2 * (LATENCY + 1e6 / RATE - least)
    assert many.exchange == pytest.approx(seen + 2 * FRAMES)


def test_startup_ends_with_the_first_frames(projector: Projector) -> None:
    one, four = (projector.project(projector.setting(world, "H800")) for world in (1, 4))
    assert one.startup == pytest.approx(STUDENT * 2.001 + VAE * 0.31)
    assert four.startup == pytest.approx((STUDENT * 2.001 + VAE * 0.305) / 4 + four.exchange - FRAMES)


def test_emulated_ranks_go_before_sums_of_calls_and_exchanges_are_added() -> None:
    """Of two ranks, the slower one counts in each stage; what runs beside the steps is in their time."""
    stages = {"audio": (0.001,), "denoise_step": (0.7, 0.9), "decode": (9.0, 0.1, 0.1), "color": (0.01,) * 2}
    ranks = (
        chunk("rank-1-of-2", 2.0, **stages, motion=(0.1,)),
        chunk("rank-0-of-2", 2.0, **(stages | {"color": (0.02, 0.02)}), motion=(0.05,)),
        chunk("rank-2-of-4", 2.0, denoise_step=(0.3,)),  # of an older model
    )
    whole = chunk(
        "fp8-vae", 3.5, audio=(0.002,), denoise_step=(1.2, 1.45), decode=(9.0, 0.15, 0.15), color=(0.01,) * 2,
        motion=(0.15,),
    )  # fmt: skip
    projector = Projector([("run.json", run(variants=(whole, *ranks)))], made_up_recipes)
    two, four = (projector.project(projector.setting(world, "H800")) for world in (2, 4))
    expected = {"audio": 0.001, "denoise/step": 1.6, "decode": 0.2, "color": 0.04, "motion": 0.1}
    assert two.stages == pytest.approx({**expected, "decode beside the steps": 0.0})
    assert two.exchange == pytest.approx(2 * (LATENCY + 1e9 / RATE) + 2 * FRAMES)
    assert two.startup == pytest.approx(0.001 + 1.6 + 0.1 + 0.02 + two.exchange - FRAMES)
    assert two.sources == {"of emulated ranks": 1.0}
    assert "of emulated ranks" not in four.sources
    other = projector.project(projector.setting(2, "H800", steps=4))
    assert "of emulated ranks" not in other.sources
    assert any("Ranks of 2, 4 GPUs were emulated" in text for text in project.assumptions(projector, ("H800",)))


def test_other_sizes_and_steps_are_other_recipes(projector: Projector) -> None:
    double = projector.project(projector.setting(1, "H800", (448, 2 * 768), 4))
    assert double.stages["denoise/step"] == pytest.approx(STUDENT * 2 * 4)
    assert double.stages["motion"] == pytest.approx(VAE * 0.2)


def test_the_links_rates_are_what_collectives_reach() -> None:
    """Of 450 and 200 GB/s of the data sheets, and 31.5 of PCIe 4.0."""
    for name, sheet in (("H100", 450e9), ("H800", 200e9), ("L40S", 31.5e9)):
        assert 0.7 < devices()[name].link_one_way_bytes_s / sheet < 0.9
    assert devices()["H200"].link_one_way_bytes_s == devices()["H100"].link_one_way_bytes_s


# --- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of results, and the made-up recipe in place of the model's."""
    monkeypatch.setattr(project, "recorded", made_up_recipes)
    save(MEASURED, tmp_path / "run.json")
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "project", *map(str, arguments)])
    return main()


def test_what_is_printed_is_called_a_projection_and_names_its_assumptions(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, folder, "--gpus", "8,1,2", "--device-link", "H800", "--size", "448x768") == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "Projection, not a measurement",
        "flashtalk-14b in fp8: every GPU computes as fast as the NVIDIA B200 of run.json did alone",
        "the student's calls take 1.200 times, the VAE's 1.500 times what they take alone",
        "378 ms of the measured chunk are in no stage",
        f"H800 takes 15.0 µs, and its bytes over {RATE / 1e9:g} GB/s each way",
        "projected: 448 x 768, 2 steps, link of H800",
        "1 GPU 2 GPUs 8 GPUs",
        "denoise/step 2.40 s 1.20 s 300 ms",
        "times ceiling 100% 100% 100%",
    ):
        assert text in out


def test_as_json_there_is_a_row_for_each_setting(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (folder / "run.json", "--gpus", "1,2", "--size", "448x768", "--size", "320x640", "--steps", "4")
    assert call(monkeypatch, *arguments, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["projection"] is True
    assert (document["precision"], document["device"]) == ("fp8", "NVIDIA B200")
    assert document["calibration"]["factors"] == pytest.approx({"student": STUDENT, "VAE": VAE})
    settings = [(row["width"], row["link"], row["world"], row["steps"]) for row in document["rows"]]
    assert settings == [(w, link, n, 4) for w in (448, 320) for link in ("H100", "H800") for n in (1, 2)]
    row = document["rows"][0]
    assert row["chunk"] == pytest.approx(sum(row["stages"].values()) + row["exchange"] + row["rest"])
    assert row["fps"] == pytest.approx(28 / row["chunk"])


def test_mistakes_are_told_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(Run("audit", "2026-01-01", MEASURED.machine), folder / "empty.json")
    for arguments, complaint in (
        (("--gpus", "1,x"), "--gpus 1,x: give numbers of GPUs"),
        (("--gpus", "0,1"), "--gpus 0,1: give numbers of GPUs"),
        (("--device-link", "nvlink"), "--device-link nvlink: name devices of devices.toml (H100, H800"),
        (("--size", "448"), "--size 448: write WIDTHxHEIGHT"),
        (("--size", "450x768"), "a picture of 450x768 cannot be projected: width 450 is not a multiple of 16"),
        ((folder / "empty.json",), "no results have a whole chunk on a GPU"),
    ):
        place = () if isinstance(arguments[0], Path) else (folder / "run.json",)
        monkeypatch.setattr(project, "recorded", lambda p, s: made_up_recipes(p, s) if config_of(s) else ())
        assert call(monkeypatch, *place, *arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert complaint in err
        assert len(err.splitlines()) == 1


def test_options_are_read_as_they_are_written() -> None:
    assert parse_world_sizes("8,1,2,1") == [1, 2, 8]
    assert parse_links("H800,H100,H800") == ["H800", "H100"]
    assert parse_size("320x640") == (320, 640)
    with pytest.raises(UserError):
        parse_size("0x640")
