"""Goals evaluated on made-up runs, and the file of goals checked against the registry."""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from profiling.__main__ import TARGETS, main
from profiling.analyse import project
from profiling.analyse.calls import Call
from profiling.analyse.project import Setting
from profiling.analyse.recipe import Recipe, StageWork
from profiling.analyse.recorder import Exchange
from profiling.analyse.targets import MET, MISSED, UNMEASURED, Contender, Target, TargetResult, evaluate, read_targets
from profiling.cases import registry
from profiling.devices import devices
from profiling.formats import as_peers
from profiling.results import (
    ERROR,
    NOT_INSTALLED,
    OK,
    WRONG,
    CaseResult,
    Ceilings,
    Machine,
    Measurement,
    Quality,
    Run,
    StageInterval,
    VariantResult,
    save,
)
from profiling.soak import Spread
from profiling.tables import stage_value
from tests.profiling import runs as made_runs
from tests.profiling.analyse import made_up

H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 132, 80)
CPU = Machine("cpu", "some CPU", 2, 8)


def timed(backend: str, seconds: float, ours: bool = False) -> Measurement:
    return Measurement(backend, OK, ours, samples=(0.9 * seconds, seconds, 1.3 * seconds))


def case(*measurements: Measurement, name: str = "op/shape/bf16") -> CaseResult:
    return CaseResult(name, *name.split("/"), flops=6e12, bytes=1e9, measurements=measurements)


def run(*cases: CaseResult, machine: Machine = H100, started: str = "2026-01-01", **more: Any) -> Run:
    return Run("bench", started, machine, cases=cases, ceilings=Ceilings(2e12, {"bf16": 8e14}), **more)


def target(**goals: float) -> Target:
    return Target("a goal", "op/shape/bf16", goals, device="H100|H200", peer="best" if "ratio" in goals else None)


def held(goal: Target, *runs: Run) -> TargetResult:
    newest_first = sorted(runs, key=lambda r: r.started, reverse=True)
    return evaluate(goal, [(r.started, r) for r in newest_first])


RUN = run(case(timed("eager", 0.012, ours=True), timed("triton", 0.01, ours=True), timed("cudnn", 0.011)))


@pytest.mark.parametrize(
    ("goals", "verdict", "value", "shortfall"),
    [
        ({"ratio": 1.0}, MET, 1.1, -0.1),
        ({"ratio": 1.375}, MISSED, 1.1, 0.2),
        ({"tflops": 500}, MET, 600, -0.2),
        ({"tflops": 800}, MISSED, 600, 0.25),
        ({"percent_of_ceiling": 75}, MET, 75, 0.0),  # 7.5 ms at 800 TFLOP/s; the copy would take 0.5
        ({"percent_of_ceiling": 90}, MISSED, 75, 1 / 6),
        ({"seconds": 0.02}, MET, 0.01, -0.5),
        ({"seconds": 0.008}, MISSED, 0.01, 0.25),
    ],
)
def test_a_case_is_held_to_its_goal(goals: dict[str, float], verdict: str, value: float, shortfall: float) -> None:
    result = held(target(**goals), RUN)
    assert result.verdict == verdict
    assert result.value == pytest.approx(value)
    assert result.shortfall == pytest.approx(shortfall)


def test_of_several_goals_one_is_enough() -> None:
    result = held(target(tflops=620, percent_of_ceiling=70), RUN)
    assert (result.verdict, result.measure) == (MET, "percent_of_ceiling")
    nearest = held(target(tflops=620, percent_of_ceiling=99), RUN)
    assert (nearest.verdict, nearest.measure) == (MISSED, "tflops")


def test_a_named_backend_and_a_named_peer_are_the_ones_compared() -> None:
    goal = dataclasses.replace(target(ratio=1.0), backend="eager", peer="cudnn")
    assert held(goal, RUN).value == pytest.approx(0.011 / 0.012)
    assert held(dataclasses.replace(goal, peer="triton"), RUN).value == pytest.approx(0.010 / 0.012)


def test_the_stretch_goal_is_told_but_not_required() -> None:
    goal = target(tflops=500)
    assert held(dataclasses.replace(goal, stretch=600), RUN).stretched
    result = held(dataclasses.replace(goal, stretch=700), RUN)
    assert (result.verdict, result.stretched) == (MET, False)
    assert held(dataclasses.replace(target(seconds=0.02), stretch=0.01), RUN).stretched


