"""A viewer of the page: a headless Chromium whose microphone plays a recording, and what is seen and heard in it.

Pictures carry the number of their moment, in 16 blocks, and the sound carries a mark every 2 s. So the page can say
which moment it shows when, and when it plays a mark that belongs to a known moment.

Marks are heard where the sound leaves Web Audio, which takes it from the page's video and has buffers of its own. So
they are late by these, never early: by 25 to 45 ms in Chromium 156, measured with MP4, where one clock plays sound and
picture. A picture's time is the one at which Chromium expects it on the screen, known to a frame of the screen, 17 ms.
"""

import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError
from streaming.live.session import LiveSession, Moments
from streaming.live.timeline import Moment
from streaming.sources import SOUND_RATE

FPS = 25
MARKED = 50  # moments from one with a mark to the next
NUMBERS = 1 << 16  # numbers begin anew after so many
_SCRIPT = Path(__file__).with_name("viewer.js")
_MARK = (0.04 * np.sin(np.pi / 2 * np.arange(SOUND_RATE // 50))).astype(np.float32)  # 20 ms at 12 kHz, above all speech
_MARK[:48] *= np.linspace(0, 1, 48, dtype=np.float32)

# --- Pictures and sound ---------------------------------------------------------------------------------------------


def stamped(moment: Moment, block: int) -> Moment:
    """The moment with its number in the upper left corner, in blocks of so many pixels, and a mark if it is due."""
    rgb, sound = moment.rgb.copy(), moment.sound
    rgb[: 4 * block, : 4 * block] = number_blocks(moment.index % NUMBERS, block)
    if moment.index % MARKED == 0:
        sound = sound.copy()
        sound[: len(_MARK)] += _MARK
    return replace(moment, rgb=rgb, sound=sound)


def number_blocks(number: int, block: int) -> NDArray[np.uint8]:
    """A number's 16 bits as white and black blocks, [4 * block, 4 * block, 3]."""
    bits = np.array([number >> k & 1 for k in range(16)], np.uint8).reshape(4, 4) * 255
    return np.repeat(bits.repeat(block, 0).repeat(block, 1)[..., None], 3, 2)


def with_stamps(live: Callable[..., LiveSession], block: int) -> Callable[..., LiveSession]:
    """`TalkingHeadPipeline.live`, or another such method, whose sessions hand over stamped moments."""

    def begin(*arguments: Any, **options: Any) -> LiveSession:
        session = live(*arguments, **options)
        moments = session.moments()
        session.moments = lambda: _stamping(moments, block)
        return session

    return begin


def _stamping(moments: Moments, block: int) -> Moments:
    def stamp(moment: Moment | None) -> Moment | None:
        return moment and stamped(moment, block)

    async def following() -> Moment | None:
        return stamp(await anext(moments, None))

    return Moments(lambda: stamp(next(moments, None)), following)


def serve_stamped(block: int) -> None:
    """The command line of `streaming`, whose sessions hand over stamped moments."""
    from streaming.__main__ import console
    from streaming.pipeline import TalkingHeadPipeline

    TalkingHeadPipeline.live = with_stamps(TalkingHeadPipeline.live, block)
    console()


# --- What was seen ---------------------------------------------------------------------------------------------------


@dataclass
class Sight:
    """What was seen and heard, all times in seconds on the page's clock.

    Attributes:
        frames: when a picture was shown, and its number.
        marks: when a mark was heard.
        behind: by how much sound is behind its picture as Chromium says, which knows that of WebRTC only.
        peak: the largest sample.
        concealed: seconds of sound that Chromium made up, as packets were late or lost.
    """

    frames: list[tuple[float, int]] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)
    behind: list[float] = field(default_factory=list)
    peak: float = 0.0
    concealed: float = 0.0

    async def look(self, page: Any) -> None:
        """Adds what the page has found since the last look."""
        found = await page.evaluate("viewer.take()")
        self.frames += [(at / 1000, number) for at, number in found["frames"]]
        self.marks += [at / 1000 for at in found["marks"]]
        self.behind += [ms / 1000 for ms in found["behind"]]
        self.peak, self.concealed = max(self.peak, found["peak"]), found["concealed"]

    @property
    def numbers(self) -> list[int]:
        """The numbers of the pictures in the order in which they were shown."""
        return [number for _, number in self.frames]


def first_sights(frames: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Of pictures (when, number), those that show another number than the one before."""
    return [new for old, new in pairwise([(0.0, -1), *frames]) if new[1] != old[1]]


def mark_offsets(frames: Sequence[tuple[float, int]], marks: Sequence[float]) -> list[float]:
    """By how many seconds each mark was heard behind the picture that it belongs to.

    Where that picture itself was not shown, its time follows from the nearest one that was. A mark without pictures
    around it is left out.
    """
    seen = first_sights(frames)
    if not seen:
        return []
    times = np.array([at for at, _ in seen])
    offsets = []
    for heard in marks:
        place = int(np.abs(times - heard).argmin())
        at, number = seen[place]
        marked = round(number / MARKED) * MARKED
        nearest = min(seen[max(0, place - FPS) : place + FPS], key=lambda sight: abs(sight[1] - marked))
        if abs(at - heard) < 1.0 and abs(nearest[1] - marked) < FPS:
            offsets.append(heard - nearest[0] - (marked - nearest[1]) / FPS)
    return offsets


# --- The browser -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def viewer_of(url: str, microphone: Path) -> AsyncIterator[tuple[Any, list[str]]]:
    """`page_in` a browser of its own. Raises `UserError` as `browser_with` does."""
    async with browser_with(microphone) as browser, page_in(browser, url) as viewer:
        yield viewer


@asynccontextmanager
async def browser_with(microphone: Path) -> AsyncIterator[Any]:
    """A headless Chromium. Raises `UserError` if there is none, or no playwright to drive it."""
    try:
        from playwright.async_api import async_playwright
    except ModuleNotFoundError as error:
        raise UserError("a browser is driven by playwright, which is missing: pip install playwright") from error
    if (chromium := chromium_path()) is None:
        raise UserError("there is no chromium or google-chrome on the PATH: apt-get install chromium")
    flags = [
        "--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}", "--autoplay-policy=no-user-gesture-required",
        "--allow-loopback-in-peer-connection", "--disable-features=WebRtcHideLocalIpsWithMdns",
    ]  # fmt: skip
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=chromium, headless=True, args=flags)
        yield browser
        await browser.close()


@asynccontextmanager
async def page_in(browser: Any, url: str) -> AsyncIterator[tuple[Any, list[str]]]:
    """A page at `url` with storage of its own, and what it complains of in its console, which grows.

    `watch(page, block)` begins to watch it.
    """
    page = await browser.new_page(viewport={"width": 1180, "height": 800})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    await page.add_init_script(path=_SCRIPT)
    try:
        await page.goto(url)
        await page.wait_for_selector(".faces img")
        yield page, complaints
    finally:
        await page.close()


def chromium_path() -> str | None:
    """The Chromium or Chrome on the PATH."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


async def watch(page: Any, block: int) -> None:
    """Begins to watch the page's video, whose numbers have blocks of so many pixels."""
    await page.evaluate("block => viewer.watch(block)", block)
