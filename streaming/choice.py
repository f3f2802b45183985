"""What a pipeline may be asked for: weights, device, precision and picture, checked before anything is loaded."""

import operator
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from model.command import check_choice
from model.compile import load_compiled
from model.config import BUNDLED, PRECISIONS, PRESETS, Config
from model.errors import UserError
from model.memory import SPARE_BYTES, card_of
from model.parallel.ranks import Ranks
from model.sampler import NUM_TIMESTEPS
from model.weights.checkpoint import Models, load_models, preset_models
from model.weights.quantize import format_of
from streaming.fitting import choose_fit

MAX_SIDE = 4096  # pixels
MAX_SHIFT = 100.0


class Choice(NamedTuple):
    """What a pipeline is made of."""

    config: Config  # all dimensions, in the picture's size
    load: Callable[[Ranks | None], Models]  # loads the networks; with ranks, on each of them
    device: torch.device
    graphs: bool  # whether stages are captured as CUDA graphs
    settings: dict[str, Any]  # what was chosen, as JSON values
    notes: tuple[str, ...] = ()  # what was chosen without being asked for, a sentence each
    spare_bytes: int = SPARE_BYTES  # memory that nothing else wants


def choose(
    model: str | Path,
    preset: str | None,
    device: str,
    precision: str,
    size: tuple[int, int] | Literal["auto"] | None,
    frames: int | None,
    steps: int,
    shift: float | None,
    color: float,
    compiled: bool | None,
    wav2vec: str | Path | None,
    noise: str,
    random_weights: bool,
) -> Choice:
    """The choice that the arguments of `TalkingHeadPipeline.from_pretrained` make; raises `UserError` as it does."""
    folder = None if str(model) in PRESETS else Path(model)
    if folder is None and preset not in (None, str(model)):
        raise UserError(f"preset {preset}: {model} is the preset already; name a checkpoint's folder or one preset")
    if folder is not None and random_weights:
        raise UserError("a checkpoint and random weights exclude each other")
    name = preset or ("flashtalk-14b" if folder else str(model))
    check_choice("preset", name, PRESETS)
    if folder is None and name not in BUNDLED and not random_weights:
        raise UserError(f"preset {name} needs the folder of a checkpoint (or random weights, which draw noise)")
    check_choice("device", device, ("auto", "cpu", "cuda"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch sees no NVIDIA GPU here; use cpu")
    check_choice("precision", precision, ("auto", *PRECISIONS))
    check_choice("noise", noise, ("counter", "torch"))
    if noise == "torch" and (compiled or compiled is None) and device == "cuda":
        raise UserError("noise torch: CUDA graphs cannot hold a generator's draws; do not compile, or take counter")
    config = _configured(PRESETS[name], None if size == "auto" else size, frames, steps, shift, color)

    where, speech = torch.device(device), Path(wav2vec) if wav2vec else None
    checkpoint_format = None if folder is None else format_of(folder)
    graphs, text_device, notes, spare = False, where, (), SPARE_BYTES
    if device == "cuda":
        drawn = folder is None and name not in BUNDLED
        found, notes = choose_fit(config, precision, checkpoint_format, compiled, card_of(where), drawn)
        precision, graphs, spare = found.precision, found.graphs, found.spare
        text_device = where if found.text_on_card else torch.device("cpu")
    elif precision == "auto":
        precision = checkpoint_format or "fp32"
    dtypes, compiled = PRECISIONS[precision], device == "cuda" if compiled is None else compiled

    def load(ranks: Ranks | None) -> Models:
        if compiled:
            return load_compiled(config, folder, where, dtypes, speech, ranks, text_device)
        if folder is not None:
            return load_models(config, folder, where, dtypes, speech, text_device)
        return preset_models(config, where, dtypes, text_device)

    settings = {
        "preset": name, "checkpoint": str(folder) if folder else None, "precision": precision, "noise": noise,
        "compiled": compiled, "graphs": graphs, "text_encoder": text_device.type, "steps": steps,
        "chunk": asdict(config.chunk),
    }  # fmt: skip
    return Choice(config, load, where, graphs, settings, notes, spare)


def checked_steps(steps: int) -> int:
    """The number of denoising steps, if there can be so many; else raises `UserError`."""
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise UserError(f"steps {steps}: name a number from 1 to {NUM_TIMESTEPS}")
    return steps


def _configured(
    preset: Config, size: tuple[int, int] | None, frames: int | None, steps: int, shift: float | None, color: float
) -> Config:
    """The preset with another picture, chunk or sampling."""
    chunk, stride = preset.chunk, preset.vae.spatial_stride * preset.dit.patch_size[1]
    try:
        width, height = map(operator.index, size or (chunk.width, chunk.height))
    except (TypeError, ValueError):
        raise UserError(f"size {size!r}: give width and height, such as (448, 768), or 'auto'") from None
    for name, pixels in (("width", width), ("height", height)):
        if pixels % stride or not stride <= pixels <= MAX_SIDE:
            below = min(max(pixels // stride * stride, stride), MAX_SIDE)
            fits = f"{below} or {below + stride}" if below + stride <= MAX_SIDE and below < pixels else f"{below}"
            wanted = f"a multiple of {stride} up to {MAX_SIDE}, such as {fits}"
            raise UserError(f"size {width}x{height}: the {name} must be {wanted}")
    frames = chunk.frame_num if frames is None else frames
    group, longest = preset.vae.temporal_stride, chunk.cached_frames
    if (frames - 1) % group or not chunk.motion_frames_num < frames <= longest:
        least = chunk.motion_frames_num + group
        raise UserError(
            f"frames {frames}: a chunk has {least}, {least + group}, {least + 2 * group} ... frames, at most {longest}"
        )
    shift = chunk.sample_shift if shift is None else shift
    if not 0 < shift <= MAX_SHIFT:
        raise UserError(f"shift {shift}: name a number above 0, at most {MAX_SHIFT:g}; the published code has 5")
    if not 0 <= color <= 1:
        raise UserError(f"color {color}: name a number from 0 (colours as generated) to 1 (those of the portrait)")
    chunk = replace(
        chunk,
        width=width,
        height=height,
        frame_num=frames,
        sample_steps=checked_steps(steps),
        sample_shift=shift,
        color_correction_strength=color,
    )
    return replace(preset, chunk=chunk)