@pytest.mark.parametrize("status", [WRONG, ERROR])
def test_a_wrong_kernel_misses_its_goal(status: str) -> None:
    broken = Measurement("triton", status, True, "relative error 0.3")
    result = held(target(ratio=1.0), run(case(broken, timed("cudnn", 0.011))), dataclasses.replace(RUN, started="2025"))
    assert (result.verdict, result.file, result.shortfall) == (MISSED, "2026-01-01", None)
    assert "relative error 0.3" in result.detail


@pytest.mark.parametrize(
    ("runs", "detail"),
    [
        ([], "no results of such a machine"),
        ([run(machine=CPU)], "no results of such a machine"),
        ([run()], "not in any results"),
        ([run(case(timed("cudnn", 0.01)))], "only peers were measured"),
        ([run(case(Measurement("triton", OK, True)))], "triton: not timed"),
        ([run(case(Measurement("triton", NOT_INSTALLED, True)))], "triton: not installed"),
        ([run(case(timed("triton", 0.01, ours=True)))], "peer best: not measured"),
        ([run(case(timed("triton", 0.01, ours=True), Measurement("cudnn", WRONG)))], "peer best: not measured"),
    ],
)
def test_what_no_run_can_answer_is_unmeasured(runs: Sequence[Run], detail: str) -> None:
    result = held(target(ratio=1.0), *runs)
    assert (result.verdict, result.value, result.detail) == (UNMEASURED, None, detail)


def test_without_a_ceiling_its_share_is_unmeasured() -> None:
    result = held(target(percent_of_ceiling=80), dataclasses.replace(RUN, ceilings=Ceilings()))
    assert (result.verdict, result.detail) == (UNMEASURED, "that run measured no ceiling for it")


def test_the_newest_run_that_measured_it_answers() -> None:
    newest = run(case(timed("other", 1.0), name="other/shape/bf16"), started="2026-03-01")
    newer = run(case(timed("triton", 0.02, ours=True), timed("cudnn", 0.011)), started="2026-02-01")
    h200 = run(
        case(timed("triton", 0.005, ours=True), timed("cudnn", 0.011)), machine=dataclasses.replace(H100, device="A100")
    )
    result = held(target(ratio=1.0), RUN, newest, newer, dataclasses.replace(h200, started="2026-04-01"))
    assert (result.file, result.verdict) == ("2026-02-01", MISSED)


def test_the_fastest_the_default_and_the_best_peer_stand_beside_each_other() -> None:
    """On one H100 the tuned table names the Hopper kernel for this shape, whatever was fastest in the run."""
    dims = {"rows": 12096, "inputs": 5120, "outputs": 13824}
    measurements = (timed("gluon", 0.02, True), timed("library", 0.01, True), timed("scaled-mm-row", 0.015))
    product = dataclasses.replace(case(*measurements, name="linear/14b-w1-up/fp8"), dims=dims)
    goal = dataclasses.replace(target(ratio=1.0), subject="linear/14b-w1-up/fp8")
    result = held(goal, run(product, machine=dataclasses.replace(H100, capability="9.0")))
    contenders = Contender("library", 0.01), Contender("gluon", 0.02), Contender("scaled-mm-row", 0.015)
    assert (result.fastest, result.default, result.peer) == contenders
    assert result.verdict == MET


def test_a_kernel_of_another_program_meets_no_goal() -> None:
    foreign = as_peers(dataclasses.replace(RUN, command="probe.py --out x"))
    assert held(target(seconds=1.0), foreign).detail == "only peers were measured"


def test_a_share_above_the_ceiling_says_why() -> None:
    result = held(target(percent_of_ceiling=80), run(case(timed("triton", 0.005, ours=True))))
    assert result.value == pytest.approx(150)
    assert "above it: another algorithm, with fewer FLOPs" in result.detail


# --- Variants -------------------------------------------------------------------------------------------------------


def variant(name: str, step: float, peak: int = 2**30) -> VariantResult:
    """Two chunks of four steps and nine decodes, of which one is longer; the first frame 50 ms after denoising."""
    stages = {
        "denoise/step": (step, step, step, 2 * step) * 2,
        "decode": (0.02, *(0.01,) * 8) * 2,
        "emit": (0.001,) * 3,
    }
    chunk, first = (5 * step + 0.1, 5 * step + 0.12), (5 * step + 0.05,) * 2
    return VariantResult(
        name, OK, stages=stages, chunk=chunk, first_frame=first, frames=28, peak_bytes=peak, gaps=step / 10
    )


