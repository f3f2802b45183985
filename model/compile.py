"""torch.compile of the student and the VAE, and the on-disk cache of what Inductor and Triton compile.

The student is compiled per block. All blocks share the code of one, so compilation takes seconds. Inductor and Triton
find earlier results by content, whatever model or shape they were made for. The results are valid for one device and
one version of PyTorch and Triton, and the cache directory is named after these.
"""

import atexit
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from kernels.lab_transfer import lab_statistics, lab_transfer
from model.block import ContextKV
from model.config import TINY, Config, Precision
from model.dit import DiT, Modulation
from model.errors import UserError
from model.machine import writable_cache_dir
from model.parallel.ranks import Ranks
from model.parallel.rows import RowSplit
from model.parallel.tokens import TokenSplit
from model.rope import rope_table
from model.vae import VAE, decode_schedule
from model.weights.checkpoint import Models, load_models, preset_models, random_models

FAIL_FAST_SECONDS = 1.0  # time in which most errors in a checkpoint are found, before compilation starts
STAND_IN_LAYERS = 2  # layers of the stand-in student: one like all but the last, and the last
RECOMPILE_LIMIT = 1024  # per function; each geometry needs three or four, and PyTorch's default is eight


def compile_models(models: Models) -> None:
    """Compiles the student and, on a CPU, the VAE. On a GPU the VAE already runs on kernels of this project.

    Every input geometry is compiled once per process.
    """
    raise_recompile_limit()
    compile_student(models.dit)
    if models.device.type == "cpu":
        compile_vae(models.vae)


def raise_recompile_limit() -> None:
    """Lets torch.compile specialise a function for up to `RECOMPILE_LIMIT` shapes; beyond that it runs eagerly."""
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = RECOMPILE_LIMIT


def compile_student(dit: DiT) -> None:
    """Compiles every block of the student for static shapes. A graph break is an error."""
    for block in dit.blocks:
        block.compile(fullgraph=True, dynamic=False)


def compile_vae(vae: VAE) -> None:
    """Compiles the VAE's decoder and encoder for static shapes."""
    vae.decoder.compile(dynamic=False)
    vae.encoder.compile(dynamic=False)


def stand_in_models(config: Config, device: torch.device, precision: Precision) -> Models:
    """Small networks of random weights that compile to the same code as the networks of `config`.

    All blocks of the student but the last compile to the same code, so two blocks are enough. The encoders are not
    compiled and are as small as those of the preset `tiny`.
    """
    dit = replace(config.dit, num_layers=min(STAND_IN_LAYERS, config.dit.num_layers))
    stand_in = replace(config, dit=dit, text=TINY.text, image=TINY.image, audio=TINY.audio)
    return random_models(stand_in, device, precision)


@torch.inference_mode()
def warm_up(models: Models, ranks: Ranks | None = None) -> None:
    """Runs every operation of a chunk once in each of its shapes, on zeros, so that all is compiled and autotuned.

    With `ranks`, in the shapes of this rank's share; all ranks call it.
    """
    config, device = models.config, models.device
    dit, chunk, vae = config.dit, config.chunk, models.vae
    frames, _, rows, columns = config.latent_shape

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def kv(count: int) -> Tensor:
        return zeros(dit.num_layers, count, dit.num_heads, dit.head_dim, dtype=models.dit.dtype)

    context = ContextKV(
        *map(kv, (dit.text_len, dit.text_len, dit.img_tokens, dit.img_tokens)),
        num_text_tokens=zeros(1).int() + 1,
        o_bound=zeros(dit.num_layers),
    )
    split = None if ranks is None else TokenSplit.of_grid(ranks, config.grid, device)
    slabs = None if ranks is None else RowSplit.of_rows(ranks, rows)

    def own(x: Tensor) -> Tensor:
        return x if slabs is None else slabs.own(x)

    windows = zeros(1, chunk.frame_num, dit.audio_window, dit.audio_blocks, dit.audio_channels)
    audio = models.dit.embed_audio(windows, split)
    modulation = Modulation(zeros(dit.num_layers, 6, dit.dim), zeros(2, dit.dim))
    rope = rope_table(config.grid, dit.head_dim, device)
    dtype = next(vae.parameters()).dtype
    latents = zeros(*config.latent_shape)
    condition = zeros(frames, dit.in_dim - latents.shape[1], rows, columns, dtype=dtype)
    motion_frames = zeros(chunk.motion_frames_num, 3, chunk.height, chunk.width, dtype=dtype)
    num_motion_latents = len(list(vae.encode(own(motion_frames), slabs)))
    for count in {1, num_motion_latents}:
        models.dit(latents, condition, modulation, rope, context, audio, num_motion_latents=count, split=split)
    state = None
    for step in decode_schedule(frames, chunk.warmup_frames, config.vae.temporal_stride):
        pixels, state = vae.decode_step(own(latents[step.latents]).to(dtype), state, step.emit, slabs)
        if step.emit:
            lab_transfer(pixels, *lab_statistics(zeros(1, 3, 8, 8)), chunk.color_correction_strength)


def load_compiled(
    config: Config,
    folder: Path | None,
    device: torch.device,
    precision: Precision,
    wav2vec: Path | None = None,
    ranks: Ranks | None = None,
    text_device: torch.device | None = None,
) -> Models:
    """`load_models`, or `preset_models` if `folder` is None, compiled and warmed up for all shapes of a chunk.

    While the weights are read from disk, the code is compiled on stand-in networks; not among several ranks, which
    would not reach their exchanges together.
    """
    use_compile_cache(device)
    if folder is None or ranks is not None:
        if folder is None:
            models = preset_models(config, device, precision, text_device)
        else:
            models = load_models(config, folder, device, precision, wav2vec, text_device)
        compile_models(models)
        warm_up(models, ranks)
        return models
    stand_in = stand_in_models(config, device, precision)
    compile_models(stand_in)
    with ThreadPoolExecutor(1) as background:
        loading = background.submit(load_models, config, folder, device, precision, wav2vec, text_device)
        ready = wait([loading], FAIL_FAST_SECONDS).done
        if not ready:
            warm_up(stand_in)
        models = loading.result()
    compile_models(models)
    if ready:
        warm_up(models)
    return models


def use_compile_cache(device: torch.device) -> Path:
    """Points the caches of Inductor and Triton at `device_cache_dir`, and returns that directory.

    If that cannot be written, it is a temporary directory, which goes when the process ends; one line on stderr says
    so.
    """
    try:
        folder = writable_cache_dir(device)
    except UserError as error:
        print(f"note: compiled code is not kept: {error}", file=sys.stderr)
        folder = _temporary_dir()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    return folder


@cache
def _temporary_dir() -> Path:
    """A directory that is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="flashtalk-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
