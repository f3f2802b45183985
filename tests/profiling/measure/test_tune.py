"""The tuner: what it finds, what it leaves out and why, how it keeps to its time, and the table it writes.

Also a file for `--cases`.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import tuning
from kernels.tuning import TunedConfig, TunedEntry, device_slug, nearest_config, read_table, to_json
from profiling.__main__ import main
from profiling.cases import Backend, Call, Case, Operation, Shape, no_setup
from profiling.machine import describe_machine
from profiling.measure import bench, timing, tune
from profiling.measure.tune import TuningResult, candidates, tune_case, write_table
from profiling.results import Ceilings
from tests.processes import Interpreter
from tests.profiling import attention_kernel
from tests.profiling.clock import CLOCK

CPU = torch.device("cpu")


def doubling(x: Tensor, config: Mapping[str, int] | None = None) -> Call:
    """Doubles x in `wait` milliseconds; what is negative is a mistake of some kind."""
    wait = (config or {})["wait"]
    if wait == -1:
        raise RuntimeError("out of resource: shared memory\nand a long story")

    def call() -> Tensor:
        if wait == -2:
            out = torch.empty_like(x)
            torch.mul(x[1:], 2, out=out[1:])
            return out
        if wait == -3:
            return x * 2.01
        CLOCK.sleep(wait / 1000)
        return x * 2

    return call


def waiting(*waits: int, name: str = "ours") -> Backend:
    return Backend(name, doubling, ours=True, configs=lambda _: ({"wait": wait} for wait in waits))


def peer(wait: int, name: str = "peer") -> Backend:
    return Backend(name, lambda x: doubling(x, {"wait": wait}))


def case(name: str, *backends: Backend, calls: float = 0, n: int = 100) -> Case:
    operation = Operation(
        name=name,
        inputs=lambda d, randn: (randn(d["n"]),),
        reference=lambda x: x * 2,
        flops=lambda d: float(d["n"]),
        bytes=lambda d, item: 2.0 * item * d["n"],
        backends={"fp32": backends},
        is_matmul=False,
    )
    return Case(operation, Shape("toy", {"n": n}, calls=calls), "fp32", 1e-5)


EAGER = Backend("eager", no_setup(lambda x: x + x), ours=True)
CASES = [
    case("tune_good", waiting(3, 1), peer(6)),
    case("tune_broken", waiting(-1, -2), peer(2)),
    case("tune_nothing", EAGER, peer(2)),
    Case(
        dataclasses.replace(attention_kernel.OPERATION, name="tune_attention"),
        Shape("small", {"queries": 20, "keys": 84, "heads": 1, "head_dim": 16}),
        "fp32",
        1e-5,
    ),
]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    CLOCK.stand_in(monkeypatch, timing, tune)


def soon(seconds: float) -> float:
    return CLOCK.monotonic() + seconds


def entry_of(outcome: TuningResult) -> TunedEntry:
    assert outcome.entry is not None
    return outcome.entry


# --- One case -------------------------------------------------------------------------------------------------------


def test_the_fastest_right_parameters_win_and_every_wrong_one_is_out_with_its_reason() -> None:
    outcome = tune_case(case("toy", waiting(6, -1, 1, -2, -3, 3), peer(4), peer(-3, "wrong")), CPU, soon(60), 0)
    entry = entry_of(outcome)
    assert (entry.operation, entry.dtype, entry.dims) == ("toy", "fp32", {"n": 100})
    assert (entry.backend, entry.configs) == ("ours", {"ours": {"wait": 1}})
    assert entry.seconds.keys() == {"ours", "peer"}
    assert 0.001 < entry.seconds["ours"] < entry.seconds["peer"]
    assert (outcome.kernel, outcome.peer, outcome.tried, outcome.untried) == ("ours", "peer", 6, 0)
    assert outcome.ratio == pytest.approx(entry.seconds["peer"] / entry.seconds["ours"])
    assert not outcome.broken
    reasons = {(f.backend, (f.config or {}).get("wait")): f.why for f in outcome.failed}
    assert reasons.keys() == {("ours", -1), ("ours", -2), ("ours", -3), ("wrong", None)}
    assert reasons["ours", -1] == "RuntimeError: out of resource: shared memory"
    assert "NaN" in reasons["ours", -2]
    assert "relative error" in reasons["ours", -3]
    assert entry.versions["torch"] == describe_machine(CPU).versions["torch"]


def test_a_faster_peer_wins_and_our_best_parameters_are_kept() -> None:
    """Of two kernels each has its own parameters; one without any may win as well."""
    two = (waiting(8, 5), waiting(9, 7, name="gluon"))
    outcome = tune_case(case("toy", *two, peer(1)), CPU, soon(60), 0)
    entry = entry_of(outcome)
    assert entry.backend == "peer"
    assert entry.configs == {"ours": {"wait": 5}, "gluon": {"wait": 7}}
    assert (outcome.kernel, outcome.peer) == ("ours", "peer")
    assert outcome.ratio is not None
    assert outcome.ratio < 0.5
    with_eager = tune_case(case("toy", two[0], EAGER, peer(3)), CPU, soon(60), 0)
    assert entry_of(with_eager).backend == "eager"
    assert (with_eager.kernel, with_eager.peer) == ("ours", "peer")


def test_no_right_candidate_is_no_entry() -> None:
    outcome = tune_case(case("toy", waiting(-1, -3), peer(1)), CPU, soon(60), 0)
    assert outcome.broken
    assert (outcome.entry, outcome.tried, len(outcome.failed)) == (None, 2, 2)


def test_only_what_runs_on_the_device_is_a_candidate() -> None:
    ours = waiting(1, 2)
    elsewhere = dataclasses.replace(ours, devices=("cuda",))
    absent = dataclasses.replace(ours, needs="no_such_module")
    not_ours = dataclasses.replace(ours, ours=False)
    found = candidates(case("toy", ours, elsewhere, absent, not_ours, EAGER), CPU)
    assert [(c.backend.name, c.config) for c in found] == [("ours", {"wait": 1}), ("ours", {"wait": 2})]
    assert found[0].backend is ours


def test_inputs_are_those_of_the_seed() -> None:
    seen: list[Tensor] = []

    def prepare(x: Tensor, config: Mapping[str, int] | None = None) -> Call:
        seen.append(x.clone())
        return lambda: x * 2

    watched = dataclasses.replace(waiting(1), prepare=prepare)
    for seed in (1, 1, 2):
        tune_case(case("toy", watched), CPU, soon(60), seed)
    first, again, other = (seen[i * len(seen) // 3] for i in range(3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_compiling_ahead_calls_every_candidate_in_inference_mode_and_leaves_errors_to_the_check() -> None:
    """On a GPU this fills Triton's cache; nothing is begun once its time is over."""
    called: list[int] = []

    def prepare(x: Tensor, config: Mapping[str, int] | None = None) -> Call:
        wait = (config or {})["wait"]
        if wait == 3:
            raise RuntimeError("does not compile")
        if torch.is_inference_mode_enabled():
            called.append(wait)
        return lambda: x

    toy = case("toy", dataclasses.replace(waiting(*range(40)), prepare=prepare))
    tuner = tune._CaseTuner(toy, CPU, 0)
    tuner.compile(candidates(toy, CPU), soon(60))
    assert sorted(called) == [wait for wait in range(40) if wait != 3]
    assert tuner.failed == []
    tuner.compile(candidates(toy, CPU), CLOCK.monotonic())
    assert len(called) == 39