VARIANTS = run(
    variants=(
        variant("bf16-compiled", 0.9),
        variant("fp8-eager", 0.6, peak=3 * 2**30),
        variant("fp8-attn-compiled", 0.4, peak=2 * 2**30),
        VariantResult("fp8-graphs", ERROR, "OutOfMemoryError", frames=28),
    )
)


@pytest.mark.parametrize(
    ("stage", "value"),
    [
        ("denoise/step", 0.4),  # of one step, the median
        ("decode", 0.1),  # of a chunk
        ("chunk", 2.11),
        ("first_frame", 2.05),
        ("after_denoise", 0.05),
        ("fps", 28 / 2.11),
        ("peak_bytes", 2**31),
        ("gaps", 0.04),
        ("emit", None),  # three calls are no two chunks
        ("motion", None),
    ],
)
def test_a_stage_has_its_quantity(stage: str, value: float | None) -> None:
    got = stage_value(VARIANTS.variants[2], stage)
    assert got is None if value is None else got == pytest.approx(value)


@pytest.mark.parametrize(
    ("subject", "stage", "goals", "verdict", "value"),
    [
        ("fp8*", "denoise/step", {"seconds": 0.45}, MET, 0.4),  # the best that fits
        ("fp8*", "denoise/step", {"seconds": 0.39}, MISSED, 0.4),
        ("fp8-eager", "denoise/step", {"seconds": 0.45}, MISSED, 0.6),
        ("fp8*", "denoise/step", {"ratio": 2.2}, MET, 2.25),
        ("fp8*", "fps", {"at_least": 14}, MISSED, 28 / 2.11),
        ("fp8*", "fps", {"at_least": 13}, MET, 28 / 2.11),
        ("*", "peak_bytes", {"at_most": 2**30}, MET, 2**30),
        ("*", "gaps", {"at_most": 0.02}, MISSED, 0.04),
        ("fp8*", "peak_bytes", {"at_most": 2**30}, MISSED, 2**31),
        ("fp8-graphs", "chunk", {"seconds": 1.0}, MISSED, None),
        ("int8*", "chunk", {"seconds": 1.0}, UNMEASURED, None),
        ("fp8*", "motion", {"seconds": 1.0}, MISSED, None),  # by the one that failed: none of them has it
        ("bf16*", "motion", {"seconds": 1.0}, UNMEASURED, None),
    ],
)
def test_a_variant_is_held_to_its_goal(
    subject: str, stage: str, goals: dict[str, float], verdict: str, value: float | None
) -> None:
    peer = "bf16-compiled" if "ratio" in goals else None
    result = held(Target("goal", subject, goals, stage=stage, peer=peer), VARIANTS)
    assert result.verdict == verdict
    assert result.value is None if value is None else result.value == pytest.approx(value)


def test_the_reason_is_that_of_the_newest_run_that_has_something_of_it() -> None:
    nothing = dataclasses.replace(run(), started="2027-01-01")
    result = held(Target("goal", "bf16*", {"ratio": 1.0}, stage="chunk", peer="published"), VARIANTS, nothing)
    assert result.detail == "peer published: not in the run of bf16-compiled"
    goal = dataclasses.replace(target(ratio=1.0), peer="cudnn")
    assert held(goal, nothing, run(case(timed("cudnn", 0.01)))).detail == "only peers were measured"


def test_against_a_variant_that_failed_nothing_is_measured() -> None:
    result = held(Target("goal", "bf16*", {"ratio": 1.0}, stage="chunk", peer="fp8-graphs"), VARIANTS)
    assert (result.verdict, result.detail) == (UNMEASURED, "peer fp8-graphs is failing: OutOfMemoryError")


def test_calls_beside_other_work_are_not_summed() -> None:
    one = dataclasses.replace(variant("fp8", 0.4), stages={"denoise/step": (0.4,) * 2, "decode": (0.3, 0.1) * 2})
    timeline = (
        StageInterval("denoise/step", 0, 0.0, 0.4),
        StageInterval("decode", 1, 0.05, 0.35),
        StageInterval("decode", 0, 0.4, 0.5),
    )
    assert stage_value(one, "decode") == pytest.approx(0.4)  # nothing shows that they overlap
    assert stage_value(dataclasses.replace(one, timeline=timeline), "decode") == pytest.approx(0.1)
    assert stage_value(dataclasses.replace(one, timeline=timeline), "denoise/step") == pytest.approx(0.4)


