"""Campaigns on the CPU with cases that take no time: hangs, crashes, wrong results, budgets, resuming."""

import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from model.errors import UserError
from profiling.__main__ import main
from profiling.formats import load
from profiling.measure import campaign
from profiling.measure.campaign import CampaignProgress, plan_tasks
from profiling.measure.e2e import VARIANTS
from profiling.results import ERROR, OK, WRONG, Run, save
from tests.processes import ROOT, Interpreter
from tests.profiling import toy

CPU = torch.device("cpu")
TOY = Path(toy.__file__)
RUN_CHILD = campaign._run_child

# Children measure little, and know the smallest system there is. No task takes too long, however busy the machine is,
# but the one that hangs: it ends as the watchdog would end it, if the watchdog was set.
CHILD = """
import faulthandler, os, sys
from profiling.measure import bench, campaign
from profiling.__main__ import main
from tests.profiling.toy import WATCHED
from tests.small import SMALL
for phase in campaign.TIME_LIMITS:
    campaign.TIME_LIMITS[phase] = campaign.TimeLimits(0.1, 100_000)
def watch(seconds, exit):
    os.environ[WATCHED] = str(exit and seconds == 100_000)
faulthandler.dump_traceback_later = watch
campaign.CONFIGS["cpu"] = SMALL
campaign.ROUNDS = 3
bench.CEILING_SIZES["cpu"] = bench.CeilingSizes(2**20, 64, 1)
sys.exit(main())
"""


@pytest.fixture(autouse=True)
def children(monkeypatch: pytest.MonkeyPatch, python: Interpreter) -> list[float]:
    """Starts such children in place of the real ones; gives the list of the seconds that they may take."""
    started: list[float] = []

    def child(command_line: Sequence[str], seconds: float) -> int:
        started.append(seconds)
        return python.start("-c", CHILD, *command_line[3:], capture=False).wait()

    monkeypatch.setattr(campaign, "_run_child", child)
    monkeypatch.chdir(ROOT)
    return started


@pytest.fixture
def timed_children(monkeypatch: pytest.MonkeyPatch, children: list[float]) -> list[float]:
    """The same, but they import everything, and are killed when their time is up."""

    def child(command_line: Sequence[str], seconds: float) -> int | None:
        children.append(seconds)
        return RUN_CHILD([sys.executable, "-c", CHILD, *command_line[3:]], seconds)

    monkeypatch.setattr(campaign, "_run_child", child)
    return children


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "gpu", "--device", "cpu", *map(str, arguments)])
    return main()


def statuses(run: Run) -> dict[str, dict[str, str]]:
    return {c.operation: {m.backend: m.status for m in c.measurements} for c in run.cases}


def test_what_hangs_crashes_or_is_wrong_costs_itself_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, children: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--phase", "check,bench", "--out", tmp_path, "--budget", 1200, "--only", "toy_", "--cases", TOY)
    assert call(monkeypatch, *arguments) == 1
    check_backend, bench = load(tmp_path / "check.json"), load(tmp_path / "bench.json")
    outcome = {
        "toy_good": OK,
        "toy_wrong": WRONG,
        "toy_raises": ERROR,
        "toy_hangs": ERROR,
        "toy_crashes": ERROR,
        "toy_last": OK,
    }
    assert statuses(check_backend) == {name: {"ours": status} for name, status in outcome.items()}
    assert statuses(bench) == {name: {"ours": status, "peer": OK} for name, status in outcome.items()}
    assert all(not m.samples for c in check_backend.cases for m in c.measurements)
    assert all(len(m.samples) == 3 for c in bench.cases for m in c.measurements if m.status == OK)
    lost = next(c for c in bench.cases if c.operation == "toy_hangs").of("ours")
    assert lost is not None
    assert lost.detail == campaign.LOST
    assert bench.ceilings.copy_bytes_s
    # One child more for each of the two that ended one, in the first phase; the second phase knows of them.
    assert len(children) == 3
    assert "bench: 6 done, 0 not reached" in capsys.readouterr().out

    before = (tmp_path / "bench.json").read_bytes()
    assert call(monkeypatch, *arguments) == 1
    assert (tmp_path / "bench.json").read_bytes() == before, "a second call has nothing left to do"


