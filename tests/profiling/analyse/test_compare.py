"""Verdicts on whole runs, and on trees of results: files, folders, and what git keeps."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profiling.__main__ import main
from profiling.analyse.verdicts import Comparison
from profiling.formats import from_json
from profiling.results import (
    ERROR,
    NOT_INSTALLED,
    OK,
    SKIPPED,
    WRONG,
    CaseResult,
    Ceilings,
    Machine,
    Measurement,
    NvmlTrace,
    Run,
    VariantResult,
    save,
    to_json,
)
from tests.profiling.runs import compare_runs

# --- Runs -----------------------------------------------------------------------------------------------------------

VERSIONS = {"python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0", "flashtalk-triton": "0.1.0"}
MACHINE = Machine("cuda", "NVIDIA H100", 132, 80, "9.0", 50, "580.1", VERSIONS, "1" * 40)


def measured(backend: str, seconds: float, ours: bool = True, seed: int = 0) -> Measurement:
    rng = np.random.default_rng([seed, len(backend), ours])
    return Measurement(backend, OK, ours, samples=tuple((seconds * np.exp(0.005 * rng.standard_normal(20))).tolist()))


def case(name: str, *measurements: Measurement) -> CaseResult:
    return CaseResult(name, *name.split("/"), flops=1e9, bytes=1e6, measurements=measurements)


def run(*cases: CaseResult, machine: Machine = MACHINE, **more: Any) -> Run:
    return Run("bench", "2026-01-01T00:00:00+00:00", machine, cases=cases, **more)


def later(r: Run, day: int = 2) -> Run:
    """The same run on another day, on which every case takes a ten-thousandth longer for each day."""

    def anew(m: Measurement) -> Measurement:
        return dataclasses.replace(m, samples=tuple((1 + 1e-4 * day) * seconds for seconds in m.samples))

    cases = (dataclasses.replace(c, measurements=tuple(map(anew, c.measurements))) for c in r.cases)
    return dataclasses.replace(r, started=f"2026-01-{day:02}T00:00:00+00:00", cases=tuple(cases))


def verdicts(found: Sequence[Comparison]) -> dict[str, str]:
    return {f"{row.name}: {row.part}": row.change.verdict for row in found}


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "compare", *map(str, arguments)])
    return main()


def files(tmp_path: Path, *runs: Run) -> list[Path]:
    paths = [tmp_path / f"{name}.json" for name, _ in zip("abcdef", runs, strict=False)]
    for path, r in zip(paths, runs, strict=True):
        save(r, path)
    return paths


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


def variant(chunk: float, peak: int = 2**30, status: str = OK) -> VariantResult:
    if status != OK:
        return VariantResult("bf16-eager", status, "OutOfMemoryError")
    chunks = tuple(chunk * f for f in (1.0, 1.01, 0.99, 1.005, 0.995, 1.0))
    stages = {"denoise/step": tuple(c / 8 for c in chunks for _ in range(4)), "decode": tuple(c / 4 for c in chunks)}
    first = tuple(c * 0.6 for c in chunks)
    return VariantResult("bf16-eager", OK, stages=stages, chunk=chunks, first_frame=first, frames=28, peak_bytes=peak)


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


# --- Git ------------------------------------------------------------------------------------------------------------


class Repository:
    """A git repository with a folder of results."""

    def __init__(self, path: Path) -> None:
        self.path, self.results = path, path / "results"
        self.results.mkdir()
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=self.path, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, **runs: Run) -> str:
        for name, r in runs.items():
            save(r, self.results / f"{name}.json")
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "m")
        return self.git("rev-parse", "HEAD")


def of(seconds: float, started: str, revision: str | None = None, device: str = "NVIDIA H100") -> Run:
    machine = dataclasses.replace(MACHINE, revision=revision, device=device)
    return dataclasses.replace(run(case("o/s/d", measured("m", seconds)), machine=machine), started=started)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def ratio(capsys: pytest.CaptureFixture[str]) -> float:
    return json.loads(capsys.readouterr().out)["rows"][0]["change"]["ratio"]


def test_a_revision_stands_for_the_newest_results_measured_at_it(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = repository.commit()
    repository.git("tag", "v1")
    head = repository.commit(old=of(1e-3, "2026-01-01", base), new=of(2e-3, "2026-01-02", base))
    repository.commit(now=of(4e-3, "2026-01-01", head), dirty=of(9e-3, "2026-01-09", f"{head}-dirty"))
    assert call(monkeypatch, "v1", "HEAD~1", "--results", repository.results, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["rows"][0]["change"]["ratio"] == pytest.approx(2)
    (runs,) = document["runs"]
    assert (runs["before"]["file"], runs["after"]["file"]) == ("HEAD:results/new.json", "HEAD:results/now.json")


def test_what_was_measured_at_the_first_revision_alone_is_not_missing_at_the_second(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = repository.commit(a=dataclasses.replace(run(case("else/s/d", measured("m", 1e-3))), started="2026-01-01"))
    head = repository.commit()
    repository.commit(b=of(1e-3, "2026-01-02", base))
    assert call(monkeypatch, "HEAD~2", "HEAD~1", "--results", repository.results) == 3
    assert "nothing was measured between " in capsys.readouterr().err
    other = dataclasses.replace(MACHINE, revision=head)
    repository.commit(c=later(run(case("else/s/d", measured("m", 1e-3)), machine=other), 3))
    assert call(monkeypatch, "HEAD~3", "HEAD~2", "--results", repository.results, "--json") == 1
    assert document(capsys)["counts"] == {"missing": 1, "same": 1}, "there, other cases were measured"


def test_a_revision_without_its_own_stands_for_the_newest_results_in_its_tree(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = repository.commit(a=of(1e-3, "2026-01-01"), b=of(2e-3, "2026-01-02"))
    repository.commit(c=of(3e-3, "2026-01-03"))
    assert call(monkeypatch, first[:12], "main", "--results", repository.results, "--json") == 1
    assert ratio(capsys) == pytest.approx(1.5)
    assert call(monkeypatch, "main~1", repository.results / "a.json", "--results", repository.results, "--json") == 0
    assert ratio(capsys) == pytest.approx(0.5)


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_files_that_measure_other_cases_are_joined_by_case(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file each of two operations and of a chunk, then one of them anew: nothing is missing."""
    other = dataclasses.replace(run(case("else/s/d", measured("m", 1e-3))), started="2026-01-05")
    chunk = dataclasses.replace(run(variants=(variant(1.0),)), started="2026-01-06")
    repository.commit(a=of(1e-3, "2026-01-01"), b=other, c=chunk)
    repository.commit(d=of(1.5e-3, "2026-01-09"))
    assert call(monkeypatch, "HEAD~1", "HEAD", "--results", repository.results, "--json") == 1
    found = document(capsys)
    assert found["counts"] == {"slower": 1, "not measured in between": 6}
    assert found["rows"][0]["change"]["ratio"] == pytest.approx(1.5)
    assert [file.split(":")[1] for file in found["rows"][0]["files"]] == ["results/a.json", "results/d.json"]
    repository.git("rm", "-q", "results/b.json")
    repository.commit()
    assert call(monkeypatch, "HEAD~1", "HEAD", "--results", repository.results, "--json") == 1
    assert document(capsys)["counts"] == {"missing": 1, "not measured in between": 6}, "its whole tree lacks it"