# --- Projections ----------------------------------------------------------------------------------------------------


QUALITY = run(
    quality=tuple(Quality(s, "r of open", r, None, None) for s, r in (("fp32", 0.8), ("bf16", 0.6), ("x", None)))
)


@pytest.mark.parametrize(
    ("setting", "goals", "verdict", "value", "shortfall"),
    [
        ("fp32", {"at_least": 0.75}, MET, 0.8, -1 / 15),
        ("fp32", {"at_most": 0.4}, MISSED, 0.8, 1.0),
        ("bf16", {"ratio": 1.0}, MISSED, 0.75, 0.25),  # of fp32's
        ("bf16", {"ratio": 0.6}, MET, 0.75, -0.25),
        ("x", {"at_least": 0.5}, MISSED, None, None),  # a correlation with what does not move
    ],
)
def test_generated_video_is_held_to_its_goal(
    setting: str, goals: dict[str, float], verdict: str, value: float | None, shortfall: float | None
) -> None:
    goal = Target("a goal", setting, goals, quality="r of open", peer="fp32")
    result = held(goal, QUALITY)
    assert (result.verdict, result.value) == (verdict, pytest.approx(value) if value else None)
    assert result.shortfall == (pytest.approx(shortfall) if shortfall else None)


@pytest.mark.parametrize(
    ("setting", "runs", "detail"),
    [("int8", [QUALITY], "no r of open of int8"), ("fp32", [RUN], "no results of profiling quality")],
)
def test_quality_that_was_not_measured_is_unmeasured(setting: str, runs: Sequence[Run], detail: str) -> None:
    result = held(Target("a goal", setting, {"at_least": 0.5}, quality="r of open"), *runs)
    assert (result.verdict, result.detail) == (UNMEASURED, detail)


VISIT = made_runs.visit()
VISITS = run(visits=(VISIT, dataclasses.replace(VISIT, longest_stall=0.6)))


@pytest.mark.parametrize(
    ("setting", "part", "verdict", "value", "detail"),
    [
        ("tiny, *, WebRTC", "told_offset", MET, 0.04, "tiny, 64 x 64, 2 steps, WebRTC"),
        ("tiny, *", "longest_stall", MISSED, 0.6, "tiny, 64 x 64, 2 steps, WebRTC"),  # of the worse visit
        ("tiny, *, MP4", "offset", UNMEASURED, None, "no results of profiling visit"),
    ],
)
def test_the_page_in_a_browser_is_held_to_its_goal(
    setting: str, part: str, verdict: str, value: float | None, detail: str
) -> None:
    result = held(Target("a goal", setting, {"at_most": 0.06}, visit=part), VISITS, RUN)
    assert (result.verdict, result.value, result.detail) == (verdict, value, detail)


def test_an_offset_that_the_browser_does_not_tell_is_unmeasured() -> None:
    silent = run(visits=(dataclasses.replace(VISIT, told_offset=Spread(0, None, None, None)),))
    result = held(Target("a goal", "tiny*", {"at_most": 0.06}, visit="told_offset"), silent)
    assert (result.verdict, result.detail) == (UNMEASURED, "no told_offset in that visit")


