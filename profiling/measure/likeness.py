"""How like the video of the same voice in float32 is that of another precision, frame by frame: the PSNR of its bytes.

It says how much a precision changes, not whether it is worse: `profiling quality` judges that. Portrait and voice are
those of examples/.
"""

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from model.command import check_choice
from model.config import BUNDLED, PRECISIONS, PRESETS
from model.errors import UserError
from profiling.machine import describe_machine, resolve_device
from profiling.results import Quality, Run, as_json_text, now, save, to_json
from profiling.tables import quality_table, terminal
from streaming import TalkingHeadPipeline

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMAND, MEASURE, REFERENCE = "psnr", "PSNR against fp32, dB", "fp32"
PEAK = 255


def first_frames(pipeline: TalkingHeadPipeline, count: int) -> NDArray[np.uint8]:
    """The first frames of the portrait with the voice of examples/, [count, height, width, 3]; fewer if it ends."""
    with pipeline.stream(EXAMPLES / "portrait.jpg", EXAMPLES / "voice.wav") as stream:
        frames = itertools.islice((frame for rgb, _ in stream for frame in rgb), count)
        return np.stack([frame.copy() for frame in frames])


def psnr(frames: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """10 log10(255^2 / mean squared difference) in dB; infinite for equal frames."""
    error = np.square(frames.astype(np.float64) - reference.astype(np.float64)).mean()
    return 10 * math.log10(PEAK**2 / error) if error else math.inf


def likeness(preset: str, device: str, precisions: Iterable[str], frames: int) -> Iterable[Quality]:
    """The PSNR of each precision against float32; None where the frames are equal."""
    chunk = PRESETS[preset].chunk

    def made(precision: str) -> NDArray[np.uint8]:
        with TalkingHeadPipeline.from_pretrained(preset, device=device, precision=precision) as pipeline:
            return first_frames(pipeline, frames)

    reference = made(REFERENCE)
    for precision in precisions:
        value = psnr(made(precision), reference)
        setting = f"{precision}, {chunk.sample_steps} steps, {chunk.frame_num} frames"
        yield Quality(setting, MEASURE, value if math.isfinite(value) else None, None, None)


def likeness_command(
    preset: str, device: str, precisions: Sequence[str], frames: int, out: Path | None, as_json: bool
) -> int:
    """Implements `python -m profiling psnr`."""
    if preset not in BUNDLED:
        raise UserError(f"--preset {preset}: only {', '.join(BUNDLED)} has weights in the package")
    for name in precisions:
        check_choice("--precision", name, PRECISIONS)
    where, begin = resolve_device(device), time.monotonic()
    run = Run(COMMAND, now(), describe_machine(where), notes=(f"the first {frames} frames of preset {preset}",))
    if out is not None:
        save(run, out)  # fails now, not after the work, if the place cannot be written
    with Console(stderr=True).status("generating"):
        for row in likeness(preset, str(where), precisions, frames):
            run = replace(run, quality=(*run.quality, row), seconds=time.monotonic() - begin)
            if out is not None:
                save(run, out)
    if as_json:
        print(as_json_text(to_json(run)))
    else:
        terminal().print(quality_table(run.quality))
    return 0
