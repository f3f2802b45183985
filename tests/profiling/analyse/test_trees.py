"""Verdicts on trees of results: files, folders, and what git keeps."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from profiling.formats import from_json
from profiling.results import ERROR, SKIPPED, Measurement, Run, save, to_json
from tests.profiling.analyse.compared import MACHINE, VERSIONS, call, case, later, measured, run, variant


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
