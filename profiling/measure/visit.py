"""A long visit to the page of `python -m streaming serve` by a headless Chromium, which talks, listens and interrupts.

The server is the real command in a process of its own; only its moments are stamped (`viewer.py`), so that the browser
can tell which one it shows and plays when.
"""

import asyncio
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile

from model.errors import UserError
from profiling.machine import describe_machine, resolve_device
from profiling.measure.soak import VOICE, WARM, growth, thinned
from profiling.measure.viewer import NUMBERS, Sight, first_sights, mark_offsets, viewer_of, watch
from profiling.results import Run, as_json_text, now, save, to_json
from profiling.soak import STALL, Spread, Visit, visit_lines

BLOCK = 8  # pixels of the numbers' blocks: 32 x 32 of the picture
ARRIVES = 0.5  # seconds from a click until the last picture before the interruption is shown, at most
PATIENCE = 30_000  # ms until a page that does not answer ends the visit
ENDS = 30.0  # seconds in which a server ends that is asked to
SERVER = f"from profiling.measure.viewer import serve_stamped; serve_stamped({BLOCK})"
TOKEN = "token-of-a-visit"
WAYS = {"webrtc": "WebRTC", "mp4": "MP4"}

# --- The server ------------------------------------------------------------------------------------------------------


@contextmanager
def served(options: Sequence[str], log: Path) -> Iterator[tuple[psutil.Process, str]]:
    """`serve` with these options as a process, and its address. Raises `UserError` if it does not start, or stays."""
    command = [sys.executable, "-c", SERVER, "serve", "--port", "0", "--quiet", *options]
    environment = os.environ | {"FLASHTALK_TOKEN": TOKEN}
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
        try:
            assert process.stdout is not None
            found = re.search(r"http://[^/]+", process.stdout.readline())
            if not found:
                _await_end(process)
                raise UserError(_last_line(log, "the server does not start"))
            yield psutil.Process(process.pid), found[0]
        except psutil.NoSuchProcess as error:
            raise UserError(_last_line(log, "the server has ended")) from error
        finally:
            process.terminate()
            _await_end(process)


