"""Files are replaced completely or stay unchanged, and no temporary file is left beside them."""

import os
import pty
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.errors import UserError
from model.files import check_replaceable, refuse_to_replace, replacing, unreadable


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("earlier", [None, "earlier"])
def test_the_written_file_replaces_the_old_one(tmp_path: Path, earlier: str | None) -> None:
    path = tmp_path / "film.mp4"
    if earlier is not None:
        path.write_text(earlier)
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary == tmp_path / ".film.mp4.tmp"
        assert (path.read_text() if path.exists() else None) == earlier
    assert path.read_text() == "new"
    assert names(tmp_path) == ["film.mp4"]


@pytest.mark.parametrize("failure", [OSError, ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("written", [True, False])
def test_a_failure_keeps_the_earlier_file(tmp_path: Path, failure: type[BaseException], written: bool) -> None:
    path = tmp_path / "a.json"
    path.write_text("earlier")
    with pytest.raises(failure), replacing(path) as temporary:  # noqa: PT012
        if written:
            temporary.write_text("half")
        raise failure
    assert path.read_text() == "earlier"
    assert names(tmp_path) == ["a.json"]


def test_a_block_that_writes_nothing_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("earlier")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "earlier"


def test_a_path_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "folder") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("parent", ["nowhere", "file"])
def test_the_folder_is_not_created(tmp_path: Path, parent: str) -> None:
    """A file where the folder should be fails as well, also while the temporary file is removed."""
    (tmp_path / "file").write_text("")
    with pytest.raises((FileNotFoundError, NotADirectoryError)), replacing(tmp_path / parent / "a") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("fails", [True, False])
def test_the_temporary_file_may_have_another_name(tmp_path: Path, fails: bool) -> None:
    path, other = tmp_path / "trace.json.gz", tmp_path / ".part-trace.json.gz"
    other.write_text("a place held until now")
    try:
        with replacing(path, other.name) as temporary:
            assert temporary == other
            temporary.write_text("new")
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert names(tmp_path) == []
    else:
        assert path.read_text() == "new"
        assert names(tmp_path) == ["trace.json.gz"]


def test_a_killed_process_leaves_a_file_that_the_next_writer_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("earlier")
    code = (
        "import os, pathlib, signal, sys; from model.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "earlier"
    assert names(tmp_path) == [".a.json.tmp", "a.json"]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "another").write_text("kept")
    (tmp_path / ".a.json.tmp").symlink_to("another")
    with replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "another").read_text() == "kept"
    assert (tmp_path / "a.json").read_text() == "new"
    assert not (tmp_path / "a.json").is_symlink()


# --- What is replaced, and what is written into ---------------------------------------------------------------------


def test_the_file_that_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_text("earlier")
    (tmp_path / "second").symlink_to("far/file")
    (tmp_path / "first").symlink_to("second")
    with replacing(tmp_path / "first") as temporary:
        assert temporary.parent == tmp_path / "far"
        temporary.write_text("new")
    assert (tmp_path / "far" / "file").read_text() == "new"
    assert (tmp_path / "first").readlink() == Path("second")
    assert (tmp_path / "second").readlink() == Path("far/file")


def test_a_link_that_leads_nowhere_gets_a_file_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_links_in_a_circle_fail(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"), replacing(tmp_path / "a"):
        pass


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o444])
def test_mode_and_owner_are_kept(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.json"
    path.write_text("earlier")
    if os.getuid() == 0:
        os.chown(path, 12345, 23456)
    path.chmod(mode)
    before = path.stat()
    with replacing(path) as temporary:
        temporary.write_text("new")
    after = path.stat()
    assert stat.S_IMODE(after.st_mode) == mode
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    assert path.read_text() == "new"


def test_a_file_of_another_user_in_a_sticky_folder_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").touch()
    tmp_path.chmod(0o1777)
    check_replaceable(tmp_path / "theirs")  # by its owner
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="another user's file"):
        check_replaceable(tmp_path / "theirs")
    check_replaceable(tmp_path / "new")
    tmp_path.chmod(0o777)
    check_replaceable(tmp_path / "theirs")


def test_a_fifo_is_written_into(tmp_path: Path) -> None:
    path, heard = tmp_path / "pipe", []
    os.mkfifo(path)
    check_replaceable(path)
    reader = threading.Thread(target=lambda: heard.append(path.read_text()))
    reader.start()
    with replacing(path) as temporary:
        temporary.write_text("new")
    reader.join()
    assert heard == ["new"]
    assert path.is_fifo()
    assert names(tmp_path) == ["pipe"]


