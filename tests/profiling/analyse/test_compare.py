"""Verdicts on synthetic timings of known noise, on whole runs, and on results that git keeps."""

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from profiling.__main__ import main
from profiling.analyse.compare import Comparison, compare_runs, compare_samples, without_spikes
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
)

Rng = np.random.Generator

# --- Statistics -----------------------------------------------------------------------------------------------------


def timings(rng: Rng, factor: float = 1.0, rounds: int = 20, noise: float = 0.03, spikes: float = 0.05) -> list[float]:
    """Lognormal rounds around `factor` milliseconds, now and then one that takes 1.1 to 2.7 times as long."""
    logs = noise * rng.standard_normal(rounds) + (rng.random(rounds) < spikes) * rng.uniform(0.1, 1.0, rounds)
    return (1e-3 * factor * np.exp(logs)).tolist()


def drifting(rng: Rng, kept: float = 0.7, noise: float = 0.03, rounds: int = 20) -> list[float]:
    """Rounds of which each keeps a share of how far the one before it was off."""
    logs = [noise * rng.standard_normal()]
    for _ in range(rounds - 1):
        logs.append(kept * logs[-1] + noise * math.sqrt(1 - kept**2) * rng.standard_normal())
    return (1e-3 * np.exp(logs)).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_equal_runs_are_the_same_in_95_of_100_draws(seed: int) -> None:
    rng = np.random.default_rng(seed)
    verdicts = Counter(compare_samples(timings(rng), timings(rng)).verdict for _ in range(100))
    assert verdicts["same"] >= 95, verdicts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("factor", "verdict"), [(1.05, "slower"), (1 / 1.05, "faster")])
def test_a_change_of_5_percent_is_found_in_90_of_100_draws(factor: float, verdict: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    verdicts = Counter(compare_samples(timings(rng), timings(rng, factor)).verdict for _ in range(100))
    assert verdicts[verdict] >= 90, verdicts


def test_at_the_noise_of_a_gpu_a_change_of_3_percent_is_found_and_equal_runs_are_the_same() -> None:
    rng = np.random.default_rng(0)
    equal = Counter(compare_samples(timings(rng, noise=0.01), timings(rng, noise=0.01)).verdict for _ in range(100))
    slower = Counter(
        compare_samples(timings(rng, noise=0.01), timings(rng, 1.03, noise=0.01)).verdict for _ in range(100)
    )
    assert equal["same"] == 100
    assert slower["slower"] >= 97


def test_equal_runs_on_a_drifting_machine_are_mostly_the_same() -> None:
    """Rounds that resemble their neighbours say less than they seem to: unwidened, 80 of 100 would be the same."""
    rng = np.random.default_rng(0)
    verdicts = Counter(compare_samples(drifting(rng), drifting(rng)).verdict for _ in range(300))
    assert verdicts["same"] >= 0.9 * 300, verdicts


def test_a_change_below_the_threshold_is_the_same_however_certain() -> None:
    rng = np.random.default_rng(0)
    before, after = timings(rng, noise=0.001), timings(rng, 1.015, noise=0.001)
    change = compare_samples(before, after)
    assert change.low is not None
    assert change.low > 1
    assert change.verdict == "same"
    assert compare_samples(before, after, threshold=0.01).verdict == "slower"


def test_the_spread_of_repeated_runs_is_noise() -> None:
    """Every process is off by a few percent of its own: 6 % is much within one run, and nothing among several."""
    rng = np.random.default_rng(0)
    before, after = timings(rng, noise=0.005), timings(rng, 1.06, noise=0.005)
    assert compare_samples(before, after).verdict == "slower"
    change = compare_samples(before, after, again=[timings(rng, 0.93, noise=0.005), timings(rng, 1.01, noise=0.005)])
    assert change.verdict == "same"
    assert change.noise == pytest.approx(0.075, abs=0.01)
    assert change.detail == "within the noise"


def test_a_jump_within_the_first_run_is_noise() -> None:
    rng = np.random.default_rng(0)
    before = timings(rng, rounds=10, noise=0.004) + timings(rng, 1.1, rounds=10, noise=0.004)
    change = compare_samples(before, timings(rng, 1.1, noise=0.004))
    assert change.noise == pytest.approx(0.1, abs=0.01)
    assert change.verdict == "same"


def test_spikes_are_left_out_but_not_a_second_mode() -> None:
    spiky = [1.0, 1.01, 0.99, 1.02, 5.0, 0.98, 1.0, 1.03]
    assert np.exp(without_spikes(spiky)).tolist() == pytest.approx([v for v in spiky if v < 5])
    bimodal = [1.0, 1.01, 0.99, 1.02, 1.5, 1.48, 1.52, 1.51]
    assert len(without_spikes(bimodal)) == 8
    assert len(without_spikes([1.0] * 6 + [9.0])) == 7  # most are equal: no distance is usual


@settings(max_examples=80)
@given(st.integers(0, 2**32 - 1), st.integers(5, 25), st.integers(5, 25), st.floats(-0.1, 0.1))
def test_the_interval_is_that_of_the_rank_test(seed: int, m: int, n: int, shift: float) -> None:
    """It excludes 1 exactly where the test of Mann and Whitney, as scipy has it, rejects equality at 1 %."""
    rng = np.random.default_rng(seed)
    a, b = 0.03 * rng.uniform(-1, 1, m), shift + 0.03 * rng.uniform(-1, 1, n)  # uniform: nothing to leave out
    if any(len(without_spikes(np.exp(x).tolist())) < len(x) or judge_drift(x) for x in (a, b)):
        return
    change = compare_samples(np.exp(a).tolist(), np.exp(b).tolist())
    excluded = (change.low or 0) > 1 or (change.high or math.inf) < 1
    assert excluded == (mannwhitneyu(a, b, method="asymptotic", use_continuity=False).pvalue <= 0.01)


def judge_drift(x: np.ndarray) -> bool:
    """Whether the rounds resemble their neighbours by chance, which widens the interval."""
    ranks = np.argsort(np.argsort(x)) - (len(x) - 1) / 2
    return (ranks[1:] * ranks[:-1]).sum() / (ranks**2).sum() > 2 / math.sqrt(len(x))


@settings(max_examples=60)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12), st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12))
def test_any_two_sets_of_times_get_a_verdict_and_turn_around(before: list[float], after: list[float]) -> None:
    there, back = compare_samples(before, after), compare_samples(after, before)
    assert there.verdict in ("slower", "faster", "same", "unsure")
    assert there.ratio is not None
    assert there.ratio * (back.ratio or 0) == pytest.approx(1)
    if there.low and there.high:
        assert there.low <= there.ratio * (1 + 1e-12)
        assert there.ratio <= there.high * (1 + 1e-12)