def test_the_budget_holds_and_a_later_call_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, timed_children: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """No child can begin a task in so short a time."""
    monkeypatch.setattr(campaign, "CHILD_START_SECONDS", 0.0)
    budget = 0.1
    arguments = ("--phase", "bench", "--out", tmp_path, "--only", "toy_good", "--cases", TOY)
    assert call(monkeypatch, *arguments, "--budget", budget) == 0
    assert all(seconds <= budget for seconds in timed_children)
    assert "bench: 0 done, 1 not reached" in capsys.readouterr().out
    assert CampaignProgress.load(tmp_path).task == "", "what the end of the budget cut off is not to blame"
    assert call(monkeypatch, *arguments, "--budget", 600, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["bench"]["cases"][0]["measurements"][0]["status"] == OK


def test_results_of_another_machine_are_not_added_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = campaign.describe_machine(CPU)
    save(Run("x", "", campaign.replace(other, device="another")), tmp_path / "check.json")
    arguments = ("--phase", "check", "--out", tmp_path, "--only", "toy_good", "--cases", TOY)
    assert call(monkeypatch, *arguments) == 2
    assert "was measured on another" in capfd.readouterr().err


def test_a_chunk_from_end_to_end_with_its_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert call(monkeypatch, "--phase", "e2e", "--out", tmp_path, "--only", "fp32-eager", "--budget", 1200) == 0
    (variant,) = load(tmp_path / "e2e.json").variants
    assert variant.status == OK
    assert len(variant.chunk) >= 2
    assert variant.trace == "fp32-eager.json.gz"
    assert (tmp_path / variant.trace).stat().st_size > 1000
    assert variant.gaps is None


def test_tuning_writes_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from profiling.cases import Backend\nfrom tests.profiling.toy import PEER, case, launched\n"
        "waits = [{'wait': n} for n in (8, 0, -1)]\n"
        "mine = Backend('mine', launched, ours=True, configs=lambda dims: waits)\n"
        "CASES = [case('toy_tuned', mine, PEER)]\n"
    )
    assert call(monkeypatch, "--phase", "tune", "--out", tmp_path, "--only", "toy_tuned", "--cases", file) == 0
    (table,) = (tmp_path / "tuned").glob("*.json")
    assert "toy_tuned" in table.read_text()


def test_one_gpu_comes_first_then_the_largest_world() -> None:
    tasks = plan_tasks(CPU, ["chunk_attention/14b-w?/bf16"], None)
    assert [c.shape.world for c in tasks.cases["bench"]] == [1, 8, 4, 2]
    assert tasks.variants == []
    assert plan_tasks(CPU, ["fp32-eager"], None).names("bench") == []
    assert plan_tasks(CPU, ["fp32-eager"], None).names("e2e") == ["fp32-eager"]
    everything = plan_tasks(torch.device("cuda"), [], None)
    assert everything.names("e2e") == [variant.name for variant in VARIANTS["cuda"]]
    assert all("14b" in name for name in everything.names("bench"))
    assert set(everything.names("check")) <= set(everything.names("bench"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--phase", "play"], "use check, bench, tune, e2e"),
        (["--phase", "check", "--budget", "0"], "--budget 0"),
        (["--phase", "check", "--only", "nothing"], "there is no case nothing"),
        (["--phase", "check", "--out", "/proc/none"], "cannot be written"),
    ],
)
def test_mistakes_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    out = [] if "--out" in arguments else ["--out", tmp_path]
    assert call(monkeypatch, *arguments, *out) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_blames_no_task(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """The child has begun a task when the parent is told to end; a second call does that task."""
    child = campaign._run_child

    def interrupted(command_line: Sequence[str], seconds: float) -> int | None:
        CampaignProgress.load(tmp_path).record(tmp_path, "check", "toy_good", "right")
        signal.raise_signal(number)
        return child(command_line, seconds)

    arguments = "--phase", "check", "--out", tmp_path, "--cases", TOY, "--only", "toy_good", "--budget", 600
    monkeypatch.setattr(campaign, "_run_child", interrupted)
    assert call(monkeypatch, *arguments) == 130
    assert "interrupted: results written so far are kept" in capsys.readouterr().err
    assert (CampaignProgress.load(tmp_path).phase, CampaignProgress.load(tmp_path).task) == ("", "")


def test_a_lost_task_that_is_no_longer_requested_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    CampaignProgress(0, time.time() + 60, code=campaign.code_digest()).record(tmp_path, "check", "gone/s/fp32", "right")
    worker = campaign.Worker(tmp_path, CPU, plan_tasks(CPU, ["linear/tiny-w1-out/fp32"], None))
    worker._open_phase("check")
    worker._record_lost_task()
    assert (worker._progress.task, worker._progress.lost, worker._run.cases) == ("", {}, ())


def test_results_of_another_version_of_the_code_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CampaignProgress(0, time.time() + 60, code="that of yesterday").record(tmp_path)
    arguments = "--phase", "check", "--out", tmp_path, "--cases", TOY, "--only", "toy_good"
    assert call(monkeypatch, *arguments) == 2
    assert "holds results of another version of the code; use another --out" in capsys.readouterr().err


def test_damaged_progress_is_reported(tmp_path: Path) -> None:
    (tmp_path / campaign.PROGRESS).write_text('{"seed": 1, "what": 2}')
    with pytest.raises(UserError, match=r"cannot be read .*; use another --out"):
        CampaignProgress.load(tmp_path)
