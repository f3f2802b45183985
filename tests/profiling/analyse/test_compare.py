"""Verdicts on whole runs."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from profiling.results import ERROR, NOT_INSTALLED, SKIPPED, WRONG, Ceilings, Measurement, NvmlTrace
from tests.processes import ROOT
from tests.profiling.analyse.compared import (
    MACHINE,
    VERSIONS,
    call,
    case,
    files,
    later,
    measured,
    run,
    variant,
    verdicts,
)
from tests.profiling.runs import compare_runs


def test_comparing_needs_no_torch() -> None:
    """A bisection compares at each of its steps; importing torch would take several times as long."""
    code = "import sys, profiling.analyse.bisection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_each_change_of_status_has_its_verdict_and_regressions_come_first() -> None:
    wrong, error = Measurement("m", WRONG, True, "relative error 1"), Measurement("m", ERROR, True, "RuntimeError: no")
    absent, late = Measurement("m", NOT_INSTALLED, True), Measurement("m", SKIPPED, True, "no time was left")
    fine, slow = measured("m", 1e-3), measured("m", 1.2e-3, seed=1)
    fates: dict[str, Sequence[Any]] = {  # before, after, verdict
        "slower": (fine, slow, "slower"),
        "faster": (slow, fine, "faster"),
        "same": (fine, fine, "same"),
        "wrong": (fine, wrong, "broken"),
        "error": (fine, error, "broken"),
        "skipped": (fine, late, "missing"),
        "gone": (fine, None, "missing"),
        "born": (None, fine, "new"),
        "installed": (absent, fine, "new"),
        "mended": (wrong, fine, "fixed"),
        "ill": (wrong, error, "still broken"),
        "born ill": (None, wrong, "new"),
        "never": (absent, late, None),
    }
    runs = [run(*(case(f"{name}/s/d", fate[i]) for name, fate in fates.items() if fate[i])) for i in (0, 1)]
    found = compare_runs(runs[0], later(runs[1]))
    assert verdicts(found) == {f"{name}/s/d: m": verdict for name, (*_, verdict) in fates.items() if verdict}
    regressed = [row.regressed for row in found]
    assert regressed == sorted(regressed, reverse=True)
    assert sum(regressed) == 5
    assert found[0].change.verdict == "broken"
    assert found[0].change.detail in ("wrong: relative error 1", "error: RuntimeError: no")


def test_peers_are_shown_but_are_no_regression_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a = run(case("op/s/d", measured("ours", 1e-3), measured("peer", 1e-3, ours=False)))
    b = run(case("op/s/d", measured("ours", 1e-3, seed=1), measured("peer", 1.3e-3, ours=False, seed=1)))
    assert verdicts(compare_runs(a, b)) == {"op/s/d: ours": "same", "op/s/d: peer": "slower"}
    assert call(monkeypatch, *files(tmp_path, a, b)) == 0
    assert call(monkeypatch, *files(tmp_path, b, a)) == 0


def test_a_shift_that_peers_share_is_not_our_change() -> None:
    """The machine is 8 % slower in the second run: that much, or less, is not put down to us."""
    a = run(
        case("op/s/d", measured("ours", 1e-3), measured("peer", 1e-3, ours=False)),
        case("alone/s/d", measured("m", 1e-3)),
    )
    for slower, verdict in ((1.07, "same"), (1.2, "slower")):
        b = run(
            case("op/s/d", measured("ours", slower * 1e-3, seed=1), measured("peer", 1.08e-3, ours=False, seed=2)),
            case("alone/s/d", measured("m", slower * 1e-3, seed=3)),
        )
        found = verdicts(compare_runs(a, b))
        assert found == {"op/s/d: ours": verdict, "op/s/d: peer": "slower", "alone/s/d: m": verdict}
    other = dataclasses.replace(MACHINE, versions=VERSIONS | {"torch": "2.12.0"})
    b = run(
        case("op/s/d", measured("ours", 1.07e-3, seed=1), measured("peer", 1.08e-3, ours=False, seed=2)), machine=other
    )
    assert verdicts(compare_runs(a, b))["op/s/d: ours"] == "slower", "peers of another version are no measure"


def test_own_code_compiled_and_peers_that_shifted_the_other_way_explain_nothing() -> None:
    quiet = [case(f"quiet{i}/s/d", measured("peer", 1e-3, ours=False, seed=i)) for i in range(3)]
    a = run(case("op/s/d", measured("ours", 1e-3), measured("compiled", 1e-3, ours=False)), *quiet)
    b = run(case("op/s/d", measured("ours", 2.8e-3, seed=1), measured("compiled", 2.8e-3, ours=False, seed=2)), *quiet)
    assert verdicts(compare_runs(a, b))["op/s/d: ours"] == "slower"
    a = run(case("op/s/d", measured("ours", 1e-3), measured("peer", 1e-3, ours=False)), *quiet)
    b = run(case("op/s/d", measured("ours", 1.4e-3, seed=1), measured("peer", 0.6e-3, ours=False, seed=2)), *quiet)
    assert verdicts(compare_runs(a, b))["op/s/d: ours"] == "slower"


def test_variants_are_compared_by_chunk_stage_and_memory() -> None:
    a, b = run(variants=(variant(1.0),)), run(variants=(variant(1.1, peak=3 * 2**29),))
    found = compare_runs(a, b)
    assert verdicts(found) == {
        "bf16-eager: chunk": "slower",
        "bf16-eager: first frame": "slower",
        "bf16-eager: denoise/step": "slower",
        "bf16-eager: decode": "slower",
        "bf16-eager: peak memory": "larger",
    }
    step = next(row for row in found if row.part == "denoise/step")
    assert step.before == pytest.approx(0.5)  # four steps of an eighth
    assert step.rounds == (6, 6)
    assert all(row.regressed for row in found)
    memory = verdicts(compare_runs(a, run(variants=(variant(1.0, peak=2**30 + 2**23),))))["bf16-eager: peak memory"]
    assert memory == "same"
    assert verdicts(compare_runs(b, a))["bf16-eager: peak memory"] == "smaller"
    assert verdicts(compare_runs(a, run(variants=(variant(1.0, status=ERROR),)))) == {"bf16-eager: chunk": "broken"}


def test_a_pair_timed_in_one_run_only_or_in_another_way_says_so() -> None:
    fine = measured("m", 1e-3)
    untimed, graph = dataclasses.replace(fine, samples=()), dataclasses.replace(fine, graph=True)
    for before, after, verdict, detail in (
        (fine, untimed, "unsure", "timed in one run only"),
        (untimed, untimed, "same", "right, not timed"),
        (fine, graph, "same", "timed as a CUDA graph in one run only"),
    ):
        (row,) = compare_runs(run(case("o/s/d", before)), later(run(case("o/s/d", after))))
        assert (row.change.verdict, row.change.detail) == (verdict, detail)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"device": "NVIDIA H200"}, "device NVIDIA H100 / NVIDIA H200"),
        ({"driver": "590.2"}, "driver 580.1 / 590.2"),
        ({"units": 114}, "multiprocessors 132 / 114"),
        ({"versions": VERSIONS | {"torch": "2.12.0"}}, "torch 2.11.0 / 2.12.0"),
        ({"versions": VERSIONS | {"python": "3.13.3"}}, "python 3.12 / 3.13"),
    ],
)
def test_other_devices_and_versions_are_not_compared_unless_forced(
    change: Mapping[str, Any],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = dataclasses.replace(MACHINE, **change)
    a, b = files(
        tmp_path,
        run(case("o/s/d", measured("m", 1e-3))),
        later(run(case("o/s/d", measured("m", 1e-3)), machine=machine)),
    )
    assert call(monkeypatch, a, b) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err
    assert "--force" in err
    assert len(err.splitlines()) == 1
    assert call(monkeypatch, a, b, "--force", "--json") == 0
    (forced,) = json.loads(capsys.readouterr().out)["forced"]
    assert named in forced
    assert call(monkeypatch, a, b, "--force") == 0
    assert "forced: " in capsys.readouterr().out


def test_own_version_python_patch_level_and_missing_facts_may_differ(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"python": "3.12.9", "torch": "2.11.0", "flashtalk-triton": "0.2.0", "numpy": "2.3"}
    machine = dataclasses.replace(MACHINE, versions=versions, revision="2" * 40)
    paths = files(
        tmp_path,
        run(case("o/s/d", measured("m", 1e-3))),
        later(run(case("o/s/d", measured("m", 1e-3)), machine=machine)),
    )
    assert call(monkeypatch, *paths, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["forced"] == []
    assert document["notes"] == ["stated by one run only, so not compared: numpy, triton"]


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("2.11.0", "2.11.0+cu130", "same"),
        ("2.11.0+cu130", "2.11.0", "same"),
        ("2.11.0+cu130", "2.11.0+cu130", "same"),
        ("2.11.0+cu126", "2.11.0+cu130", "torch 2.11.0+cu126 / 2.11.0+cu130"),
        ("2.11.0", "2.11.1+cu130", "torch 2.11.0 / 2.11.1+cu130"),
    ],
)
def test_two_spellings_of_a_version_are_one(
    first: str,
    second: str,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machines = [dataclasses.replace(MACHINE, versions=VERSIONS | {"torch": torch}) for torch in (first, second)]
    runs = [later(run(case("o/s/d", measured("m", 1e-3)), machine=m), i + 1) for i, m in enumerate(machines)]
    code = call(monkeypatch, *files(tmp_path, *runs))
    out, err = capsys.readouterr()
    assert verdict in (out or err)
    assert code == (0 if verdict == "same" else 2)


def test_each_circumstance_that_differs_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("tuned", "ecc", "persistence", "container", "environment")
    first = dict(zip(names, ("aa", True, True, False, {"A": "1", "B": "x", "C": "same"}), strict=True))
    second = dict(zip(names, ("bb", False, False, True, {"A": "2", "C": "same"}), strict=True))
    runs = [
        later(
            run(
                case("o/s/d", measured("m", 1e-3)),
                machine=dataclasses.replace(MACHINE, **facts),
                nvml=NvmlTrace(power_limit_watts=watts),
            ),
            day,
        )
        for day, facts, watts in ((1, first, 700.0), (2, second, 500.0), (3, {}, None))
    ]
    a, b, old = files(tmp_path, *runs)
    assert call(monkeypatch, a, b, "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [
        "table of launch parameters: aa in the first run, bb in the second",
        "power limit: 700 W in the first run, 500 W in the second",
        "ECC: on in the first run, off in the second",
        "persistence mode: on in the first run, off in the second",
        "inside a container: no in the first run, yes in the second",
        "environment variable A: 1 in the first run, 2 in the second",
        "environment variable B: x in the first run, not set in the second",
    ]
    assert call(monkeypatch, a, old, "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [], "a file of an earlier version does not say"


def test_notes_tell_what_happened_to_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = [measured("ours", 1e-3), measured("peer", 1e-3, ours=False)]
    after = [measured("ours", 1e-3), measured("peer", 1.2e-3, ours=False)]
    a = run(case("o/s/d", *peers), ceilings=Ceilings(3e12, {"bf16": 7e14}))
    b = run(
        case("o/s/d", *after),
        machine=dataclasses.replace(MACHINE, revision="2" * 40 + "-dirty"),
        ceilings=Ceilings(2.88e12, {"bf16": 7.05e14, "fp8": 1e15}),
        nvml=NvmlTrace(throttled={"power cap": 0.4}),
    )
    assert call(monkeypatch, *files(tmp_path, a, b), "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [
        "the second run was throttled: power cap 40% of the time",
        f"the second run was made with uncommitted changes: {'2' * 40}-dirty",
        "in the second run the machine copied 4.0% slower",
        "peers, whose code did not change, became 20% slower (median of 1): perhaps the machine did",
    ]


def test_the_table_and_the_json_tell_a_regression_and_the_exit_code_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"o{i}/s/d" for i in range(60)]
    a, b = (
        run(*(case(n, measured("m", 1e-3)) for n in names)),
        run(*(case(n, measured("m", 1e-3, seed=1)) for n in names)),
    )
    b = dataclasses.replace(b, cases=(*b.cases[1:], case("o0/s/d", measured("m", 1.1e-3, seed=1))))
    paths = files(tmp_path, a, b)
    assert call(monkeypatch, *paths) == 1
    out = capsys.readouterr().out
    assert "SLOWER" in out
    assert "o0/s/d" in out
    assert "o7/s/d" not in out  # of many rows, those that stayed the same are counted
    assert "1 slower, 59 same" in out
    assert "1 regressed" in out
    assert call(monkeypatch, *paths, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["regressed"] is True
    assert document["counts"] == {"slower": 1, "same": 59}
    first = document["rows"][0]
    assert (first["name"], first["regressed"], first["rounds"]) == ("o0/s/d", True, [20, 20])
    assert first["change"]["low"] < first["change"]["ratio"] < first["change"]["high"]
    assert first["change"]["ratio"] == pytest.approx(1.1, abs=0.01)
    assert call(monkeypatch, *paths, "--threshold", "0.2") == 0


def test_the_table_for_a_pull_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Measurement("m", ERROR, True, "no | <b>\nsecond line")
    a = run(*(case(f"{name}/s/d", measured("m", 1e-3)) for name in ("slow", "same", "odd")), variants=(variant(1.0),))
    b = run(
        case("slow/s/d", measured("m", 1.1e-3, seed=1)),
        case("same/s/d", measured("m", 1e-3, seed=1)),
        case("odd/s/d", odd),
        variants=(variant(1.001, peak=3 * 2**29),),
    )
    assert call(monkeypatch, *files(tmp_path, a, later(b)), "--markdown") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "**3 regressed**: 1 broken, 1 slower, 1 larger, 5 same"
    assert lines[2] == "| verdict | case | back-end | before | after | ratio | 99 % sure | noise |"
    assert lines[4] == "| **broken** (error: no \\| &lt;b> second line) | `odd/s/d` | m | 999 µs |  |  |  |  |"
    assert lines[5].startswith("| **slower** | `slow/s/d` | m | 999 µs | 1.10 ms | 1.")
    assert lines[6] == "| **larger** | `bf16-eager` | peak memory | 1.00 GiB | 1.50 GiB | 1.500 |  |  |"
    assert lines[7] == ""
    assert lines[8] == "<details><summary>Compared runs</summary>"
    assert f"- {tmp_path}/a.json (2026-01-01T00:00:00+00:00, 111111111), with " in lines[11]
    assert lines[-1] == "</details>"
    assert call(monkeypatch, *files(tmp_path, a, b), "--markdown", "--json") == 2


def test_further_runs_are_taken_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds = (1e-3, 1.06e-3, 0.93e-3)
    a, b, c = files(tmp_path, *(run(case("o/s/d", measured("m", s, seed=i))) for i, s in enumerate(seconds)))
    assert call(monkeypatch, a, b) == 1
    assert call(monkeypatch, a, b, "--again", c) == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("a.json", "none.json"), "none.json is neither a file, a folder nor a git revision"),
        (("a.json", "a.json", "--threshold", "5"), "--threshold 5.0: it is a share between 0 and 1"),
        (("a.json", "b.json"), "hold no times"),
        (("a.json", "broken.json"), "broken.json is not JSON"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: Sequence[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files(tmp_path, run(), run())
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert len(err.splitlines()) == 1
