"""Files that are written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Gives the path of a temporary file, which takes the place of `path` when the block has written it.

    If anything raises, the temporary file is removed and `path` keeps what it held. The temporary file is `.NAME.tmp`
    beside `path` unless `temporary` names another one on the same file system. A killed process leaves it behind; the
    next writer of `path` overwrites it.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
