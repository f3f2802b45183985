"""`python -m model.warm`: compiles everything that a chunk runs, for this machine or for others like it.

    python -m model.warm --preset flashtalk-14b --precision fp8 --pack h100.zip    on one machine
    python -m model.warm --unpack h100.zip                                         on another of the same kind

The compiled code is stored in the user's cache (`model.compile`), where `python -m streaming run` finds it.
"""

import json
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from model import command as command_line
from model.command import check_choice
from model.compile import compile_models, stand_in_models, use_compile_cache, warm_up
from model.config import PRECISIONS, PRESETS
from model.errors import UserError
from model.files import replacing
from model.machine import cache_key, writable_cache_dir
from model.memory import card_of, require_fp8

MANIFEST = "manifest.json"


def run(preset: str, precision: str, device: torch.device) -> float:
    """Compiles into the device's cache directory; returns the seconds that this took."""
    begin = time.perf_counter()
    models = stand_in_models(PRESETS[preset], device, PRECISIONS[precision])
    compile_models(models)
    warm_up(models)
    return time.perf_counter() - begin


def pack(folder: Path, key: str, file: Path) -> None:
    """Writes a directory of compiled code to a zip file, atomically. `key` is the `cache_key` that it is valid for."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(json.dumps({"key": key}) + "\n")
        with replacing(file) as temporary, zipfile.ZipFile(temporary, "w", strict_timestamps=False) as archive:
            for path in sorted(folder.rglob("*")):
                archive.write(path, path.relative_to(folder))
    except OSError as error:
        raise UserError(f"--pack {file} cannot be written ({error.strerror}); name another place") from error


def check_packed(file: Path, key: str) -> None:
    """Raises `UserError` unless `pack` has written `file` with this `key`: for this device and these versions."""
    with _reading(file), zipfile.ZipFile(file) as archive:
        made = json.loads(archive.read(MANIFEST))["key"]
    if made != key:
        raise UserError(f"--unpack {file}: it was made on {made}, but this machine is {key}")


def unpack(file: Path, folder: Path, key: str) -> None:
    """Extracts a file that `pack` has written into `folder`.

    Raises `UserError` if the file cannot be read or was made for another device or other versions.
    """
    check_packed(file, key)
    with _reading(file), zipfile.ZipFile(file) as archive:  # which writes nothing outside of the folder
        folder.mkdir(parents=True, exist_ok=True)
        archive.extractall(folder)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--unpack {file} cannot be read or is not a packed cache: {error}") from error


def command(
    preset: Annotated[
        str | None, typer.Option(help="Size of the system. Default: flashtalk-14b on a GPU, tiny on a CPU.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="As in `python -m streaming run`. Default: fp8 on a GPU, or int8 if it lacks FP8; fp32 on a CPU."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    packed: Annotated[Path | None, typer.Option("--pack", help="Also write the compiled code to this file.")] = None,
    source: Annotated[Path | None, typer.Option("--unpack", help="Compile nothing; extract this file instead.")] = None,
) -> None:
    """Compiles everything that a chunk runs, so that sessions start without compiling."""
    check_choice("--device", device, ("auto", "cpu", "cuda"))
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    preset = preset or ("flashtalk-14b" if where.type == "cuda" else "tiny")
    check_choice("--preset", preset, PRESETS)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no NVIDIA GPU here; use --device cpu")
    card = card_of(where) if where.type == "cuda" else None
    precision = precision or ("fp32" if card is None else "fp8" if card.has_fp8 else "int8")
    check_choice("--precision", precision, PRECISIONS)
    if card is not None:
        require_fp8(precision, card)
    key = cache_key(where)
    if source is not None:
        check_packed(source, key)  # before a folder is made for it
    if packed is None or source is not None:  # else the file keeps what is compiled
        writable_cache_dir(where)
    folder = use_compile_cache(where)
    if source is not None:
        unpack(source, folder, key)
        print(f"{folder}: unpacked")
        return
    print(f"{folder}: compiled in {run(preset, precision, where):.1f} s")
    if packed is not None:
        pack(folder, key, packed)
        print(f"{packed}: {packed.stat().st_size / 1e6:.1f} MB")


def main() -> int:
    """Runs the command line; returns the exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return command_line.run_app(app, "code that is already compiled is kept")


if __name__ == "__main__":
    command_line.leave(main())
