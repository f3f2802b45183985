"""Verdicts on synthetic timings of known noise."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from profiling.analyse.samples import compare_samples, without_spikes

Rng = np.random.Generator


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


def test_spikes_that_leave_too_few_rounds_hide_no_large_change() -> None:
    before = [1.0, 1.01, 0.99, 1.02, 5.0, 7.0]
    change = compare_samples(before, [10 * seconds for seconds in before])
    assert change.verdict == "slower"
    assert change.detail == "4 rounds, too few for statistics: apart, by more than 10%"


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