def test_a_projected_goal_is_answered_by_all_runs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ceilings are in one run, the chunk in another; on 8 GPUs each step of 1 s takes an eighth."""

    def recipes(_precision: str, setting: Setting) -> tuple[Recipe, ...]:
        def work(stage: str, seconds: float, *exchanges: Exchange) -> StageWork:
            calls = Counter({Call("fused pass", (), "bf16", 0.0, 4e12 * seconds / setting.world): 1})
            if exchanges and setting.world > 1:  # packs what is sent
                calls[Call("eager pass", (), "fp32", 0.0, 4e10)] += 1
            return StageWork(stage, calls, exchanges=Counter(exchanges if setting.world > 1 else ()))

        sent = Exchange("ulysses", 0.1 * devices()["H800"].link_one_way_bytes_s)
        return ((work("denoise/step", 1.0, sent), work("decode", 0.1), work("color", 0.01), work("motion", 0.1)),)

    monkeypatch.setattr(project, "recorded", recipes)
    measured = made_up.chunk("fp8", 1.21, denoise_step=(1.0,), decode=(0.1,), color=(0.01,), motion=(0.1,))
    ceilings, whole = made_up.run(), made_up.run(ceilings=Ceilings(), variants=(measured,))
    startup = Target("goal", "8 x H800", {"seconds": 0.3}, stage="first_frame", gpus=8, link="H800")
    result = held(startup, ceilings, whole)
    assert (result.verdict, result.value) == (MET, pytest.approx(1.11 / 8 + 0.01 + 0.1, abs=1e-3))
    assert result.detail == (
        "projected, fp8: a chunk of 261 ms computes 161 ms, 6.6% more than an even share (eager pass 10.0 ms), and "
        "exchanges 100 ms"
    )
    fps = Target("goal", "8 x H800", {"at_least": 120}, stage="fps", gpus=8, link="H800")
    assert (held(fps, ceilings, whole).verdict, held(fps, ceilings, whole).got) == (MISSED, "107")
    asked: list[tuple[int, int]] = []

    def sized(precision: str, setting: Setting) -> tuple[Recipe, ...]:
        asked.append((setting.width, setting.height))
        return recipes(precision, setting)

    monkeypatch.setattr(project, "recorded", sized)
    small = Target("goal", "1 x H100 640x352", {"at_least": 20}, stage="fps", gpus=1, link="H100", size="640x352")
    assert held(small, ceilings, whole).verdict == MET
    assert (640, 352) in asked


def test_without_results_a_projection_is_unmeasured() -> None:
    goal = Target("goal", "8 x H800", {"at_least": 32}, stage="fps", gpus=8, link="H800")
    result = held(goal)
    assert (result.verdict, result.detail.partition(";")[0]) == (
        UNMEASURED,
        "no results have a whole chunk on a GPU to project from",
    )


# --- The file -------------------------------------------------------------------------------------------------------


def test_every_case_and_peer_in_the_goals_exists() -> None:
    cases = registry()
    for goal in read_targets(TARGETS):
        if not goal.part:
            assert goal.subject in cases
            backends = {b.name for b in cases[goal.subject].backends}
            assert {goal.peer, goal.backend} - {None, "best"} <= backends


def test_the_goals_name_real_devices_and_are_no_easier_than_their_stretch() -> None:
    for goal in read_targets(TARGETS):
        assert goal.kind == "cpu" or goal.applies(run(machine=H100))
        measure, wanted = next(iter(goal.goals.items()))
        if goal.stretch is not None:
            assert (goal.stretch < wanted) == (measure in ("seconds", "at_most"))


BASE = {"name": '"x"', "cases": '["op/shape/bf16"]', "seconds": "1.0"}


def toml(**changes: str | None) -> str:
    return "[[target]]\n" + "".join(f"{k} = {v}\n" for k, v in (BASE | changes).items() if v is not None)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[target]\n", "is not TOML"),
        ("", "must consist of [[target]] entries, and has nothing"),
        ("[target]\nname = 'x'\n", "must consist of [[target]] entries"),
        (toml() + "[more]\n", "must consist of [[target]] entries, and has target, more"),
        ("target = [1]\n", "target number 1: is not a table"),
        (toml(name=None), "target number 1: has no name"),
        (toml(name="3"), "target 3: name = 3, wanted a text"),
        (toml(speed="3"), "target 'x': speed is not a key of it; there are name, device"),
        (toml(seconds=None), "has no goal; there are ratio, percent_of_ceiling, tflops, seconds"),
        (toml(seconds="-1"), "seconds = -1, wanted a positive number"),
        (toml(seconds="true"), "seconds = True, wanted a positive number"),
        (toml(seconds="inf"), "seconds = inf, wanted a positive number"),
        (toml(stretch='"a"'), "stretch = 'a', wanted a positive number"),
        (toml(cases='"op/shape/bf16"'), "cases = 'op/shape/bf16', wanted a list of names"),
        (toml(cases=None), "wants either cases, a variant, a setting, or gpus"),
        (toml(variant='"a"', stage='"chunk"'), "wants either cases, a variant, a setting, or gpus"),
        (toml(cases=None, variant='"a"'), "a stage goes with a variant or gpus, and these need one"),
        (toml(stage='"chunk"'), "a stage goes with a variant or gpus, and these need one"),
        (toml(ratio="1.0"), "a ratio needs a peer"),
        (toml(peer='"best"'), "a ratio needs a peer, and a peer a ratio"),
        (toml(cases=None, variant='"a"', stage='"chunk"', backend='"b"'), "a backend goes with cases"),
        (toml(cases=None, gpus="8", stage='"fps"'), "a link goes with gpus, and gpus need one"),
        (toml(link='"H800"'), "a link goes with gpus"),
        (toml(size='"64x64"'), "a size goes with gpus"),
        (toml(cases=None, gpus="8", link='"H800"', stage='"fps"', size='"big"'), "a size is WIDTHxHEIGHT"),
        (toml(cases=None, gpus='"8"', link='"H800"', stage='"fps"'), "gpus = '8', wanted a number of GPUs"),
        (toml(cases=None, gpus="8", link='"H800"', stage='"decode"'), "have the stages fps, first_frame"),
        (
            toml(cases=None, setting='"a"', seconds=None, at_least="1"),
            "a quality or a visit goes with a setting, and a",
        ),
        (toml(quality='"a"'), "a quality or a visit goes with a setting, and a setting needs one of them"),
        (
            toml(cases=None, setting='"a"', visit='"speed"', seconds=None, at_most="1"),
            "a visit has offset, told_offset",
        ),
        (toml(cases=None, setting='"a"', visit='"offset"'), "seconds is not a key of it; there are"),
        (toml(cases=None, setting='"a"', quality='"b"', stage='"chunk"'), "seconds is not a key of it"),
        (toml(kind='"gpu"'), "kind = 'gpu', wanted cuda or cpu"),
        (toml(device='"H100("'), "device is no regular expression"),
    ],
)
def test_a_malformed_file_is_refused_by_entry(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "targets.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_targets(tmp_path / "targets.toml")
    assert complaint in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "targets.toml"))


# --- The command ----------------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "targets", *map(str, arguments)])
    return main()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(RUN, tmp_path / "results" / "a.json")
    (tmp_path / "results" / "broken.json").write_text("{")
    (tmp_path / "goals.toml").write_text(toml(name='"fast"', stretch="0.001") + toml(name='"faster"', seconds="0.008"))
    return tmp_path


def test_the_command_is_good_only_if_all_goals_are_met(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--results", folder / "results", "--file")
    assert call(monkeypatch, *common, folder / "goals.toml") == 1
    out = capsys.readouterr().out
    assert "missed by 25%" in out
    assert "a.json" in out
    assert "1 met, 1 missed, 0 unmeasured" in out
    assert "broken.json is not JSON" in " ".join(out.split())
    (folder / "easy.toml").write_text(toml())
    assert call(monkeypatch, *common, folder / "easy.toml") == 0
    (folder / "unmeasured.toml").write_text(toml() + toml(cases='["x/y/z", "x/y/w"]'))
    capsys.readouterr()
    assert call(monkeypatch, *common, folder / "unmeasured.toml") == 3
    assert "2 cases" in capsys.readouterr().out
    assert call(monkeypatch, *common, folder / "unmeasured.toml", "--allow-unmeasured") == 0
    (folder / "both.toml").write_text(toml(seconds="0.001") + toml(cases='["x/y/z"]'))
    assert call(monkeypatch, *common, folder / "both.toml", "--allow-unmeasured") == 1


def test_the_json_has_value_shortfall_and_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "results" / "a.json"
    assert call(monkeypatch, "--results", file, "--file", folder / "goals.toml", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["counts"] == {"met": 1, "missed": 1}
    met, missed = document["targets"]
    assert (met["verdict"], met["value"], met["file"], met["stretched"]) == ("met", 0.01, str(file), False)
    assert missed["shortfall"] == pytest.approx(0.25)
    assert missed["target"]["name"] == "faster"


def test_mistakes_are_told_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, complaint in (
        (("--file", folder / "none.toml"), "none.toml cannot be read"),
        (("--file", folder / "goals.toml", "--results", folder / "none"), "none cannot be read"),
        (("--file", folder / "goals.toml", "--results", folder / "results" / "broken.json"), "is not JSON"),
    ):
        assert call(monkeypatch, *arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert complaint in err
        assert len(err.splitlines()) == 1
