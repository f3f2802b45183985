"""Projections of runs whose times are round numbers, compared with sums made by hand."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from model.config import PRESETS
from model.errors import UserError
from profiling.__main__ import main
from profiling.analyse.project import BEST, OURS, Link, communication, divided_chunk, merged, parse_link, project
from profiling.cases import Case, registry
from profiling.results import OK, WRONG, CaseResult, Machine, Measurement, Run, VariantResult, save

CONFIG = PRESETS["flashtalk-14b"]
LINK = Link("test", 2e11)  # 100 GB/s one way
H100 = Machine("cuda", "NVIDIA H100", 132, 80)
# Seconds of a chunk at one GPU, by stage and operation: all its cases together.
WHOLE = {
    ("denoise", "chunk_attention"): 0.8,
    ("denoise", "linear"): 2.0,
    ("denoise", "text_image_attention"): 0.16,
    ("denoise", "audio_layer"): 0.04,
    ("denoise", "layer_norm_modulate"): 0.2,
    ("denoise", "rms_norm_rope"): 0.1,
    ("decode and motion", "causal_conv3d"): 0.305,
    ("decode and motion", "rms_norm_silu"): 0.06,
    ("decode and motion", "upsample_conv2d"): 0.02,
    ("decode and motion", "downsample_conv2d"): 0.01,
    ("decode and motion", "chunk_attention"): 0.005,
    ("color", "lab_transfer"): 0.02,
}
DENOISE, DECODE, COLOR = 3.3, 0.4, 0.02
Counts = dict[tuple[str, str, int, str], int]  # cases of a stage, operation, world size and dtype


def made_up(without: str = "") -> Run:
    """14B on 1, 2 and 8 GPUs: `WHOLE` over the world size by a peer, twice that by ours; in fp8 half of it."""
    everything = registry()
    names = [name for name in everything if "/14b-" in name and name != without]
    cases = [case for name in names if (case := everything[name]).shape.world in (1, 2, 8)]
    counts: Counts = {}
    for case in cases:
        if case.shape.calls:
            key = (case.shape.stage, case.operation.name, case.shape.world, case.dtype)
            counts[key] = counts.get(key, 0) + 1
    return Run("bench", "2026-01-01", H100, cases=tuple(result(case, counts) for case in cases))


def result(case: Case, counts: Counts) -> CaseResult:
    name, stage, world, calls = case.operation.name, case.shape.stage, case.shape.world, case.shape.calls
    seconds = 99.0  # of what has no calls
    if calls:
        share = WHOLE.get((stage, name), 0.0) / world / counts[stage, name, world, case.dtype]
        seconds = share / calls * (0.5 if case.dtype == "fp8" else 1)
    measurements = (
        Measurement("peer", OK, samples=(seconds, 0.9 * seconds, 7 * seconds)),
        Measurement("wrong", WRONG),
        Measurement("kernel", OK, ours=True, samples=(2 * seconds,)),
    )
    about = case.name, name, case.shape.name, case.dtype, case.flops, case.bytes
    return CaseResult(*about, world, calls, measurements=measurements)


@pytest.fixture(scope="module")
def run() -> Run:
    return made_up()


# --- Communication --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "exchange", "heads", "video", "motion"),
    [
        # GB a chunk for the exchanges of attention; MB a step for the heads; MB a chunk for frames; kB for latents.
        (1, 0.0, 0.0, 0.0, 0.0),
        (2, 19.818, 1.548, 34.06, 172.0),
        (4, 14.864, 2.322, 51.09, 258.0),
        (8, 8.670, 2.709, 59.61, 301.1),
    ],
)
def test_bytes_are_those_of_the_published_layout(
    world: int, exchange: float, heads: float, video: float, motion: float
) -> None:
    sent = communication(CONFIG, world)
    assert sent["denoise"] == pytest.approx(exchange * 1e9 + 4 * heads * 1e6, rel=1e-4)
    assert sent["decode and motion"] == pytest.approx(video * 1e6 + motion * 1e3, rel=1e-3)


# --- Sums -----------------------------------------------------------------------------------------------------------


def test_every_operation_of_a_chunk_has_a_stage() -> None:
    found = {(case.shape.stage, case.operation.name) for case in registry().values() if case.shape.calls}
    assert {stage for stage, _ in found} == {stage for stage, _ in WHOLE}
    assert found >= WHOLE.keys(), "what this file makes up is in no chunk"


def test_kernels_and_communication_add_up(run: Run) -> None:
    found, _, preset = project(run, (1, 8), LINK)
    assert preset == "flashtalk-14b"
    rows = {(p.world, p.dtype, p.kernels): p for p in found}
    assert set(rows) == {(w, d, k) for w in (1, 8) for d in ("bf16", "fp8") for k in (BEST, OURS)}
    one, eight = rows[1, "bf16", BEST], rows[8, "bf16", BEST]
    assert one.stages == pytest.approx({"denoise": DENOISE, "decode and motion": DECODE, "color": COLOR})
    assert (one.communication, one.rest) == (0, 0)
    assert one.chunk == pytest.approx(3.72)
    assert one.fps == pytest.approx(28 / 3.72)
    assert eight.stages == pytest.approx({"denoise": DENOISE / 8, "decode and motion": DECODE / 8, "color": COLOR / 8})
    assert eight.communication == pytest.approx((8.6813 + 0.0599) / 100, rel=1e-3)
    assert eight.chunk == pytest.approx(3.72 / 8 + 0.087412, rel=1e-4)
    assert rows[8, "bf16", OURS].stages == pytest.approx({s: 2 * t for s, t in eight.stages.items()})
    # FP8 halves self-attention, linear layers and the norms before them, which are all that has cases in it.
    assert rows[1, "fp8", BEST].stages["denoise"] == pytest.approx(DENOISE - 1.5)


def test_startup_is_denoising_and_the_decoding_of_the_first_nine_frames(run: Run) -> None:
    found, *_ = project(run, (1, 8), LINK)
    one, eight = (p for p in found if (p.dtype, p.kernels) == ("bf16", BEST))
    assert one.startup == pytest.approx(DENOISE + DECODE * 9 / 33 + COLOR * 4 / 28)
    sent = DENOISE / 8 + 0.086813 + (DECODE / 8 + 0.000599) * 9 / 33 + COLOR / 8 * 4 / 28
    assert eight.startup == pytest.approx(sent, rel=1e-4)


def measured(name: str, chunk: float, first: float) -> VariantResult:
    return VariantResult(name, OK, chunk=(chunk, 0.99 * chunk, 2 * chunk), first_frame=(first,) * 3, frames=28)


def test_what_a_measured_chunk_takes_beyond_our_kernels_is_added_everywhere(run: Run) -> None:
    """Our kernels take 7.44 s: the chunk of 8 s has 0.56 s more, at every world size and with every set of kernels."""
    first = 2 * (DENOISE + DECODE * 9 / 33 + COLOR * 4 / 28)
    variants = (
        measured("bf16-eager", 9.0, 8.0),
        measured("bf16-compiled", 8.0, first + 0.25),
        measured("fp8-eager", 1, 1),
    )
    found, overheads, _ = project(dataclasses.replace(run, variants=variants), (1, 8), LINK)
    bf16, fp8 = overheads
    assert (bf16.variant, bf16.chunk) == ("bf16-compiled", 8.0)
    assert (bf16.kernels, bf16.rest, bf16.startup_rest) == pytest.approx((7.44, 0.56, 0.25))
    assert (fp8.variant, fp8.rest) == ("fp8-eager", 0.0)  # it claims to be faster than its kernels: nothing is carried
    rows = {(p.world, p.kernels): p for p in found if p.dtype == "bf16"}
    assert rows[1, OURS].chunk == pytest.approx(8.0)
    assert rows[1, OURS].startup == pytest.approx(first + 0.25)
    assert rows[8, BEST].chunk == pytest.approx(3.72 / 8 + 0.087412 + 0.56, rel=1e-4)


def test_a_measured_chunk_can_be_divided() -> None:
    stages = {"denoise/step": (0.4,) * 8, "decode": (0.1,) * 4, "motion": (0.05,) * 2, "color": (0.02,) * 2}
    chunk = VariantResult("bf16-eager", OK, stages=stages, chunk=(2.0, 2.0), first_frame=(1.7, 1.7), frames=28)
    one, two = (divided_chunk(chunk, "bf16", CONFIG, world, LINK) for world in (1, 2))
    assert one is not None
    assert two is not None
    assert one.stages == pytest.approx({"denoise": 1.6, "decode and motion": 0.25, "color": 0.02})
    assert (one.chunk, one.rest, one.startup, one.fps) == pytest.approx((2.0, 0.13, 1.7, 14))
    sent = communication(CONFIG, 2)
    assert two.chunk == pytest.approx(1.87 / 2 + 0.13 + sum(sent.values()) / 1e11)
    assert two.startup == pytest.approx(0.8 + 0.1 + sent["denoise"] / 1e11)
    assert divided_chunk(dataclasses.replace(chunk, stages={}), "bf16", CONFIG, 2, LINK) is None


def test_a_missing_case_leaves_no_number() -> None:
    found, *_ = project(made_up(without="rms_norm_rope/14b-w8/bf16"), (1, 4, 8), LINK)
    rows = {p.world: p for p in found if (p.dtype, p.kernels) == ("bf16", BEST)}
    assert rows[1].lacks == ()
    assert rows[8].lacks == ("rms_norm_rope/14b-w8/bf16",)
    assert (rows[8].chunk, rows[8].startup, rows[8].fps) == (None, None, None)
    assert "linear/14b-w4-qkv/bf16" in rows[4].lacks


def test_only_right_kernels_count(run: Run) -> None:
    wrong = (Measurement("kernel", WRONG, ours=True), Measurement("peer", OK, samples=(0.01,)))
    cases = tuple(
        dataclasses.replace(c, measurements=wrong) if c.case == "lab_transfer/14b-w1/fp32" else c for c in run.cases
    )
    found, *_ = project(dataclasses.replace(run, cases=cases), (1,), LINK)
    rows = {p.kernels: p for p in found if p.dtype == "bf16"}
    assert rows[OURS].lacks == ("lab_transfer/14b-w1/fp32",)
    assert rows[BEST].stages["color"] == pytest.approx(7 * 0.01)


def test_a_world_size_without_cases_is_reported(run: Run) -> None:
    found, *_ = project(run, (3,), LINK)
    assert {p.lacks for p in found} == {("any case of 3 GPUs",)}


# --- The command ----------------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "project", *map(str, arguments)])
    return main()


def test_links_have_names_or_a_rate() -> None:
    assert parse_link("H100").one_way == 450e9
    assert parse_link("H800").one_way == 200e9
    assert parse_link("64").one_way == 32e9
    for text in ("A100", "0", "-5", "nan", "inf"):
        with pytest.raises(UserError, match=r"name a device \(H100, H800, .*\), or give GB/s"):
            parse_link(text)


def test_what_is_printed_is_called_a_projection_and_names_its_assumptions(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(dataclasses.replace(run, variants=(measured("bf16-eager", 8.0, 1.0),)), tmp_path / "run.json")
    assert call(monkeypatch, tmp_path / "run.json", "--gpus", "8,1,2", "--link", "H800") == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "Projection, not a measurement",
        "flashtalk-14b on NVIDIA H100",
        "400 GB/s in both directions, 200 one way",
        "bf16-eager took 8.00 s a chunk, its kernels 7.44 s",
        "projected: bf16, the best of all kernels",
        "1 GPU 2 GPUs 8 GPUs",
        "all 4.28 s",
    ):
        assert text in out
    assert call(monkeypatch, tmp_path / "run.json", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["projection"] is True
    assert document["link"] == {"name": "H100", "bytes_s": 9e11}
    assert document["measured"][0]["rest"] == pytest.approx(0.56)
    assert any("no latency" in text for text in document["assumptions"])
    incomplete = [row for row in document["rows"] if row["world"] == 4]
    assert all(row["chunk"] is None and row["lacks"] for row in incomplete)


def test_if_nothing_can_be_projected_the_answer_is_no(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run, tmp_path / "run.json")
    assert call(monkeypatch, tmp_path / "run.json", "--gpus", "4") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "4 GPUs: incomplete, lacks 30 times:" in out
    assert "linear: 14b-w4-down/bf16, 14b-w4-out/bf16, 14b-w4-qkv/bf16, 14b-w4-up/bf16" in out


def test_a_folder_is_one_run_of_the_newest_cases_of_the_commonest_device(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    half = len(run.cases) // 2
    first, second = (dataclasses.replace(run, cases=c) for c in (run.cases[:half], run.cases[half:]))
    slower = dataclasses.replace(run.cases[0], measurements=(Measurement("k", OK, ours=True, samples=(9.0,)),))
    older = dataclasses.replace(run, started="2025-01-01", cases=(slower,))
    other = dataclasses.replace(older, machine=dataclasses.replace(H100, device="another"), started="2027-01-01")
    together = merged([other, first, second, older])
    assert together.machine == H100
    assert {case.case: case for case in together.cases} == {case.case: case for case in run.cases}
    for i, part in enumerate((first, second, older, other)):
        save(part, tmp_path / f"{i}.json")
    assert call(monkeypatch, tmp_path, "--gpus", "1") == 0
    assert "incomplete" not in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(Run("audit", "2026-01-01", H100), tmp_path / "run.json")
    for arguments, complaint in (
        (("--gpus", "1,x"), "--gpus 1,x: give numbers of GPUs"),
        (("--gpus", "0,1"), "--gpus 0,1: give numbers of GPUs"),
        (("--link", "nvlink"), "--link nvlink: name a device (H100"),
        ((), "has no cases that a chunk is made of"),
    ):
        assert call(monkeypatch, tmp_path / "run.json", *arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert complaint in err
        assert len(err.splitlines()) == 1