# --- Halving, without a clock ---------------------------------------------------------------------------------------


@pytest.fixture
def heats(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Calls are timed at their `wait` without waiting; gives the `wait`s of every round."""
    found: list[list[int]] = []

    class Known:
        def __init__(self, calls: Sequence[Callable[[], Tensor]], _: torch.device) -> None:
            self.wait = int(calls[0]()[0])

    def prepare(x: Tensor, config: Mapping[str, int] | None = None) -> Call:
        wait = (config or {"wait": 1})["wait"]
        if wait % 10 == 7:
            raise RuntimeError("no more memory")
        return lambda: torch.full_like(x, wait)

    def interleave(timed: Sequence[Known], rounds: int, seed: int) -> list[list[float]]:
        found.append([t.wait for t in timed])
        return [[float(t.wait)] * rounds for t in timed]

    monkeypatch.setattr(tune, "CallTimer", Known)
    monkeypatch.setattr(tune, "interleave", interleave)
    monkeypatch.setattr(sys.modules[__name__], "doubling", prepare)
    return found


@pytest.mark.parametrize("count", [1, 3, 4, 9, 60])
def test_the_best_survives_every_heat_and_few_are_in_memory_at_a_time(heats: list[list[int]], count: int) -> None:
    toy = case("toy", waiting(*range(10, 10 + count)))
    tuner = tune._CaseTuner(toy, CPU, 0)
    alive = tuner.successive_halving(candidates(toy, CPU), soon(60))
    assert len(alive) <= tune.FINALISTS
    assert 10 in [(c.config or {})["wait"] for c in alive]
    assert all(len(heat) <= tune.HEAT_SIZE for heat in heats)
    memory = [wait for wait in range(10, 10 + count) if wait % 10 == 7]
    assert sorted((f.config or {})["wait"] for f in tuner.failed) == memory
    assert all(f.why == "RuntimeError: no more memory" for f in tuner.failed)


def test_when_time_runs_out_those_fastest_so_far_go_to_the_final(
    heats: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is time for the first heat of eight; the other twelve were never timed."""
    toy = case("toy", waiting(*range(10, 16), *range(20, 27), *range(30, 37)))
    monkeypatch.setattr(tune.time, "monotonic", lambda: float(len(heats)))
    alive = tune._CaseTuner(toy, CPU, 0).successive_halving(candidates(toy, CPU), until=tune.HEAT_ROUNDS)
    assert len(heats) == tune.HEAT_ROUNDS
    assert [(c.config or {})["wait"] for c in alive] == sorted(heats[0])[: tune.FINALISTS]


# --- Time -----------------------------------------------------------------------------------------------------------


def test_a_case_ends_by_its_deadline_with_what_could_be_tried() -> None:
    """Of thirty candidates that take 0.2 s to compile there is time for some, and the best of these is in the table."""
    compiled = set()

    def prepare(x: Tensor, config: Mapping[str, int] | None = None) -> Call:
        if (number := (config or {})["number"]) not in compiled:
            CLOCK.sleep(0.2)
            compiled.add(number)
        return doubling(x, config)

    space = [{"number": i, "wait": 1 + i % 3} for i in range(30)]
    slow = dataclasses.replace(waiting(), prepare=prepare, configs=lambda _: space)
    begin = CLOCK.monotonic()
    outcome = tune_case(case("toy", slow, peer(5)), CPU, begin + 4, 0)
    assert CLOCK.monotonic() - begin < 5
    assert outcome.tried == len(compiled)
    assert 3 <= outcome.tried < 30
    assert outcome.untried == 30 - outcome.tried
    assert entry_of(outcome).configs["ours"]["wait"] == 1


def test_no_time_is_no_entry_and_nothing_runs() -> None:
    outcome = tune_case(case("toy", waiting(1, 2)), CPU, CLOCK.monotonic(), 0)
    assert (outcome.entry, outcome.tried, outcome.untried, outcome.broken) == (None, 0, 2, False)


def test_heavy_cases_come_first_and_get_their_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 % of the time, then three quarters of the rest, then what is left: nothing here takes any."""
    seen: list[tuple[str, float]] = []

    def record(case: Case, device: torch.device, deadline: float, seed: int, hot: object) -> TuningResult:
        seen.append((case.name.split("/")[0], deadline - CLOCK.monotonic()))
        return TuningResult(case.name)

    monkeypatch.setattr(tune, "tune_case", record)
    cases = [case("few", calls=10), case("most", calls=60), case("large", n=300, calls=10)]
    outcomes = list(tune.tune_cases(cases, CPU, soon(1000), 0, Ceilings(copy_bytes_s=1e9)))
    assert [name for name, _ in seen] == ["most", "large", "few"]
    assert [seconds for _, seconds in seen] == pytest.approx([600, 750, 1000], rel=0.02)
    assert len(outcomes) == 3


# --- The table ------------------------------------------------------------------------------------------------------


def entry(n: int, wait: int) -> TunedEntry:
    return TunedEntry(
        "toy", "fp32", {"n": n}, "ours", {"ours": {"wait": wait}}, {"ours": 1.0}, "2026-01-31", {"torch": "2"}
    )


@pytest.fixture(autouse=True)
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of kernels/tuned."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    return tmp_path / "tuned"


def test_entries_replace_those_of_their_shape_and_leave_the_others(tmp_path: Path) -> None:
    path = write_table([entry(100, 1), entry(200, 2)], CPU, tmp_path / "a")
    assert path == tmp_path / "a" / f"{device_slug(describe_machine(CPU).device)}.json"
    assert write_table([entry(200, 3)], CPU, tmp_path / "a") == path
    table = read_table(path)
    assert [(e.dims["n"], e.configs["ours"]["wait"]) for e in table.entries] == [(100, 1), (200, 3)]
    assert nearest_config(table, "toy", {"n": 180}, "fp32") == TunedConfig("ours", {"wait": 3})
    assert table.capability == "cpu"
    assert [p.name for p in (tmp_path / "a").iterdir()] == [path.name]


def test_a_new_table_begins_with_what_is_known_of_the_device(tmp_path: Path, tuned: Path) -> None:
    known = write_table([entry(100, 1), entry(200, 2)], CPU, tuned)
    path = write_table([entry(200, 3)], CPU, tmp_path / "out")
    assert [(e.dims["n"], e.configs["ours"]["wait"]) for e in read_table(path).entries] == [(100, 1), (200, 3)]
    assert [e.configs["ours"]["wait"] for e in read_table(known).entries] == [1, 2]


# --- The command ----------------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    command = ["profiling", "tune", *map(str, arguments), "--device", "cpu", "--cases", __file__]
    monkeypatch.setattr(sys, "argv", command)
    return main()


def test_tuning_writes_a_table_and_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert call(monkeypatch, "tune_good", "tune_nothing", "--out", tmp_path, "--budget", 60) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "tune_good/toy/fp32" in printed
    assert "ours (fastest) wait=1" in printed
    assert "nothing to tune: tune_nothing/toy/fp32" in printed
    (path,) = tmp_path.glob("*.json")
    assert nearest_config(read_table(path), "tune_good", {"n": 100}, "fp32") == TunedConfig("ours", {"wait": 1})
    assert path.name in printed.replace(" ", "")


def test_json_is_all_there_is_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A broken kernel: exit code 1 and no table, but the other case is there. No folder is written unasked on a CPU."""
    monkeypatch.setitem(bench.CEILING_SIZES, "cpu", bench.CeilingSizes(2**20, 64, 1))
    assert call(monkeypatch, "tune_good", "tune_broken", "--budget", 60, "--json") == 1
    values = json.loads(capsys.readouterr().out)
    assert (values["device"], values["table"], values["nothing_to_tune"]) == (describe_machine(CPU).device, None, [])
    by_name = {c["case"]: c for c in values["cases"]}
    good, broken = by_name["tune_good/toy/fp32"], by_name["tune_broken/toy/fp32"]
    assert good["entry"]["configs"] == {"ours": {"wait": 1}}
    assert good["ratio"] > 1
    assert broken["entry"] is None
    assert [f["config"] for f in broken["failed"]] == [{"wait": -1}, {"wait": -2}]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tune_good", "--budget", 0], "--budget 0"),
        (["tune_good", "--budget", "nan"], "--budget nan"),
        (["tune_good", "--budget", "inf"], "--budget inf"),
        (["tune_nothing"], "nothing to tune: no back-end of tune_nothing/toy/fp32"),
        (["tune_god"], "tune_good"),
        (["tune_good", "--out", "/proc/no"], "cannot be written"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[Any], said: str
) -> None:
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_damaged_table_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / f"{device_slug(describe_machine(CPU).device)}.json"
    path.write_text("{")
    assert call(monkeypatch, "tune_good", "--out", tmp_path) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert path.read_text() == "{"


def test_a_triton_kernel_is_tuned_in_the_interpreter(interpreting_python: Interpreter, tmp_path: Path) -> None:
    """The whole way: every set of parameters is right, and the best is found again for a shape nearby."""
    command = ["-m", "profiling", "tune", "tune_attention", "--cases", __file__, "--device", "cpu"]
    done = interpreting_python.run(*command, "--out", tmp_path, "--budget", "3600", "--json")
    assert done.returncode == 0, done.stderr
    (outcome,) = json.loads(done.stdout)["cases"]
    assert (outcome["tried"], outcome["untried"], outcome["failed"]) == (4, 0, [])
    assert outcome["kernel"] == "triton"
    (path,) = tmp_path.glob("*.json")
    table = read_table(path)
    assert to_json(table) == path.read_text()
    dims = {"queries": 21, "keys": 84, "heads": 1, "head_dim": 16}
    tuned = nearest_config(table, "tune_attention", dims, "fp32", ["triton"], match_exactly=["head_dim"])
    assert tuned is not None
    assert dict(tuned.config) in list(attention_kernel.configs(dims))
