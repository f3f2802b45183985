"""`bisect` under git itself, in a repository whose `bench` reads its times from a file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from profiling.__main__ import main
from profiling.results import OK, CaseResult, Machine, Measurement, Run, as_json_text, save, to_json

CHECKOUT = Path(__file__).parents[3]
CASE = "o/s/d"
BENCH = """
import json, sys
from pathlib import Path
assert sys.argv[1:3] == ["bench", "o/s/d"] and sys.argv[3:7] == ["--device", "cpu", "--rounds", "10"], sys.argv
state = json.loads(Path("state.json").read_text())
if state["file"]:
    Path(sys.argv[sys.argv.index("--out") + 1]).write_text(state["file"])
sys.exit(state["code"])
"""


def run(factor: float = 1.0, backend: str = "m", device: str = "CPU", day: int = 2) -> Run:
    samples = tuple(factor * (1 + 1e-3 * (i * 7 % 10)) for i in range(10))
    case = CaseResult(CASE, "o", "s", "d", 1.0, 1.0, measurements=(Measurement(backend, OK, True, samples=samples),))
    return Run("bench", f"2026-01-0{day}", Machine("cpu", device, 1, 1), cases=(case,))


def broken() -> Run:
    case = CaseResult(CASE, "o", "s", "d", 1.0, 1.0, measurements=(Measurement("m", "wrong", True, "off by one"),))
    return Run("bench", "2026-01-02", Machine("cpu", "CPU", 1, 1), cases=(case,))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "checkout"
    (folder / "profiling").mkdir(parents=True)
    (folder / "profiling" / "__init__.py").touch()
    (folder / "profiling" / "__main__.py").write_text(BENCH)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    save(run(day=1), tmp_path / "good.json")
    monkeypatch.chdir(folder)
    git("init", "-q")
    return folder


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout


def bench_gives(found: Run | None, code: int = 0) -> None:
    text = as_json_text(to_json(found)) if found else ""
    Path("state.json").write_text(json.dumps({"file": text, "code": code}))


def step(monkeypatch: pytest.MonkeyPatch, good: str = "../good.json", case: str = CASE) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "bisect", case, "--good", good, "--rounds", "10"])
    return main()


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("found", "code", "answer"),
    [
        (run(1.001), 0, 0),
        (run(0.8), 0, 0),
        (run(1.2), 0, 1),
        (broken(), 1, 1),
        (run(backend="other"), 0, 125),  # the back-end is not there yet
        (None, 2, 125),
        (None, 0, 125),
        (run(), 2, 125),
        (run(device="another CPU"), 0, 128),
    ],
)
def test_a_step_answers_in_exit_codes_of_git_bisect(
    monkeypatch: pytest.MonkeyPatch, found: Run | None, code: int, answer: int
) -> None:
    bench_gives(found, code)
    assert step(monkeypatch) == answer


@pytest.mark.usefixtures("repository")
def test_a_mistake_ends_the_bisection_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_gives(run())
    for good, case, said in (
        ("../none.json", CASE, "none.json cannot be read"),
        ("../good.json", "o/other/d", "has no time of ours on o/other/d; measure it at a good revision"),
    ):
        assert step(monkeypatch, good, case) == 128
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    Path("state.json").write_text(json.dumps({"file": "{", "code": 0}))
    assert step(monkeypatch) == 125
    assert "cannot be measured: " in capsys.readouterr().err


@pytest.mark.usefixtures("repository")
def test_git_finds_the_first_bad_revision() -> None:
    """With the driver of another checkout, as for revisions that have none; one revision cannot be measured."""
    for name, found, code in (
        ("first", run(), 0),
        ("no bench", None, 2),
        ("second", run(1.001), 0),
        ("slow", run(1.2), 0),
        ("slow too", run(1.21), 0),
        ("last", run(1.2), 0),
    ):
        bench_gives(found, code)
        git("add", "-A")
        git("commit", "-q", "--allow-empty", "-m", name)
    git("bisect", "start", "HEAD", "HEAD~5")
    driver = [sys.executable, "-P", "-m", "profiling", "bisect", CASE, "--good", "../good.json", "--rounds", "10"]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    subprocess.run(["git", "bisect", "run", *driver], env=environment, check=True, capture_output=True)
    assert git("log", "-1", "--format=%s", "refs/bisect/bad").strip() == "slow"
