"""The cache directory: named by the environment or in the home, and no more than a convenience."""

import os
from pathlib import Path

import pytest
import torch

from model import compile as compiling
from model import warm
from model.compile import use_compile_cache
from model.errors import UserError
from model.machine import CACHE_ENV, cache_key, device_cache_dir, writable_cache_dir
from model.text_cache import cache_dir_for

CPU = torch.device("cpu")


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user: without an entry among the users, and without these variables."""
    for name in ("HOME", "XDG_CACHE_HOME", CACHE_ENV):
        monkeypatch.delenv(name, raising=False)

    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.fixture(params=["a file is there", "a file is above", "no home"])
def no_place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot be made, for root neither."""
    if request.param == "no home":
        request.getfixturevalue("no_home")
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv(CACHE_ENV, str(tmp_path / "file" / ("below" if request.param == "a file is above" else "")))


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({CACHE_ENV: "/a"}, "/a"),
        ({CACHE_ENV: "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({CACHE_ENV: "", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/flashtalk"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/flashtalk"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/flashtalk"),
        ({CACHE_ENV: "~/a", "HOME": "/c"}, "/c/a"),
    ],
)
def test_what_names_the_cache(variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home is asked for only where nothing before it says the place."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert device_cache_dir(CPU) == Path(folder) / cache_key(CPU)


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("variables", [{}, {CACHE_ENV: "~/a"}, {"XDG_CACHE_HOME": "~/b"}])
def test_without_a_home_the_message_names_the_variable(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^there is no home directory to keep it in: set {CACHE_ENV} to a folder$"):
        device_cache_dir(CPU)


def test_a_writable_cache_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "new"))
    folder = writable_cache_dir(CPU)
    assert folder == device_cache_dir(CPU)
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("no_place")
def test_code_is_compiled_though_it_cannot_be_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # put back afterwards
    folder = use_compile_cache(CPU)
    assert folder == compiling._temporary_dir()
    assert folder.is_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(folder))
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(folder))
    line = capsys.readouterr().err
    assert line.startswith("note: compiled code is not kept: ")
    assert line.count("\n") == 1


@pytest.mark.usefixtures("no_place")
def test_prompts_are_encoded_though_they_cannot_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights").touch()
    folder = cache_dir_for(tmp_path / "weights", CPU, torch.float32)
    assert folder is None or not folder.exists()
    assert capsys.readouterr().err.count("\n") == (folder is None)


@pytest.mark.usefixtures("no_place")
@pytest.mark.parametrize("packed", [False, True])
def test_warming_a_cache_that_cannot_be_written_is_refused(
    packed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "compiled").mkdir()
    warm.pack(tmp_path / "compiled", cache_key(CPU), tmp_path / "packed.zip")
    options = ["--unpack", str(tmp_path / "packed.zip")] if packed else []
    monkeypatch.setattr("sys.argv", ["warm", "--preset", "tiny", "--device", "cpu", *options])
    assert warm.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"set {CACHE_ENV} to" in error
