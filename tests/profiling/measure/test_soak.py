"""What a soak counts, and what it and a visit call a fault."""

from dataclasses import replace

import numpy as np
import pytest

from profiling.measure.soak import POINTS, Watch, growth, thinned
from profiling.results import Run, from_own_json, to_json
from profiling.soak import Spread, latency_in_words, soak_lines, spread_in_words, visit_lines
from streaming.live.timeline import Moment
from tests.profiling import runs


def moment(index: int, chunk: int, level: int = 0) -> Moment:
    rgb = np.full((2, 2, 3), level, np.uint8)
    return Moment(index, index / 25, rgb, np.zeros(1920, np.float32), None, chunk, None, 0.0, 0.0, 0.0)


def seen(*moments: Moment) -> Watch:
    watch = Watch()
    for m in moments:
        watch.see(m, chunk_frames=3)
    return watch


def test_lost_and_repeated_frames_are_counted() -> None:
    watch = seen(*(moment(k, 0) for k in (0, 1, 4, 4, 5)))
    assert (watch.lost, watch.repeated, watch.frames) == (2, 1, 5)
    assert watch.offset == pytest.approx(2 / 25)
    watch = seen(*(moment(k, 0) for k in range(100)))
    assert (watch.lost, watch.repeated) == (0, 0)
    assert watch.offset < 1e-9


def test_changes_of_the_picture_are_told_apart_by_what_lies_between() -> None:
    watch = Watch()
    for index, (chunk, level) in enumerate([(0, 0), (0, 1), (0, 1), (1, 5), (1, 6), (2, 9), (3, 19)]):
        watch.interrupted = index == 6
        watch.see(moment(index, chunk, level), chunk_frames=3)
    assert watch.changes == {
        "frames of a chunk": [1, 0, 1],
        "whole chunks": [4],
        "after a cut": [3],
        "after an interruption": [10],
    }


def test_memory_that_grows_shows_after_the_warm_up() -> None:
    seconds = [float(k) for k in range(100)]
    memory = [1e6 * k for k in range(50)] + [50e6] * 50
    assert growth(seconds, memory, 50) == 0
    assert growth(seconds, memory, 0) == pytest.approx(45.5e6)
    assert growth(seconds, memory, 1000) == 0


def test_tracks_are_thinned() -> None:
    assert list(thinned([1.0, 2.0])) == [1.0, 2.0]
    kept = list(thinned([float(k) for k in range(10_000)]))
    assert len(kept) == POINTS
    assert kept[0] == 0
    assert kept == sorted(kept)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"lost": 1}, "1 frames were lost"),
        ({"repeated": 2}, "2 frames were repeated"),
        ({"finished_twice": 1}, "1 segments ended twice"),
        ({"lost_sound": 1.0}, "1.00 s of sound were lost"),
        ({"offset": 0.05}, "sound and picture were 0.050 s apart"),
        ({"grown_bytes": 21e6}, "memory grew by 21.0 MB"),
        ({"bounds": {"made_frames": 39}}, "made_frames was above its bound"),
    ],
)
def test_what_must_not_happen_is_a_fault(change: dict, fault: str) -> None:
    assert runs.soak().faults == ()
    bad = replace(runs.soak(), **change)
    assert bad.faults == (fault,)
    if "bounds" not in change:
        assert dict(soak_lines(bad))["faults"] == fault


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"ended": True}, "the session ended by itself"),
        ({"complaints": ("TypeError",)}, "1 complaints in the console: TypeError"),
        ({"frames": 2}, "no picture moved"),
        ({"offset": Spread(0, None, None, None)}, "no mark was heard"),
        ({"server_grown_bytes": 21e6}, "the server's memory grew by 21.0 MB"),
    ],
)
def test_what_must_not_happen_in_a_visit_is_a_fault(change: dict, fault: str) -> None:
    assert runs.visit().faults == ()
    assert dict(visit_lines(replace(runs.visit(), **change)))["faults"] == fault


def test_a_distance_in_words() -> None:
    assert spread_in_words(Spread(2, 0.03, 0.05, 0.055)) == "p50 30, p95 50, most 55 ms of 2"
    assert spread_in_words(Spread(0, None, None, None)) == "not measured"


def test_a_soak_and_a_visit_survive_their_file() -> None:
    run = Run("soak", "2026-01-01", runs.CPU, soak=(runs.soak(),), visits=(runs.visit(),))
    assert from_own_json(to_json(run), "file") == run
    assert latency_in_words(runs.soak().latencies[1]) == "never"
