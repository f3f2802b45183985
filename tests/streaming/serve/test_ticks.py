"""Ticks: one for each moment, and holds where none comes, so that viewers' time goes on at the pace of the clock."""

import math

import pytest

from streaming.serve.ticks import LONGEST, SLACK, Ticks

FRAME = 1 / 25


def shown(times: list[float], until: float) -> list[tuple[float, int, bool]]:
    """What is sent when moments come at these times: when, tick, and whether it is a moment."""
    ticks, sent, times = Ticks(25), [], sorted(times)
    now = times[0]
    while now <= until:
        if times and times[0] <= now:
            times.pop(0)
            sent.append((now, ticks.moment(now), True))
        sent += [(now, tick, False) for tick in ticks.holds(now)]
        now = min(times[0] if times else math.inf, ticks.hold_at)
    return sent


def test_punctual_moments_are_sent_as_they_come() -> None:
    times = [5 + k * FRAME for k in range(50)]
    sent = shown(times, times[-1])
    assert [(tick, moment) for _, tick, moment in sent] == [(k, True) for k in range(50)]


def test_nothing_is_held_before_the_first_moment() -> None:
    ticks = Ticks(25)
    assert ticks.hold_at == math.inf
    assert ticks.holds(1000) == []


def test_moments_that_are_a_little_late_make_no_holds() -> None:
    times = [k * FRAME + (0.07 if k % 3 == 1 else 0.02 if k % 3 == 2 else 0) for k in range(60)]
    assert all(moment for *_, moment in shown(times, times[-1]))


def test_a_gap_is_filled_with_holds_at_the_pace_of_frames() -> None:
    times = [k * FRAME for k in range(10)] + [1.0 + k * FRAME for k in range(10)]
    sent = shown(times, times[-1])
    assert [tick for _, tick, _ in sent] == list(range(len(sent)))
    held = [(at, tick) for at, tick, moment in sent if not moment]
    assert held[0][0] == pytest.approx(10 * FRAME + SLACK)
    assert all(at >= tick * FRAME - 1e-9 for at, tick in held)  # none before its time
    after = [(at, tick) for at, tick, moment in sent if moment and at >= 1]
    assert all(0 <= tick * FRAME - at < FRAME + 1e-9 for at, tick in after)  # at once, and with the slack before them


def test_many_gaps_add_up_to_no_delay() -> None:
    """Moments in groups, each later than the one before by any part of a frame."""
    times, now = [], 0.0
    for k in range(200):
        times += [now + m * FRAME for m in range(5)]
        now = times[-1] + FRAME + (k * 7919 % 1000) / 1000
    sent = shown(times, times[-1])
    assert all(abs(at - tick * FRAME) <= SLACK + FRAME for at, tick, _ in sent)


def test_a_pause_of_the_process_is_not_filled_up() -> None:
    ticks = Ticks(25)
    ticks.moment(0)
    assert len(ticks.holds(60)) == round(LONGEST / FRAME)
    tick = ticks.moment(60)
    assert ticks.hold_at == pytest.approx(60 + FRAME + SLACK)
    assert tick == round(LONGEST / FRAME) + 1


def test_after_a_rest_ticks_count_on() -> None:
    ticks = Ticks(25)
    assert [ticks.moment(k * FRAME) for k in range(3)] == [0, 1, 2]
    ticks.rest()
    assert ticks.holds(100) == []
    assert ticks.moment(100) == 3
    assert ticks.hold_at == pytest.approx(100 + FRAME + SLACK)