def test_a_later_file_that_could_not_measure_a_case_does_not_hide_it(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.commit(a=of(1e-3, "2026-01-01"))
    late = Measurement("m", SKIPPED, True, "no time was left")
    repository.commit(
        b=later(run(case("o/s/d", late), case("else/s/d", measured("m", 1e-3)))),
    )
    assert call(monkeypatch, "HEAD~1", "HEAD", "--results", repository.results, "--json") == 0
    assert document(capsys)["counts"] == {"new": 1, "not measured in between": 1}
    checked = dataclasses.replace(measured("m", 1e-3), samples=())
    repository.commit(check=later(run(case("o/s/d", checked)), 3))
    assert call(monkeypatch, "HEAD~2", "HEAD", "--results", repository.results, "--json") == 0
    assert document(capsys)["counts"] == {"new": 1, "not measured in between": 1}, "right, but not timed"
    lost = Measurement("all", ERROR, True, "ended the process")  # what a campaign writes
    repository.commit(c=later(run(case("o/s/d", lost)), 4))
    assert call(monkeypatch, "HEAD~1", "HEAD", "--results", repository.results, "--json") == 1
    assert document(capsys)["counts"] == {"missing": 1, "new": 1, "not measured in between": 1}


def test_results_written_anew_in_another_schema_are_the_same_measurements(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    r = of(1e-3, "2026-01-01")
    measurement = {
        "backend": "folded",
        "status": "ok",
        "ours": True,
        "samples": list(r.cases[0].measurements[0].samples),
    }
    old = {
        "case": "audio_attention/s/bf16", "operation": "audio_attention", "shape": "s", "dtype": "bf16", "flops": 1.0,
        "bytes": 1.0, "dims": {"per_frame": 4, "channels": 8}, "measurements": [measurement],
    }  # fmt: skip
    new = old | {"case": "audio_layer/s/bf16", "operation": "audio_layer", "dims": {"per_frame": 4, "head_dim": 8}}
    for version, values in ((1, old), (2, new)):
        content = to_json(r) | {"version": version, "cases": [values]}
        (repository.results / "a.json").write_text(json.dumps(content))
        repository.commit()
    save(from_json(content, "a.json"), repository.results / "a.json")
    repository.commit()
    for first, second in (("HEAD~2", "HEAD~1"), ("HEAD~1", "HEAD"), ("HEAD~2", "HEAD")):
        assert call(monkeypatch, first, second, "--results", repository.results) == 3
        assert "nothing was measured between " in capsys.readouterr().err


def test_devices_are_compared_each_by_itself(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.commit(a=of(1e-3, "2026-01-01"), cpu=of(50e-3, "2026-01-05", device="some CPU"))
    repository.commit(b=of(3e-3, "2026-01-09"))
    assert call(monkeypatch, "HEAD~1", "HEAD", "--results", repository.results, "--json") == 1
    found = document(capsys)
    assert found["counts"] == {"slower": 1, "not measured in between": 1}
    assert found["rows"][0]["change"]["ratio"] == pytest.approx(3)
    repository.git("rm", "-q", "results/a.json", "results/b.json")
    repository.commit()
    assert call(monkeypatch, "HEAD~2", "HEAD", "--results", repository.results, "--json") == 3
    assert "nothing was measured between " in capsys.readouterr().err, (
        "the case is there, though of another device only"
    )


def test_other_versions_spoil_what_they_measured_only(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = dataclasses.replace(MACHINE, versions=VERSIONS | {"torch": "2.12.0"})
    both = case("o/s/d", measured("m", 1e-3)), case("else/s/d", measured("m", 1e-3))
    repository.commit(a=run(*both))
    repository.commit(b=later(run(case("else/s/d", measured("m", 1.5e-3)), machine=other)))
    assert call(monkeypatch, "HEAD~1", "HEAD", "--results", repository.results) == 2
    assert "torch 2.11.0 / 2.12.0" in capsys.readouterr().err
    repository.commit(c=later(run(both[0], machine=MACHINE), 3))
    assert call(monkeypatch, "HEAD~2", "HEAD", "--results", repository.results, "--json") == 0
    found = document(capsys)
    assert found["counts"] == {"unsure": 1, "same": 1}
    assert found["rows"][0]["change"]["detail"] == "not compared: torch 2.11.0 / 2.12.0"
    assert found["notes"][0].startswith("not compared: ")
    assert call(monkeypatch, "HEAD~2", "HEAD", "--results", repository.results, "--json", "--force") == 1
    assert document(capsys)["counts"] == {"slower": 1, "same": 1}


def test_a_committed_file_that_nobody_reads_any_more_may_hold_what_a_tree_lacks(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository.results / "old.json").write_text('{"argv": ["--budget", "1"]}')
    repository.commit(a=of(1e-3, "2026-01-05"))
    repository.git("rm", "-q", "results/old.json")
    anew = dataclasses.replace(run(case("else/s/d", measured("m", 1e-3))), started="2026-01-01")
    repository.commit(old=anew)
    for first, second in (("HEAD~1", "HEAD"), ("HEAD", "HEAD~1")):
        assert call(monkeypatch, first, second, "--results", repository.results, "--json") == 0
        found = document(capsys)
        assert found["counts"] == {"unsure": 1, "not measured in between": 1}
        assert found["rows"][0]["change"]["detail"] == "perhaps in a file that cannot be read any more"
        assert "old.json" in found["notes"][0]


def test_folders_and_files_are_compared_like_revisions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run(case("else/s/d", measured("m", 1e-3)))
    for folder, runs in {
        "a": {"x": of(1e-3, "2026-01-01"), "deep/y": other},
        "b": {"x": of(1e-3, "2026-01-01"), "y": other, "z": of(1.5e-3, "2026-01-03")},
    }.items():
        for name, r in runs.items():
            save(r, tmp_path / folder / f"{name}.json")
    (tmp_path / "b" / "trace.json").write_text('{"traceEvents": []}')
    assert call(monkeypatch, tmp_path / "a", tmp_path / "b", "--json") == 1
    assert document(capsys)["counts"] == {"slower": 1, "not measured in between": 1}
    assert call(monkeypatch, tmp_path / "a", tmp_path / "b" / "z.json", "--json") == 1
    found = document(capsys)
    assert found["counts"] == {"slower": 1}, "a file says nothing about cases that it lacks"
    assert found["notes"][-1].endswith("/z.json lacks their cases: 1")
    assert call(monkeypatch, tmp_path / "b" / "z.json", tmp_path / "a", "--json") == 0
    assert document(capsys)["counts"] == {"faster": 1}
    (tmp_path / "b" / "bad.json").write_text('{"schema": "flashtalk-profile", "version": 1}')
    assert call(monkeypatch, tmp_path / "a", tmp_path / "b") == 2
    assert "bad.json is damaged" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert call(monkeypatch, tmp_path / "none", tmp_path / "a") == 2
    assert "no file in" in capsys.readouterr().err


def test_two_revisions_with_the_same_results_are_not_compared_with_themselves(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.commit(a=of(1e-3, "2026-01-01"), b=of(2e-3, "2026-01-02"))
    repository.commit()
    assert call(monkeypatch, "HEAD~1", "HEAD", "--results", repository.results) == 3
    assert "nothing was measured between " in capsys.readouterr().err
    repository.commit(campaign=of(2e-3, "2026-01-03"))  # the same rounds, in a file of another beginning
    assert call(monkeypatch, "HEAD~1", "HEAD", "--results", repository.results) == 3
    assert "nothing was measured between " in capsys.readouterr().err
    repository.commit(c=of(4e-3, "2026-01-04"))
    assert call(monkeypatch, "HEAD", "HEAD~1", "--results", repository.results, "--json") == 0
    assert ratio(capsys) == pytest.approx(0.5)  # backwards too


def test_a_revision_without_results_says_what_to_do(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.commit()
    (repository.results / "bad.json").write_text('{"schema": "flashtalk-profile", "version": 0}')
    repository.commit(empty=run())  # an audit, say: no times
    assert call(monkeypatch, "HEAD", "HEAD", "--results", repository.results) == 2
    assert "no readable results of HEAD" in (err := capsys.readouterr().err)
    assert "bench --out" in err
    assert call(monkeypatch, "nobranch", "HEAD", "--results", repository.results) == 2
    assert "nobranch is neither a file, a folder nor a git revision" in capsys.readouterr().err
