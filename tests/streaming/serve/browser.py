"""A browser that the tests of a file share, as starting one takes a second; each page has storage of its own."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import soundfile

from profiling.measure.viewer import browser_with
from tests.streaming.serve.kit import HANGS, speech

T = TypeVar("T")


class Browser:
    """A headless Chromium whose microphone hears a tone, and the event loop that it belongs to."""

    def __init__(self, loop: asyncio.Runner, chromium: Any) -> None:
        self.chromium, self._loop = chromium, loop

    def run(self, test: Coroutine[Any, Any, T]) -> T:
        """Runs a test's coroutine."""
        return self._loop.run(asyncio.wait_for(test, HANGS))


@contextmanager
def running_browser(folder: Path) -> Iterator[Browser]:
    """A browser whose microphone's sound is in the folder."""
    microphone = folder / "microphone.wav"
    soundfile.write(microphone, speech(30, 48_000), 48_000, subtype="PCM_16")
    with asyncio.Runner() as loop:
        opening = browser_with(microphone)
        yield Browser(loop, loop.run(opening.__aenter__()))
        loop.run(opening.__aexit__(None, None, None))
