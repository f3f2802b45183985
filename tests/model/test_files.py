"""Files are replaced completely or stay unchanged, and no temporary file is left beside them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from model.files import replacing


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
        with replacing(path, other) as temporary:
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
