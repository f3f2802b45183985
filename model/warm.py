"""`python -m model.warm`: compiles all that a chunk runs ahead of time, for this machine or others like it.

    python -m model.warm --preset flashtalk-14b --precision fp8 --pack h100.tar    on one machine
    python -m model.warm --unpack h100.tar                                         on another of the same kind

What is compiled lies in the user's cache (`model.compile`), where `python -m streaming run` finds it.
"""

import json
import sys
import tarfile
import time
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
from model.machine import cache_key

MANIFEST = "manifest.json"


def run(preset: str, precision: str, device: torch.device) -> float:
    """Compiles into the device's folder, and gives the seconds that it took."""
    begin = time.perf_counter()
    models = stand_in_models(PRESETS[preset], device, PRECISIONS[precision])
    compile_models(models)
    warm_up(models)
    return time.perf_counter() - begin


def pack(folder: Path, key: str, file: Path) -> None:
    """Puts a folder of compiled code into a file, whole or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(json.dumps({"key": key}) + "\n")
        with replacing(file) as temporary, tarfile.open(temporary, "w") as archive:
            archive.add(folder, arcname=".")
    except OSError as error:
        raise UserError(f"--pack {file} cannot be written ({error.strerror}); name another place") from error


def unpack(file: Path, folder: Path, key: str) -> None:
    """Adds what `pack` has put into a file to a folder; raises `UserError` if it was made for something else."""
    try:
        with tarfile.open(file) as archive:
            member = archive.extractfile(f"./{MANIFEST}")
            made = json.load(member)["key"] if member else None
            if made != key:
                raise UserError(f"--unpack {file}: it was made on {made}, this is {key}")
            folder.mkdir(parents=True, exist_ok=True)
            archive.extractall(folder, filter="data")
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--unpack {file} cannot be read, or is no packed cache: {error}") from error


def command(
    preset: Annotated[
        str | None, typer.Option(help="Size of the system. Default: flashtalk-14b on a GPU, tiny on a CPU.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="As for `python -m streaming run`. Default: fp8 on a GPU, fp32 on a CPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    packed: Annotated[Path | None, typer.Option("--pack", help="Also write what was compiled into this file.")] = None,
    source: Annotated[Path | None, typer.Option("--unpack", help="Compile nothing: take it from this file.")] = None,
) -> None:
    """Compiles all that a chunk runs, so that no session has to."""
    check_choice("--device", device, ("auto", "cpu", "cuda"))
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    preset = preset or ("flashtalk-14b" if where.type == "cuda" else "tiny")
    precision = precision or ("fp8" if where.type == "cuda" else "fp32")
    check_choice("--preset", preset, PRESETS)
    check_choice("--precision", precision, PRECISIONS)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no NVIDIA GPU here; use --device cpu")
    folder, key = use_compile_cache(where), cache_key(where)
    if source is not None:
        unpack(source, folder, key)
        print(f"{folder}: unpacked")
        return
    print(f"{folder}: compiled in {run(preset, precision, where):.1f} s")
    if packed is not None:
        pack(folder, key, packed)
        print(f"{packed}: {packed.stat().st_size / 1e6:.1f} MB")


def main() -> int:
    """Runs the command line; a user's mistake ends in one line and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return command_line.run_app(app, "what is compiled is kept")


if __name__ == "__main__":
    sys.exit(main())