@pytest.mark.parametrize(
    ("before", "after", "verdict", "detail"),
    [
        ((0.99, 1.0, 1.02), (1.19, 1.2, 1.21), "slower", "3 rounds, too few for statistics: apart, by more than 10%"),
        ((0.99, 1.0, 1.02), (0.79, 0.8, 0.81), "faster", "too few for statistics: apart"),
        ((0.99, 1.0, 1.02), (1.05, 1.06, 1.07), "unsure", "and not far apart"),
        ((0.9, 1.0, 1.3), (1.2, 1.25, 1.3), "unsure", "and not far apart"),
        ((0.9, 1.0, 1.3), (0.8, 1.01, 1.4), "same", "medians within 2.0%"),
        ((1.0,), (1.5,), "unsure", "1 rounds, too few for statistics, and not far apart"),
        ((1.0,), (1.01,) * 20, "same", "1 rounds"),
        ((0.0, 1.0), (1.0, 1.0), "unsure", "a time that is not above zero"),
        ((1.0,) * 9, (math.nan,) * 9, "unsure", "a time that is not above zero"),
        ((math.nan, *(1.0,) * 9), (1.0,) * 10, "unsure", "a time that is not above zero"),
        ((1.0,) * 9, (*(1.0,) * 8, math.inf), "unsure", "a time that is not above zero"),
    ],
)
def test_few_rounds_need_a_large_change(before: Any, after: Any, verdict: str, detail: str) -> None:
    change = compare_samples(before, after)
    assert change.verdict == verdict
    assert detail in change.detail
    assert (change.low, change.high, change.noise) == (None, None, None)


# --- Runs -----------------------------------------------------------------------------------------------------------

VERSIONS = {"python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0", "flashtalk-triton": "0.1.0"}
MACHINE = Machine("cuda", "NVIDIA H100", 132, 80, "9.0", 50, "580.1", VERSIONS, "1" * 40)


