"""A visit to the page: mistakes end in one line, and a short one is seen and kept."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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

    def wait(self, _timeout: float | None = None) -> None:
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


def test_a_server_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Stubborn(Process):
        killed = False

        def wait(self, timeout: float | None = None) -> None:
            if not Stubborn.killed:
                assert timeout is not None, "it would be waited for without an end"
                raise subprocess.TimeoutExpired("serve", timeout)

        def kill(self) -> None:
            Stubborn.killed = True

    monkeypatch.setattr(visit.subprocess, "Popen", Stubborn)
    monkeypatch.setattr(visit.psutil, "Process", lambda pid: pid)
    with visit.served(["good"], tmp_path / "log"):
        pass
    assert Stubborn.killed


class Page:
    """A page that begins a session, or says why not, or does not; and then crashes."""

    def __init__(self, problem: str = "", late: bool = False) -> None:
        self._problem, self._late = problem, late

    def set_default_timeout(self, _timeout: float) -> None:
        """It answers at once."""

    async def wait_for_selector(self, _selector: str, **_: Any) -> None:
        if self._late:
            raise pytest.importorskip("playwright.async_api").TimeoutError("Timeout 60000ms exceeded")

    async def is_visible(self, _selector: str) -> bool:
        return bool(self._problem)

    async def inner_text(self, selector: str) -> str:
        return self._problem if selector == "#problem" else "MP4"

    async def click(self, _selector: str) -> None:
        """Nothing happens."""

    async def set_input_files(self, _selector: str, _file: Path) -> None:
        """Nothing happens."""

    async def evaluate(self, script: str, *_: Any) -> None:
        if script == "viewer.take()":
            raise ValueError("the page has crashed")


@pytest.mark.parametrize(
    ("page", "kind", "problem"),
    [
        (Page("The server cannot be reached."), UserError, "the page says: The server cannot be reached."),
        (Page(late=True), UserError, "the page has begun no session in time"),
        (Page(), ValueError, "the page has crashed"),
    ],
)
def test_a_page_that_does_not_work_ends_the_visit(
    page: Page, kind: type[Exception], problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @asynccontextmanager
    async def viewer_of(*_: Any) -> AsyncIterator[tuple[Page, list[str]]]:
        yield page, []

    async def test() -> None:
        with pytest.raises(kind, match=problem):
            await visit._visit(1, 0, "http://127.0.0.1:1", psutil.Process(), "mp4", tmp_path)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "the visitor has gone, too"

    pytest.importorskip("playwright")
    monkeypatch.setattr(visit, "viewer_of", viewer_of)
    asyncio.run(test())


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
    visit.visit_command(0.05, 0, "64x64", 1, "tiny", "mp4", tmp_path / "visit.json", json=False)
    (result,) = load(tmp_path / "visit.json").visits
    assert result.setting == "tiny, 64 x 64, 1 steps, MP4"
    assert result.frames > 0
    assert not result.ended
    assert result.complaints == ()
    assert result.counts["flashtalk_moments_total"] >= result.frames
    assert result.told_offset.count == 0  # of WebRTC only
