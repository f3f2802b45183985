"""A visit to the page: mistakes end in one line, and a short one is seen and kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from model.errors import UserError
from profiling.formats import load
from profiling.measure import visit
from profiling.measure.viewer import NUMBERS, chromium_path
from profiling.soak import Spread


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"minutes": 0.0}, "--minutes 0.0: name a number above 0"),
        ({"video": "avi"}, "--video avi: there are webrtc, mp4"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], problem: str) -> None:
    defaults = {"minutes": 1.0, "seed": 0, "size": None, "steps": 4, "preset": "tiny", "video": "webrtc", "out": None}
    with pytest.raises(UserError, match=problem):
        visit.visit_command(**defaults | options, json=False)


class Process:
    """A server's process that has written a line to its log and no address."""

    def __init__(self, command: list[str], stderr: Any, **_: Any) -> None:
        self.pid, self.stdout, self.ended = 1, SimpleNamespace(readline=lambda: self.said), 0
        self.said = "The page is http://127.0.0.1:1/#token=x\n" if "good" in command else ""
        stderr.write("starting\nerror: --port 1 cannot be listened at\n")
        stderr.flush()

    def wait(self) -> None:
        self.ended += 1

    def terminate(self) -> None:
        self.ended += 1


def test_a_server_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(visit.subprocess, "Popen", Process)
    with pytest.raises(UserError, match="--port 1 cannot be listened at"), visit.served(["bad"], tmp_path / "log"):
        pass


def test_a_server_that_ends_in_between_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(visit.subprocess, "Popen", Process)

    def look() -> None:
        with visit.served(["good"], tmp_path / "log") as (_, url):
            assert url == "http://127.0.0.1:1"
            raise psutil.NoSuchProcess(1)

    with pytest.raises(UserError, match="--port 1"):
        look()


def test_standstills_of_their_own_and_those_of_interruptions() -> None:
    frames = [(10.0, 1), (10.04, 2), (10.7, 3), (10.74, 3), (10.78, 4), (19.7, 5), (20.04, 6), (20.9, 7)]
    alone, after = visit.standstills(frames, [9.8, 19.8])
    assert max(alone) == pytest.approx(8.92), "a number that is shown twice is one picture"
    assert sorted(after)[-3:] == pytest.approx([0.34, 0.66, 0.86]), "the last picture before it was on its way"
    assert visit.standstills([], []) == ([0.0], [0.0])


def test_numbers_that_begin_anew_count_on() -> None:
    last = NUMBERS - 1
    assert visit.unwrapped([last - 1, last, 0, last, 1]) == [last - 1, last, last + 1, last, last + 2]
    assert visit.unwrapped([]) == []


def test_a_spread_regards_no_sign() -> None:
    found = visit.spread([-0.03, 0.01, 0.02])
    assert vars(found) == {"count": 3, "p50": 0.02, "p95": pytest.approx(0.029), "most": 0.03}
    assert visit.spread([]) == Spread(0, None, None, None)


@pytest.mark.slow
def test_a_short_visit_is_seen_and_kept(tmp_path: Path) -> None:
    for package in ("playwright", "aiohttp", "aiortc"):
        pytest.importorskip(package, reason=f"{package} is missing")
    if chromium_path() is None:
        pytest.skip("no chromium or google-chrome on the PATH")
    visit.visit_command(0.1, 0, "64x64", 1, "tiny", "mp4", tmp_path / "visit.json", json=False)
    (result,) = load(tmp_path / "visit.json").visits
    assert result.setting == "tiny, 64 x 64, 1 steps, MP4"
    assert result.frames > 0
    assert not result.ended
    assert result.complaints == ()
    assert result.counts["flashtalk_moments_total"] >= result.frames
    assert result.told_offset.count == 0  # of WebRTC only