def measured(backend: str, seconds: float, ours: bool = True, seed: int = 0) -> Measurement:
    rng = np.random.default_rng([seed, len(backend), ours])
    return Measurement(backend, OK, ours, samples=tuple(timings(rng, 1e3 * seconds, noise=0.005, spikes=0)))


def case(name: str, *measurements: Measurement) -> CaseResult:
    return CaseResult(name, *name.split("/"), flops=1e9, bytes=1e6, measurements=measurements)


def run(*cases: CaseResult, machine: Machine = MACHINE, **more: Any) -> Run:
    return Run("bench", "2026-01-01T00:00:00+00:00", machine, cases=cases, **more)


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
    found = compare_runs(runs[0], runs[1])
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
        (row,) = compare_runs(run(case("o/s/d", before)), run(case("o/s/d", after)))
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
        tmp_path, run(case("o/s/d", measured("m", 1e-3))), run(case("o/s/d", measured("m", 1e-3)), machine=machine)
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
        tmp_path, run(case("o/s/d", measured("m", 1e-3))), run(case("o/s/d", measured("m", 1e-3)), machine=machine)
    )
    assert call(monkeypatch, *paths, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["forced"] == []
    assert document["notes"] == ["stated by one run only, so not compared: numpy, triton"]


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
        f"the second run was made with uncommitted changes to {'2' * 40}-dirty",
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


def test_further_runs_are_taken_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds = (1e-3, 1.06e-3, 0.93e-3)
    a, b, c = files(tmp_path, *(run(case("o/s/d", measured("m", s, seed=i))) for i, s in enumerate(seconds)))
    assert call(monkeypatch, a, b) == 1
    assert call(monkeypatch, a, b, "--again", c) == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("a.json", "none.json"), "none.json is neither a file nor a git revision"),
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
    assert document["before"]["file"] == "HEAD:results/new.json"
    assert document["after"]["file"] == "HEAD:results/now.json"


def test_a_revision_without_its_own_stands_for_the_newest_results_in_its_tree(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = repository.commit(a=of(1e-3, "2026-01-01"), b=of(2e-3, "2026-01-02"))
    repository.commit(c=of(3e-3, "2026-01-03"))
    assert call(monkeypatch, first[:12], "main", "--results", repository.results, "--json") == 1
    assert ratio(capsys) == pytest.approx(1.5)
    assert call(monkeypatch, "main~1", repository.results / "a.json", "--results", repository.results, "--json") == 0
    assert ratio(capsys) == pytest.approx(0.5)


def test_of_two_revisions_the_newest_comparable_results_are_taken(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.commit(a=of(1e-3, "2026-01-01"), cpu=of(50e-3, "2026-01-05", device="some CPU"))
    repository.commit(b=of(3e-3, "2026-01-09"))
    assert call(monkeypatch, "HEAD~1", "HEAD", "--results", repository.results, "--json") == 1
    assert ratio(capsys) == pytest.approx(3)


def test_results_of_another_kind_are_not_what_a_revision_is_compared_by(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each time kernels were measured and then a whole chunk."""
    other = dataclasses.replace(run(case("else/s/d", measured("m", 1e-3)), machine=MACHINE), started="2026-01-02")
    repository.commit(a=of(1e-3, "2026-01-01"), a2=other)
    repository.commit(b=of(3e-3, "2026-01-09"))
    assert call(monkeypatch, "HEAD~1", "HEAD", "--results", repository.results, "--json") == 1
    assert ratio(capsys) == pytest.approx(3)


def test_two_revisions_with_the_same_results_are_not_compared_with_themselves(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.commit(a=of(1e-3, "2026-01-01"), b=of(2e-3, "2026-01-02"))
    repository.commit()
    assert call(monkeypatch, "HEAD~1", "HEAD", "--results", repository.results) == 2
    assert "are the same results; nothing was measured in between" in capsys.readouterr().err
    repository.commit(c=of(4e-3, "2026-01-03"))
    assert call(monkeypatch, "HEAD", "HEAD~1", "--results", repository.results, "--json") == 0
    assert ratio(capsys) == pytest.approx(0.5)  # backwards too, the newest of each that are not shared


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
    assert "nobranch is neither a file nor a git revision" in capsys.readouterr().err