def _await_end(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(ENDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(log: Path, otherwise: str) -> str:
    return (log.read_text().strip().splitlines() or [otherwise])[-1]


async def server_counts(url: str) -> dict[str, float]:
    """The counters of a server, by the names of its metrics."""
    from aiohttp import ClientSession
    from prometheus_client.parser import text_string_to_metric_families

    async with ClientSession(url) as client:
        response = await client.get("/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
        text = await response.text()
    families = [family for family in text_string_to_metric_families(text) if family.type == "counter"]
    return {s.name: s.value for family in families for s in family.samples if s.name.endswith("_total")}


# --- The visitor -----------------------------------------------------------------------------------------------------


class Visitor:
    """Treats the page at random, from a seed.

    Attributes:
        interrupts: when it interrupted, in seconds on the page's clock.
    """

    def __init__(self, page: Any, seed: int, recording: Path) -> None:
        """`recording` is what it has said now and then."""
        self.interrupts: list[float] = []
        self._page, self._random, self._recording = page, random.Random(seed), recording

    async def stay(self) -> None:
        """Talks, has recordings said, interrupts and rests, until it is cancelled."""
        while True:
            await self._random.choice((self._talk, self._talk, self._play, self._interrupt))()
            await asyncio.sleep(self._random.uniform(1, 6))

    async def _talk(self) -> None:
        await self._page.click("#talk")
        await asyncio.sleep(self._random.uniform(2, 8))
        await self._page.click("#talk")

    async def _play(self) -> None:
        await self._page.set_input_files("#file", self._recording)
        await asyncio.sleep(self._random.uniform(4, 8))

    async def _interrupt(self) -> None:
        await self._page.set_input_files("#file", self._recording)
        await asyncio.sleep(self._random.uniform(2, 4))
        if await self._page.is_enabled("#interrupt"):
            self.interrupts.append(await self._page.evaluate("performance.now() / 1000"))
            await self._page.click("#interrupt")


@dataclass
class Readings:
    """What is read of the page and of processes, once a second.

    Attributes:
        sight: what was seen and heard.
        tracks: readings over time, by name.
    """

    sight: Sight = field(default_factory=Sight)
    tracks: dict[str, list[float]] = field(default_factory=dict)

    async def read(self, seconds: float, page: Any, server: psutil.Process) -> bool:
        """Reads once. Returns whether the session still goes on."""
        frames, told = len(self.sight.frames), len(self.sight.behind)
        await self.sight.look(page)
        behind = self.sight.behind[told:] or self.tracks.get("told_offset", [0.0])[-1:]
        shown = len({number for _, number in self.sight.frames[frames:]})
        values = {
            "seconds": seconds,
            "told_offset": float(np.median(behind)),
            "shown_fps": shown / max(1e-3, seconds - self.tracks.get("seconds", [0.0])[-1]),
            "server_bytes": float(server.memory_info().rss),
            "browser_bytes": _browser_bytes(),
            "descriptors": float(server.num_fds()),
            "threads": float(server.num_threads()),
            "load": os.getloadavg()[0],
        }
        for name, value in values.items():
            self.tracks.setdefault(name, []).append(value)
        return await page.get_attribute("body", "data-phase") == "live"


def _browser_bytes() -> float:
    """Memory of all processes of the browser, in which what they share counts for each."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss if "chrom" in process.name() else 0
        except psutil.NoSuchProcess:
            continue
    return total


# --- What it was like ------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> Spread:
    """The spread of distances, regardless of their sign."""
    if not values:
        return Spread(0, None, None, None)
    sizes = np.abs(values)
    return Spread(len(sizes), float(np.median(sizes)), float(np.quantile(sizes, 0.95)), float(sizes.max()))


def standstills(frames: Sequence[tuple[float, int]], interrupts: Sequence[float]) -> tuple[list[float], list[float]]:
    """For how long each picture stood still until another came: of its own, and because of an interruption."""
    alone, after = [0.0], [0.0]
    for (begin, _), (end, _) in pairwise(first_sights(frames)):
        interrupted = any(begin - ARRIVES < at < end for at in interrupts)
        (after if interrupted else alone).append(end - begin)
    return alone, after


def unwrapped(numbers: Sequence[int]) -> list[int]:
    """Numbers that begin anew after `NUMBERS`, counted on."""
    counted, turns = [], 0
    for before, number in pairwise([numbers[0] if numbers else 0, *numbers]):
        turns += (number < before - NUMBERS // 2) - (number > before + NUMBERS // 2)
        counted.append(number + turns * NUMBERS)
    return counted


async def _begun(page: Any) -> None:
    """Waits until the page shows its session. Raises `UserError` with what the page says if it does not."""
    from playwright.async_api import TimeoutError as TooLate

    try:
        await page.wait_for_selector("body[data-phase=live], #problem:not([hidden])", timeout=2 * PATIENCE)
    except TooLate as error:
        raise UserError("the page has begun no session in time") from error
    if await page.is_visible("#problem"):
        raise UserError(f"the page says: {await page.inner_text('#problem')}")


async def _visit(minutes: float, seed: int, url: str, server: psutil.Process, video: str, folder: Path) -> dict:
    """What `Visit` has, but for its setting."""
    microphone, recording, readings = folder / "microphone.wav", folder / "recording.wav", Readings()
    samples, rate = soundfile.read(VOICE)
    soundfile.write(microphone, np.tile(samples, 4), rate, subtype="PCM_16")
    soundfile.write(recording, samples[: 6 * rate], rate, subtype="PCM_16")
    query = "?video=mp4" if video == "mp4" else ""
    async with viewer_of(f"{url}/{query}#token={TOKEN}", microphone) as (page, complaints):
        page.set_default_timeout(PATIENCE)
        await page.click("#start")
        await _begun(page)
        if await page.inner_text("#path") != WAYS[video]:
            raise UserError("WebRTC did not get through to the browser; try --video mp4")
        await watch(page, BLOCK)
        visitor, began = Visitor(page, seed, recording), time.monotonic()
        staying, goes_on = asyncio.create_task(visitor.stay()), True
        try:
            while goes_on and not staying.done() and (passed := time.monotonic() - began) < 60 * minutes:
                goes_on = await readings.read(passed, page, server)
                await asyncio.sleep(1)
        finally:
            staying.cancel()
            (gave_up,) = await asyncio.gather(staying, return_exceptions=True)
        if isinstance(gave_up, Exception):  # not that it was cancelled
            complaints.append(f"the visitor gave up: {gave_up}")
        counts = await server_counts(url)
    sight, tracks = readings.sight, readings.tracks
    numbers, warm = unwrapped(sight.numbers), min(WARM, 6 * minutes)
    alone, after = standstills(sight.frames, visitor.interrupts)
    return {
        "seconds": tracks["seconds"][-1],
        "frames": len(set(numbers)),
        "missed": (max(numbers) - min(numbers) + 1 - len(set(numbers))) if numbers else 0,
        "back": sum(later < earlier for earlier, later in pairwise(numbers)),
        "offset": spread(mark_offsets(sight.frames, sight.marks)),
        "told_offset": spread(sight.behind),
        "stalls": sum(seconds > STALL for seconds in alone),
        "longest_stall": max(alone),
        "longest_pause": max(after),
        "concealed": sight.concealed,
        "interrupts": len(visitor.interrupts),
        "ended": not goes_on,
        "complaints": tuple(complaints),
        "server_grown_bytes": growth(tracks["seconds"], tracks["server_bytes"], warm),
        "browser_grown_bytes": growth(tracks["seconds"], tracks["browser_bytes"], warm),
        "counts": counts,
        "tracks": {name: tuple(thinned(values)) for name, values in tracks.items()},
    }


def visit(minutes: float, seed: int, size: str | None, steps: int, preset: str, video: str) -> Visit:
    """Visits a server of its own for so many minutes."""
    options = ["--preset", preset, "--steps", str(steps), "--device", "cpu", *(["--size", size] if size else [])]
    with tempfile.TemporaryDirectory() as name, served(options, Path(name, "log")) as (server, url):
        seen = asyncio.run(_visit(minutes, seed, url, server, video, Path(name)))
    picture = size.replace("x", " x ") if size else "the preset's size"
    return Visit(setting=f"{preset}, {picture}, {steps} steps, {WAYS[video]}", **seen)


def visit_command(
    minutes: float, seed: int, size: str | None, steps: int, preset: str, video: str, out: Path | None, json: bool
) -> int:
    """Implements `python -m profiling visit`; returns 1 if something happened that must not."""
    if minutes <= 0:
        raise UserError(f"--minutes {minutes}: name a number above 0")
    if video not in WAYS:
        raise UserError(f"--video {video}: there are {', '.join(WAYS)}")
    started, began = now(), time.monotonic()
    result = visit(minutes, seed, size, steps, preset, video)
    run = Run(
        command=f"visit --minutes {minutes:g} --seed {seed} --video {video}",
        started=started,
        machine=describe_machine(resolve_device("cpu")),
        seconds=time.monotonic() - began,
        visits=(result,),
    )
    if out:
        save(run, out)
    if json:
        print(as_json_text(to_json(run)))
    else:
        for name, value in visit_lines(result):
            print(f"{name}: {value}")
    return int(bool(result.faults))
