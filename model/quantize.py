"""`python -m model.quantize --checkpoint DIR --out DIR`: converts an official checkpoint to FP8 or INT8.

What the converted checkpoint holds is described in `model.weights.quantize`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from model import command
from model.config import FORMATS, DiTConfig, from_official, is_known
from model.errors import UserError
from model.weights.quantize import copy_other_files, write_quantized_checkpoint
from model.weights.shards import find_student_shards, read_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Example: python -m model.quantize --checkpoint SoulX-FlashTalk-14B --out SoulX-FlashTalk-14B-FP8")
def run(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the official weights.")],
    out: Annotated[Path, typer.Option(help="Output folder. An interrupted conversion is resumed.")],
    precision: Annotated[
        str, typer.Option(help="fp8, or int8, which is more exact and also for GPUs without FP8.")
    ] = "fp8",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: where layers are quantised and measured.")] = "auto",
) -> None:
    """Quantises the student to 8 bits: 14 GB of weights, or 16 in INT8, instead of 28; prints the layers' errors."""
    command.check_choice("precision", precision, FORMATS)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {device}: PyTorch sees no such device here; use cpu")
    paths = find_student_shards(checkpoint)
    if os.path.realpath(out) == os.path.realpath(checkpoint):
        raise UserError(f"--out {out}: this is the checkpoint itself; name another folder")
    values = read_json(checkpoint / "config.json")
    try:
        config = from_official(DiTConfig, {key: x for key, x in values.items() if is_known(DiTConfig, key)})
        out.mkdir(parents=True, exist_ok=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"{checkpoint / 'config.json'}: {error}") from error
    except OSError as error:
        raise UserError(f"--out {out} cannot be created ({error.strerror}); name another folder") from error
    manifest = write_quantized_checkpoint(paths, out, config, FORMATS[precision], device)
    copy_other_files(checkpoint, out, paths)
    print(error_table(manifest, precision))


def error_table(manifest: Mapping[str, Any], form: str) -> str:
    """A text table of the errors of layers in the format `form`: minimum, median and maximum over blocks, by kind."""
    kinds: dict[str, list[tuple[float, bool]]] = {}
    for name, layer in manifest["layers"].items():
        kinds.setdefault(name.split(".", 2)[-1], []).append((layer["error"], layer[form]))
    width = max(map(len, kinds), default=0)
    lines = [f"{'layer':{width}}  blocks  in {form:4}    min  median     max"]
    for kind, found in kinds.items():
        errors = sorted(error for error, _ in found)
        low, middle, high = errors[0], errors[len(errors) // 2], errors[-1]
        kept = sum(eight for _, eight in found)
        lines.append(f"{kind:{width}}  {len(found):6}  {kept:7}  {low:6.4f}  {middle:6.4f}  {high:6.4f}")
    return "\n".join(lines)


def main() -> int:
    """Runs the command line; returns the exit code."""
    return command.run_app(app, "run the same command again to resume")


if __name__ == "__main__":
    command.leave(main())
