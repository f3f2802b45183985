"""The report: a page that needs nothing else, its verdict, and the command that writes it."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from model.errors import UserError
from profiling import tables
from profiling.__main__ import TARGETS, main
from profiling.analyse.targets import MET, MISSED, UNMEASURED
from profiling.cases.evidence import RESULTS
from profiling.formats import as_peers
from profiling.report import report
from profiling.report.verdict import Tile
from profiling.results import Ceilings, Run, save
from tests.profiling import runs
from tests.profiling.report.pages import VARIATIONS, cases_alone, checked, evidence, hostile, page_of
from tests.profiling.runs import HOSTILE, SOME, TINY_CASE, TINY_RUN

COMMITTED = sorted(RESULTS.glob("*.json"))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "report", *map(str, arguments)])
    return main()


# --- The page -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variation", VARIATIONS)
def test_every_kind_of_run_makes_a_page(variation: str, earlier: list[Run]) -> None:
    found = evidence(VARIATIONS[variation](runs.run(patterns=SOME, days=9)), earlier)
    drawn = report.draw_figures(found)
    page = checked(report.render_page(found, drawn))
    assert page.pictures == [f"figure-{name}" for name in drawn]
    anchors = [link[1:] for link in page.links if link.startswith("#")]
    assert len(anchors) == len(page.headings) > 0  # no section is empty, or cannot be reached
    json.dumps(report.report_json(found.run), allow_nan=False)
    report.show(found, Console(file=io.StringIO()))


def test_a_run_of_nothing_has_no_empty_section() -> None:
    page = checked(page_of(VARIATIONS["nothing"](runs.run(patterns=SOME))))
    assert page.headings == ["Machine"]
    assert page.pictures == []


def test_hostile_names_are_escaped(earlier: list[Run]) -> None:
    text = page_of(hostile(runs.run(patterns=SOME)), earlier, [HOSTILE])
    assert "<script>alert" not in text
    page = checked(text)
    assert page.text.count(HOSTILE) > 20
    assert page.pictures == ["figure-timeline", "figure-roofline", "figure-gauges"]


def test_the_page_says_what_matters(whole: Run, earlier: list[Run]) -> None:
    page = checked(page_of(whole, earlier, ["old.json has schema version 0, this is version 1"]))
    assert page.headings == [
        "Goals",
        "Chunk",
        "Roofline",
        "Cases and peers",
        "History",
        "Audit",
        "Clock, power, temperature",
        "Machine",
    ]
    assert page.pictures == ["figure-timeline", "figure-roofline", "figure-history", "figure-gauges"]
    assert page.text.count(runs.GPU.device) == 2  # in the title of the window, and in that of the page
    for words in (
        "The GPU was throttled: power cap in 17% of the readings. The times below are those of a throttled GPU.",
        "fp8-kernels, 1.95 times as fast as bf16-eager",
        "torch-compiled on rms_norm_rope/14b-w1/bf16",
        "No module named 'flash_attn'",
        "spills 312 bytes, budget 0",
        "48 HGMMA",
        "tensor 14.7 ms",
        "torchao was not installed",
        "old.json has schema version 0",
        runs.GPU.revision or "",
        "2026-01-10 09:30:00 UTC, took 431 s",
        "torch 2.11.0+cu130",
        "denoise/step, each of 4",
        "160 calls a chunk",
    ):
        assert words in page.text, words


def test_one_call_is_not_one_calls() -> None:
    once = replace(TINY_RUN, cases=(replace(TINY_CASE, calls=1),))
    assert "; 1 call a chunk" in checked(page_of(once)).text


def test_uncommitted_changes_are_marked() -> None:
    machine = replace(runs.GPU, revision="0123456789abcdef-dirty-77")
    text = page_of(replace(TINY_RUN, machine=machine))
    assert '<span class="bad">012345678, with uncommitted changes</span>' in text


def test_a_kernel_without_a_bound_is_not_modelled() -> None:
    kernel = replace(runs.audit()[0], bounds={}, tile={}, tflops=None)
    page = checked(page_of(Run("audit", "2026-01-01T00:00:00+00:00", runs.GPU, audit=(kernel,))))
    assert "not modelled" in page.text
    assert "0.00" not in page.text


def test_the_default_back_end_is_marked_even_if_it_is_slower() -> None:
    text = page_of(runs.run(patterns=("chunk_attention/14b-w1/bf16",)))
    lead, *others = re.findall(r'<tr class="ours[^>]*>.*?</tr>', text, re.DOTALL)
    assert "gluon" in lead
    assert ">default<" in lead
    assert len(others) == 1
    assert "triton" in others[0]
    assert ">default<" not in others[0]


def test_a_default_that_was_not_timed_is_named() -> None:
    run = runs.run(patterns=("chunk_attention/14b-w1/bf16",))
    (case,) = run.cases
    others = tuple(m for m in case.measurements if m.backend != "gluon")
    page = checked(page_of(replace(run, cases=(replace(case, measurements=others),))))
    assert "by default runs gluon, not timed here" in page.text


# --- The verdict ----------------------------------------------------------------------------------------------------


def tile_of(found: report.Evidence, name: str) -> Tile | None:
    return next((tile for tile in found.tiles if tile.name == name), None)


def test_goals_are_those_that_the_run_is_about() -> None:
    run = runs.run(patterns=("chunk_attention/14b-w1/bf16",))
    found = evidence(replace(run, variants=()))
    assert {goal.target.subject for goal in found.goals} == {"chunk_attention/14b-w1/bf16"}
    verdicts = [goal.verdict for goal in found.goals]
    assert verdicts == sorted(verdicts, key=(MISSED, UNMEASURED, MET).index)
    tile = tile_of(found, "Goals met")
    assert tile is not None
    assert tile.value == f"{verdicts.count(MET)} of {len(verdicts)}"
    assert evidence(replace(run, machine=runs.CPU, variants=())).goals == []
    assert evidence(as_peers(replace(run, variants=()))).goals == []  # kernels of another program answer no goal


def test_the_biggest_loss_and_gain_are_against_the_newest_earlier_run() -> None:
    names = ("chunk_attention/14b-w1/bf16", "rms_norm_rope/14b-w1/bf16", "lab_transfer/14b-w1/fp32")
    oldest, before = (cases_alone(runs.run(seed=i, patterns=names, days=i, spoilt=False)) for i in (1, 2))
    factors = {names[0]: 0.8, names[1]: 1.1, names[2]: 1.4}
    now = cases_alone(runs.run(seed=3, patterns=names, days=3, slower=factors, spoilt=False))
    later = cases_alone(runs.run(seed=4, patterns=names, days=4, slower={names[0]: 9}, spoilt=False))
    found = evidence(now, [oldest, before, later])
    assert {row.files for row in found.changed} == {("1.json", "run.json")}
    regressed, loss, gain = (tile_of(found, name) for name in ("Regressed", "Biggest loss", "Biggest gain"))
    assert regressed is not None
    assert (regressed.value.split()[0], regressed.detail, regressed.tone) == ("2", "since 1", "bad")
    assert loss is not None
    assert names[2] in loss.detail
    assert 35 < float(loss.value.strip("+%")) < 45
    assert gain is not None
    assert names[0] in gain.detail
    assert gain.value.startswith("\u2212")


@pytest.mark.parametrize(
    "others",
    [
        [],
        [runs.run(patterns=("linear/14b-w1-out/bf16",))],
        [runs.run(patterns=("*/tiny-w1/*",), machine=runs.CPU)],
        [runs.run(patterns=SOME, machine=replace(runs.GPU, driver="1.0"))],
    ],
    ids=["none", "other cases", "another device", "another driver"],
)
def test_without_a_comparable_run_one_line_says_so(others: list[Run]) -> None:
    found = evidence(cases_alone(runs.run(patterns=SOME, days=3)), list(map(cases_alone, others)))
    assert found.changed == []
    tile = tile_of(found, "Since the last run")
    assert tile is not None
    assert tile.detail.startswith("no comparable run")


def test_shares_of_a_ceiling_that_was_measured_too_low_are_the_true_ones(tmp_path: Path) -> None:
    slow = replace(runs.run(patterns=SOME), ceilings=Ceilings(2.4e12, {"bf16": 7e14}))
    launched = replace(runs.run(patterns=SOME, days=2), ceilings=Ceilings(3.0e12, {"bf16": 7e14}, copy_launched=True))
    save(slow, tmp_path / "slow.json")
    save(launched, tmp_path / "results" / "launched.json")
    found = report.gather_evidence(tmp_path / "slow.json", tmp_path / "results", TARGETS)
    assert found.run.ceilings.copy_bytes_s == 3.0e12
    assert [run.started for _, run in found.others] == [launched.started]
    assert "copy's ceiling is 3.00 TB/s, of launched.json" in checked(page_of(found.run)).text


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_a_committed_run_is_not_its_own_predecessor(file: Path) -> None:
    found = report.gather_evidence(file, RESULTS, TARGETS)
    assert len(found.others) == len(COMMITTED) - 1
    assert found.run not in [run for _, run in found.others]


# --- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    save(runs.run(patterns=SOME, days=9), path)
    return path


def test_the_command_writes_page_and_pictures(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results"
    save(runs.run(seed=1, patterns=SOME), folder / "old.json")
    (folder / "broken.json").write_text("{")
    page, pictures = tmp_path / "new" / "report.html", tmp_path / "pictures"
    assert call(monkeypatch, saved, "-o", page, "--png", pictures, "--results", folder) == 0
    assert "broken.json is not JSON" in checked(page.read_text()).text
    names = {"timeline", "roofline", "history", "gauges"}
    assert {path.name for path in pictures.iterdir()} == {f"{name}.png" for name in names}
    assert all(Image.open(path).width == 1000 for path in pictures.iterdir())


def test_json_is_all_that_is_printed(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, saved, "--json", "--results", saved.parent / "none") == 0
    values = json.loads(capsys.readouterr().out)
    run = runs.run(patterns=SOME, days=9)
    assert [row["ratio"] for row in values["cases"]] == [row.ratio for row in tables.measurement_rows(run)]
    assert [row["fps"] for row in values["variants"]] == [row.fps for row in tables.variant_rows(run)]
    assert values["throttled"] == run.nvml.throttled


def test_tables_are_printed_where_no_file_is_asked_for(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, saved) == 0
    out = capsys.readouterr().out
    for words in (
        "lab_transfer/14b-w1/fp32",
        "sageattention: not",
        "fp8-kernels",
        "attention_kernel",
        "The GPU was throttled",
    ):
        assert words in " ".join(out.split())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no results"),
        ('{"schema": "flashtalk-profile", "version": 99}', "has schema version 99"),
        ('{"schema": "flashtalk-profile", "version": 1, "command": 7}', "is damaged"),
    ],
)
def test_a_malformed_run_is_refused_in_one_line(
    content: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    assert call(monkeypatch, path, "-o", tmp_path / "report.html") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} ")
    assert why in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    save(TINY_RUN, saved)
    taken = tmp_path / "taken"
    taken.mkdir()
    for out, png in ((taken, None), (saved / "report.html", None), (None, saved)):
        with pytest.raises(UserError, match="cannot be written"):
            report.report_command(saved, out, png, tmp_path, TARGETS, False)
    before = saved.read_bytes()
    with pytest.raises(UserError, match="is the run itself, which would be lost"):
        report.report_command(saved, saved, None, tmp_path, TARGETS, False)
    assert saved.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [saved, taken]
    assert not list(taken.iterdir())
