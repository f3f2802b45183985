"""Files: replaced completely or not at all, what is no file written into instead; and why one cannot be read."""

import errno
import json
import math
import os
import shutil
import stat
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from model.errors import UserError

MAX_HEADER = 100_000_000  # bytes; safetensors allows no more


@contextmanager
def replacing(path: Path, temporary_name: str | None = None) -> Iterator[Path]:
    """Yields a temporary path; when the block has finished, its content is at `path`.

    An existing file is replaced and keeps its mode and, where that is allowed, its owner. Of a link, the file that it
    leads to is replaced. A device, a FIFO or an open file of this process, such as /dev/stdout, is written into. If the
    block raises, the temporary file is removed and `path` keeps its content.

    The temporary file lies beside the file that is replaced, as `.NAME.tmp` unless `temporary_name` is given. A killed
    process leaves it behind, and the next writer deletes it. For what is written into, it lies in the system's
    folder for temporary files.
    """
    if _is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / path.name
            yield written
            with written.open("rb") as file, _open_stream(path) as stream:
                shutil.copyfileobj(file, stream)
        return
    target = path.resolve()
    temporary = target.with_name(temporary_name or f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)  # it may be a link that somebody else has put there
    try:
        yield temporary
        _copy_permissions(target, temporary)
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def check_replaceable(path: Path) -> None:
    """Raises the OSError that `replacing` would meet at `path`; writes nothing there."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if path.is_socket():
        raise OSError(errno.ENXIO, "it is a socket")
    if not _is_stream(path):
        target = path.resolve()
        temporary = target.with_name(f".{target.name}.tmp")  # whose name may be too long, where that of the file is not
        with suppress(FileExistsError), temporary.open("xb"):
            temporary.unlink()
        folder = target.parent.stat()
        if folder.st_mode & stat.S_ISVTX and target.exists():  # a sticky folder, as /tmp is
            owners = {folder.st_uid, target.stat().st_uid}
            if os.geteuid() not in owners | {0}:
                raise PermissionError(errno.EPERM, "it is another user's file")


def refuse_to_replace(out: str | Path, **inputs: object) -> None:
    """Raises `UserError` if `out` leads to a file among the inputs, which are named by what they are."""
    for kind, path in inputs.items():
        if isinstance(path, str | Path) and _same_file(Path(path), Path(out)):
            raise UserError(
                f"{str(out)!r} is the {kind} itself, which would be lost; name another place for what is made"
            )


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.is_file() and one.samefile(other)
    except OSError:  # one of them is not there, or cannot be
        return False


def _is_stream(path: Path) -> bool:
    """Whether `path` can only be written into: a device, a FIFO, a socket, or a descriptor of this process."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or _descriptor(path) is not None


def _open_stream(path: Path) -> BinaryIO:
    descriptor = _descriptor(path)
    return path.open("wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb")


def _descriptor(path: Path) -> int | None:
    """The number of the descriptor of this process that an existing `path` names, itself or through links."""
    descriptors = os.path.realpath("/proc/self/fd")
    while path.is_symlink():
        if os.path.realpath(path.parent) == descriptors:
            return int(path.name)
        path = path.parent / path.readlink()
    return None


def _copy_permissions(old: Path, new: Path) -> None:
    """Gives the file `new` the mode and, where that is allowed, the owner of the file `old`, if there is one."""
    try:
        status = old.stat()
    except FileNotFoundError:
        return
    with suppress(PermissionError):
        os.chown(new, status.st_uid, status.st_gid)
    new.chmod(stat.S_IMODE(status.st_mode))  # last, as a new owner clears bits of it


# --- Damage ---------------------------------------------------------------------------------------------------------


def placeholder(path: Path) -> str | None:
    """What lies at `path` in the place of the file itself, as the end of a sentence; None if nothing is known.

    Raises OSError if the file cannot be opened.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "is empty: copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer and not the file itself: run git lfs pull in its folder"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page and not the file itself: download it again"
    return None


def read_toml(path: Path, title: str = "") -> dict[str, Any]:
    """The values of a TOML file. Raises `UserError`, which calls the file `title`, if it cannot be read or is none."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{title or path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{title or path} is not TOML: {error}") from error


def unreadable(path: Path, reason: object) -> UserError:
    """The error for a file of weights or settings that a library could not read, with what the file itself tells.

    `reason` is what the library said.
    """
    try:
        if (instead := placeholder(path)) is not None:
            return UserError(f"{path} {instead}")
        with path.open("rb") as file:
            start, size = file.read(64), file.seek(0, os.SEEK_END)
    except OSError as error:
        return UserError(f"{path} cannot be read: {error.strerror}")
    if not start.strip(b"\0") or size < _whole_size(path, start):
        return UserError(f"{path} is truncated, as by an interrupted download ({size} bytes): download it again")
    return UserError(f"{path} cannot be read, it is truncated or damaged: {reason}")


def _whole_size(path: Path, start: bytes) -> float:
    """The bytes that the file must have by its own account, infinite for a zip file without an end; 0 if unknown."""
    if start.startswith(b"PK\x03\x04"):
        return 0 if zipfile.is_zipfile(path) else math.inf
    if path.suffix != ".safetensors":
        return 0
    length = int.from_bytes(start[:8], "little")  # of the header, which says where each tensor lies
    with suppress(ValueError, AttributeError, LookupError, TypeError), path.open("rb") as file:
        file.seek(8)
        header = json.loads(file.read(min(length, MAX_HEADER)))
        return 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return 8 + length if length <= MAX_HEADER else 0
