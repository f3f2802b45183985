"""The progress line of a run, on standard error: chunks, seconds of video, FPS, startup, the stage that is running."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.live import Live
from rich.text import Text

from streaming.timers import StageTimer
from streaming.writer import Progress


def stage(name: str) -> AbstractContextManager[object]:
    """Shows on a terminal, for as long as the body runs, what is being done."""
    console = Console(stderr=True)
    return console.status(name) if console.is_terminal else nullcontext()


def line(progress: Progress, stage: str, fps: int, duration: float | None) -> str:
    """One line of text; `fps` of the video, `duration` of the sound in seconds if it is known."""
    of = f" of {duration:.2f}" if duration is not None else ""
    parts = [f"chunk {progress.chunks}", f"{progress.frames} frames", f"{progress.frames / fps:.2f}{of} s"]
    if progress.fps is not None:
        parts.append(f"{progress.fps:.1f} FPS")
    if progress.startup is not None:
        parts.append(f"startup {progress.startup:.2f} s")
    return "  ".join([*parts, stage])


def show(steps: Iterator[Progress], timer: StageTimer, fps: int, duration: float | None) -> Progress:
    """Runs through `steps` and keeps the line up to date: in place on a terminal, else a line a chunk."""
    console, progress = Console(stderr=True, highlight=False, soft_wrap=True), Progress()
    if console.is_terminal:
        with Live(get_renderable=lambda: Text(line(progress, timer.current, fps, duration)), console=console):
            for progress in steps:  # noqa: B007  (shown by the line above, in its own thread)
                pass
    else:
        printed = 0
        for progress in steps:
            if progress.chunks > printed:
                printed = progress.chunks
                console.print(line(progress, timer.current, fps, duration))
    return progress
