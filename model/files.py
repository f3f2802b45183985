"""Atomic file replacement: a file is written completely or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` when the block has finished.

    If the block raises, the temporary file is removed and `path` keeps its content. The temporary file is `.NAME.tmp`
    beside `path`, unless `temporary` names another path on the same file system. A killed process leaves it behind, and
    the next writer of `path` overwrites it.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
