"""What a run shows on standard error while it works, and nothing that takes long to import."""

from __future__ import annotations  # what the annotations name would take seconds to import

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from streaming.timers import StageTimer
    from streaming.writer import Progress

LONG = 10.0  # seconds of sound from which on a bar and the time left are shown
BAR = 24  # columns


def stage(name: str, quiet: bool = False) -> AbstractContextManager[object]:
    """Shows on a terminal, for as long as the body runs, what is being done."""
    console = Console(stderr=True)
    return console.status(name) if console.is_terminal and not quiet else nullcontext()


@contextmanager
def starting(quiet: bool = False) -> Iterator[None]:
    """`stage` for imports that take seconds, a tenth of them if garbage is looked for, which they do not leave."""
    gc.disable()
    try:
        with stage("starting", quiet):
            yield
    finally:
        gc.enable()


def line(progress: Progress, stage: str, fps: int, duration: float | None) -> str:
    """One line of text; `fps` of the video, `duration` of the sound in seconds if it is known."""
    of = f" of {duration:.2f}" if duration is not None else ""
    parts = [f"chunk {progress.chunks}", f"{progress.frames} frames", f"{progress.frames / fps:.2f}{of} s"]
    if progress.fps is not None:
        parts.append(f"{progress.fps:.1f} FPS")
        if duration is not None and duration >= LONG:
            parts.append(f"{_time(max(0.0, duration * fps - progress.frames) / progress.fps)} left")
    if progress.startup is not None:
        parts.append(f"startup {progress.startup:.2f} s")
    return "  ".join([*parts, stage])


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


@contextmanager
def progress_line(
    timer: StageTimer, fps: int, duration: float | None, quiet: bool = False
) -> Iterator[Callable[[Progress], None]]:
    """Gives a function that takes the progress of a run and shows it: in place on a terminal, else a line a chunk.

    A sound of `LONG` seconds or more gets a bar on a terminal, and the time left.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    latest: list[Progress] = []
    printed = 0

    def picture() -> Text | Table:
        text = Text(line(latest[0], timer.current, fps, duration) if latest else timer.current or "preparing")
        if duration is None or duration < LONG or not latest:
            return text
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(duration * fps, min(latest[0].frames, duration * fps), width=BAR), text)
        return row

    def note(progress: Progress) -> None:
        nonlocal printed
        latest[:] = [progress]
        if not console.is_terminal and progress.chunks > printed:
            printed = progress.chunks
            console.print(line(progress, timer.current, fps, duration))

    if quiet:
        yield lambda _: None
    elif console.is_terminal:
        with Live(get_renderable=picture, console=console):  # drawn in a thread of its own
            yield note
    else:
        yield note