def test_a_device_is_written_into(tmp_path: Path) -> None:
    """A terminal, through a link, as nobody but root may make a device."""
    controller, device = pty.openpty()
    try:
        (tmp_path / "screen").symlink_to(os.ttyname(device))
        check_replaceable(tmp_path / "screen")
        with replacing(tmp_path / "screen") as temporary:
            temporary.write_text("new")
        assert os.read(controller, 100) == b"new"
        assert stat.S_ISCHR((tmp_path / "screen").stat().st_mode)
    finally:
        os.close(device)
        os.close(controller)


@pytest.mark.parametrize("how", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_standard_output_is_written_into_where_it_stands(tmp_path: Path, how: str) -> None:
    """Also where it is a file that others have written to and will write to."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    name = str(tmp_path / "link") if how == "link" else how
    code = (
        "import pathlib, sys; from model.files import replacing; print('before', flush=True)\n"
        "with replacing(pathlib.Path(sys.argv[1])) as temporary: temporary.write_text('report\\n')\n"
        "print('after')"
    )
    with (tmp_path / "log").open("w") as log:
        log.write("earlier\n")
        log.flush()
        subprocess.run([sys.executable, "-c", code, name], cwd=Path(__file__).parents[2], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "earlier\nbefore\nreport\nafter\n"


def test_a_failure_writes_nothing_into_a_stream(tmp_path: Path) -> None:
    read, write = os.pipe()
    with pytest.raises(ValueError), replacing(Path(f"/proc/self/fd/{write}")) as temporary:  # noqa: PT011, PT012
        temporary.write_text("half")
        raise ValueError
    os.close(write)
    assert os.read(read, 100) == b""
    os.close(read)


@pytest.mark.parametrize("name", ["folder", "file/inside", "nowhere/inside"])
def test_what_cannot_be_replaced_is_known_beforehand(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = names(tmp_path)
    with pytest.raises(OSError):  # noqa: PT011
        check_replaceable(tmp_path / name)
    check_replaceable(tmp_path / "file")
    check_replaceable(tmp_path / "new")
    assert names(tmp_path) == before


def test_names_too_long_for_a_temporary_file_and_sockets_are_known_beforehand(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        check_replaceable(tmp_path / ("n" * 252))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        with pytest.raises(OSError, match="it is a socket"):
            check_replaceable(tmp_path / "s")
    (tmp_path / ".file.tmp").write_text("of a killed process")
    check_replaceable(tmp_path / "file")
    assert names(tmp_path) == [".file.tmp", "s"]


@pytest.mark.parametrize("name", ["file", "link", "hard link", "folder/../file"])
def test_what_is_read_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "hard link").hardlink_to(tmp_path / "file")
    with pytest.raises(UserError, match="is the voice itself, which would be lost; name another place"):
        refuse_to_replace(tmp_path / name, portrait=np.zeros(3), voice=str(tmp_path / "file"))
    refuse_to_replace(tmp_path / "new", voice=tmp_path / "file")
    refuse_to_replace("-", voice="-")
    refuse_to_replace(tmp_path / ("n" * 300), voice=tmp_path / "file")
    refuse_to_replace(tmp_path / "file", voice=tmp_path / ("n" * 300))
    refuse_to_replace("/dev/null", voice="/dev/null")


# --- Damage ---------------------------------------------------------------------------------------------------------


def whole(path: Path) -> bytes:
    """A file of weights in the format of its suffix."""
    tensors = {f"layer.{i}.weight": torch.zeros(30, 40) for i in range(20)}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.999])
def test_half_a_download_is_called_that(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    data = whole(path)
    path.write_bytes(data[: int(share * len(data))])
    message = str(unreadable(path, "what the library says"))
    assert message == (
        f"{path} is truncated, as by an interrupted download ({int(share * len(data))} bytes): download it again"
    )


def test_a_file_of_the_right_length_that_was_never_filled(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(len(whole(path))))
    assert "is truncated, as by an interrupted download" in str(unreadable(path, ""))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13\n", "is a git-lfs pointer and not"),
        (b"", "is empty: copy or download it again"),
        (b"<!DOCTYPE html>\n<html><title>401</title>", "is a web page and not the file itself: download it again"),
        (b"\n <HTML><body>", "is a web page and not the file itself: download it again"),
        (b"hello", "cannot be read, it is truncated or damaged: what the library says"),
    ],
)
@pytest.mark.parametrize("name", ["a.pth", "config.json"])
def test_what_was_stored_instead_of_a_file(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = str(unreadable(tmp_path / name, "what the library says"))
    assert words in message
    assert message.startswith(str(tmp_path / name))
    assert "\n" not in message


def test_a_file_that_may_not_be_read_or_is_gone(tmp_path: Path) -> None:
    assert str(unreadable(tmp_path / "a", "")) == f"{tmp_path / 'a'} cannot be read: No such file or directory"
    assert str(unreadable(tmp_path, "")) == f"{tmp_path} cannot be read: Is a directory"
