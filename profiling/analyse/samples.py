"""Compares two sets of rounds: faster, slower, or the same.

A round is one sample, and rounds scatter. So two sets of rounds are compared, not two numbers, and in logarithms:

    ratio     after over before, by Hodges and Lehmann: the median of the ratios of all pairs of rounds
    interval  of that ratio at the 99 % level, from the ranks of these pairs (the interval of the Mann-Whitney test);
              no distribution of times is assumed
    noise     the largest of three: how far the first run is from itself (odd rounds from even ones, first half from
              second half); how far it is from further runs of the same code (`--again`); how far peers, whose code is
              the same, have shifted between the runs (the larger median, of the case's peers or of all peers)
    spikes    rounds further from the median than 4 robust standard deviations (1.4826 times the median distance) are
              left out: an interrupt is not the kernel's time
    drift     where a round resembles the previous one (rank correlation r above 2 / sqrt(rounds)), rounds say less than
              independent ones would, and the interval is widened by sqrt((1 + r) / (1 - r))

*Slower*: the interval excludes 1, and the ratio exceeds 1 + the larger of threshold and noise. *Faster* is the
opposite; everything else is the *same*. Fewer than five rounds per side, spikes left out, cannot reach 99 %: then a
large difference gets a verdict, and the rest is *unsure*.

The operating curve, over 2,000 synthetic pairs per point: 20 rounds each, lognormal noise of 3 %, one round in twenty a
spike (1.1 to 2.7 times as long), threshold 2 %. Called slower, if the second run is truly slower by

    0 %: 0.5 %    2 %: 22 %    3 %: 54 %    4 %: 85 %    5 %: 95 %    6 %: 98 %    8 %: 99.5 %

Of equal pairs, 99.0 % are called the same. A slowdown of 5 % is found by 10 rounds in 66 % of the pairs, by 40 rounds
in all of them. With 1 % of noise, 2.5 % are found in 93 %, and all equal pairs are called the same. On a machine that
drifts, equal pairs are called the same in 99 % (a ramp of 3 %), 93 % (a step of 3 %) and 93 % (noise with an
autocorrelation of 0.7), and 5 % are found in 90, 80 and 33 %. No number of rounds shows what differs from process to
process, such as memory placement, clocks and neighbours: `--again` does, and so do the peers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import median_abs_deviation, rankdata

from profiling.tables import percent

Z_99 = 2.5758  # standard deviations that contain 99 % of a normal distribution
SIGMA_OF_MAD = 1.4826  # of a normal distribution: standard deviation over median distance from the median
SPIKE_SIGMAS = 4.0  # robust standard deviations
MIN_ROUNDS = 5  # per side; fewer cannot give an interval at 99 %
FEW_ROUNDS_CHANGE = 0.10  # smallest change that counts with fewer rounds

SLOWER, FASTER, SAME, UNSURE = "slower", "faster", "same", "unsure"  # verdicts on times

Logs = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """The difference between the rounds of two runs."""

    verdict: str  # slower, faster, same or unsure
    ratio: float | None  # after over before
    low: float | None  # interval of the ratio; None where rounds are too few for one
    high: float | None
    noise: float | None  # relative: 0.02 is 2 %
    detail: str = ""


def compare_samples(
    before: Sequence[float],
    after: Sequence[float],
    again: Iterable[Sequence[float]] = (),
    threshold: float = 0.02,
    shift: float = 0.0,
) -> Change:
    """Compares two sets of samples, of at least one each; `again` are further samples of the first kind.

    `shift` is noise known from elsewhere, as the logarithm of a ratio.
    """
    if not all(0 < time < math.inf for time in (*before, *after)):  # NaN is neither
        return Change(UNSURE, None, None, None, None, "a time that is not above zero")
    a, b = without_spikes(before), without_spikes(after)
    if min(len(a), len(b)) < MIN_ROUNDS:
        return _compare_few(np.exp(a).tolist(), np.exp(b).tolist(), threshold)
    # scipy.stats has the test of Mann and Whitney, but neither its interval nor one that allows for drift.
    pairs = np.sort(np.subtract.outer(b, a), axis=None)
    inflation = max(_variance_inflation(a), _variance_inflation(b))
    spread = math.sqrt(inflation * len(a) * len(b) * (len(a) + len(b) + 1) / 12)
    outside = math.floor(len(pairs) / 2 - Z_99 * spread)  # pairs beyond each end of the interval
    ratio = float(np.median(pairs))
    noise = max(shift, _noise(a, [without_spikes(samples) for samples in again if samples]))
    low, high = (pairs[outside], pairs[-1 - outside]) if outside >= 0 else (-math.inf, math.inf)
    limit = max(math.log1p(threshold), noise)
    verdict = SLOWER if low > 0 and ratio > limit else FASTER if high < 0 and ratio < -limit else SAME
    detail = ""
    if verdict == SAME and abs(ratio) > math.log1p(threshold):
        detail = "too scattered to tell" if low <= 0 <= high else "within the noise"
    low, high = (math.exp(end) if math.isfinite(end) else None for end in (low, high))
    return Change(verdict, math.exp(ratio), low, high, math.expm1(noise), detail)


def without_spikes(samples: Sequence[float]) -> Logs:
    """The logarithms of the samples, in their order, without spikes."""
    logs = np.log(np.asarray(samples, dtype=np.float64))
    sigma = SIGMA_OF_MAD * median_abs_deviation(logs)
    return logs[np.abs(logs - np.median(logs)) <= SPIKE_SIGMAS * sigma] if sigma > 0 else logs


def _variance_inflation(x: Logs) -> float:
    """By what factor autocorrelation inflates the variance of a mean; 1 if samples may be independent."""
    ranks = rankdata(x) - (len(x) + 1) / 2
    correlation = (ranks[1:] * ranks[:-1]).sum() / max(np.square(ranks).sum(), 1.0)
    return float((1 + correlation) / (1 - correlation)) if correlation > 2 / math.sqrt(len(x)) else 1.0


def _noise(a: Logs, again: Iterable[Logs]) -> float:
    half = len(a) // 2
    pairs = [(a[::2], a[1::2]), (a[:half], a[half:]), *((a, other) for other in again)]
    return max(abs(float(np.median(np.subtract.outer(y, x)))) for x, y in pairs)


def _compare_few(before: Sequence[float], after: Sequence[float], threshold: float) -> Change:
    """For too few rounds: a change if the ranges do not overlap and the medians are far from each other."""
    ratio = float(np.median(after) / np.median(before))
    count = f"{min(len(before), len(after))} rounds, too few for statistics"
    apart = min(after) > max(before) or max(after) < min(before)
    least = max(threshold, FEW_ROUNDS_CHANGE)
    if min(len(before), len(after)) > 1 and apart and abs(math.log(ratio)) > math.log1p(least):
        verdict, detail = (SLOWER if ratio > 1 else FASTER), f"{count}: apart, by more than {least:.0%}"
    elif abs(math.log(ratio)) <= math.log1p(threshold):
        verdict, detail = SAME, f"{count}: medians within {percent(threshold)}"
    else:
        verdict, detail = UNSURE, f"{count}, and not far apart"
    return Change(verdict, ratio, None, None, None, detail)
