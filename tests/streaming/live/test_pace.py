"""Schedules, durations, a microphone's clock, the choice of a quality, and what is measured."""

from collections import deque
from collections.abc import Iterator

import pytest

from model.config import ChunkConfig
from streaming.live.face import Quality
from streaming.live.pace import LATE, RECENT, WATCHED, Drift, Durations, Schedule, high
from streaming.live.quality import QualityChoice
from streaming.live.stats import EDGES, Latency, Stats, percentile
from streaming.live.stats import RECENT as KEPT

QUALITIES = (Quality(4, 100, 100), Quality(2, 100, 100), Quality(2, 50, 50))


def test_frames_are_due_by_their_index_alone() -> None:
    schedule = Schedule(25, 7.0)
    assert schedule.due(90_000) == 3607.0
    assert schedule.after(100, 11.0 + LATE / 2) is schedule
    late = schedule.after(100, 11.5)
    assert late.due(100) == 11.5
    assert late.due(101) == pytest.approx(11.54)


def test_what_nine_of_ten_took() -> None:
    durations = Durations()
    assert high(durations.first, 0.5) == 0.5
    durations.first.extend([0.1] * 9 + [9.0])
    assert high(durations.first, 0.5) == 0.1
    durations.first.append(9.0)
    assert high(durations.first, 0.5) == 9.0
    durations.first.extend(range(100))
    assert len(durations.first) == RECENT
    durations.clear()
    assert not durations.first


@pytest.mark.parametrize(("spare", "clock"), [(0.01, "slow"), (0.05, None), (0.5, "fast")])
def test_a_clock_shows_by_its_least_spare_time(spare: float, clock: str | None) -> None:
    drift = Drift()
    seen = {drift.note(spare + jitter, now) for now, jitter in zip(range(40), [0.2] * 8 + [0] * 32, strict=True)}
    assert seen == {None} | ({clock} if clock else set())
    assert len(drift.spare) <= WATCHED + 2
    assert drift.note(float("-inf"), 50) is None


def test_the_best_quality_that_keeps_up_is_chosen() -> None:
    choice, durations = QualityChoice(QUALITIES, ChunkConfig()), Durations()
    durations.whole.extend([1.5] * 4)
    assert not choice.choose(durations), "four chunks show nothing"
    durations.whole.append(1.5)
    durations.step.extend([0.3] * 20)
    assert choice.choose(durations)
    assert choice.index == 1  # 1.5 - 2 * 0.3 s is 0.9 of 1.12 s
    durations.clear()
    durations.whole.extend([1.1] * 5)
    durations.step.extend([0.3] * 10)
    assert choice.choose(durations)
    assert choice.index == 2
    durations.clear()
    durations.whole.extend([0.1] * 5)
    durations.step.extend([0.03] * 10)
    assert choice.choose(durations)
    assert choice.index == 0  # 4 x 0.1 s, and two more steps


def test_percentiles_are_values_that_were_measured() -> None:
    values = [k + 1.0 for k in range(100)]
    assert [percentile(values, p) for p in (50, 95, 99)] == [50, 95, 99]
    assert percentile([3.0], 99) == 3.0
    assert percentile([], 50) is None


def test_a_latency_keeps_what_it_can_show_and_no_more() -> None:
    latency = Latency()
    for k in range(2 * KEPT):
        latency.add(0.07 if k % 2 else 100.0)
    summary = latency.summary()
    assert summary["count"] == sum(summary["counts"]) == 2 * KEPT
    assert len(latency.recent) == KEPT
    assert summary["counts"][1] == summary["counts"][-1] == KEPT
    assert len(summary["counts"]) == len(EDGES) + 1
    assert summary["max_s"] == 100.0
    assert (summary["p50_s"], summary["p95_s"]) == (0.07, 100.0)


def test_only_the_latencies_that_are_asked_for_are_summed_up() -> None:
    class Recent(deque[float]):
        looks = 0

        def __iter__(self) -> Iterator[float]:
            self.looks += 1
            return super().__iter__()

    stats = Stats()
    stats.chunk.recent, stats.latency.recent = Recent([2.0, 1.0, 3.0]), Recent([1.0])
    summary = stats.summary(("chunk",))
    assert (summary["chunk"]["p50_s"], summary["chunk"]["p99_s"]) == (2.0, 3.0)
    assert "latency" not in summary
    assert (stats.chunk.recent.looks, stats.latency.recent.looks) == (1, 0)
