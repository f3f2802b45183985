"""torch.compile of the networks, and the folder that keeps what compilers made, for later processes and other machines.

The student is compiled by block: one block's code serves all of them, so that it takes seconds. Inductor and Triton
find again by content what they have compiled, whatever model or shape it was for; what they keep is good only for the
same device and the same versions of both, which the folder is named after.
"""

import os
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from kernels.lab_transfer import lab_statistics, lab_transfer
from model.checkpoint import Models, load_models, random_models
from model.config import TINY, Config, Precision
from model.dit import ContextKV, DiT, Modulation, rope_table
from model.machine import cache_folder
from model.vae import VAE, decode_schedule

GLANCE = 1.0  # seconds that loading is given to fail
LAYERS = 2  # of a student that stands in for another
KEPT = 1024  # compiled forms of a function: three or four for each geometry, where torch gives up at the ninth


def compile_models(models: Models) -> None:
    """Compiles what gains by it: the student, and on a CPU the VAE, whose kernels on a GPU are ours.

    Each geometry that a process meets is compiled once, and stays.
    """
    keep_all_forms()
    compile_student(models.dit)
    if models.device.type == "cpu":
        compile_vae(models.vae)


def keep_all_forms() -> None:
    """From now on torch compiles a function for every shape that it meets, and neither gives up nor runs it eagerly."""
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = KEPT


def compile_student(dit: DiT) -> None:
    """Compiles every block for the shapes that it meets; a graph that breaks is an error."""
    for block in dit.blocks:
        block.compile(fullgraph=True, dynamic=False)


def compile_vae(vae: VAE) -> None:
    """Compiles decoder and encoder, each for a clip's start and its later steps."""
    vae.decoder.compile(dynamic=False)
    vae.encoder.compile(dynamic=False)


def stand_in(config: Config, device: torch.device, precision: Precision) -> Models:
    """Networks of random weights for which the same is compiled as for those of `config`, at a fraction of their size.

    The student's blocks are alike but for the last one. The encoders run before a session, as they are: any will do.
    """
    dit = replace(config.dit, num_layers=min(LAYERS, config.dit.num_layers))
    small = replace(config, dit=dit, text=TINY.text, image=TINY.image, audio=TINY.audio)
    return random_models(small, device, precision)


@torch.inference_mode()
def warm(models: Models) -> None:
    """Runs everything that a chunk runs once in each of its shapes, on zeros, so that all is compiled and chosen."""
    config, device = models.config, models.device
    dit, chunk, vae = config.dit, config.chunk, models.vae
    frames, _, rows, columns = config.latent_shape

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def keys(count: int) -> Tensor:
        return zeros(dit.num_layers, count, dit.num_heads, dit.head_dim, dtype=models.dit.dtype)

    context = ContextKV(
        *map(keys, (dit.text_len, dit.text_len, dit.img_tokens, dit.img_tokens)), real=zeros(1).int() + 1
    )
    audio = models.dit.embed_audio(zeros(1, chunk.frame_num, dit.audio_window, dit.audio_blocks, dit.audio_channels))
    modulation = Modulation(zeros(dit.num_layers, 6, dit.dim), zeros(2, dit.dim))
    rope = rope_table(config.grid, dit.head_dim, device)
    dtype = next(vae.parameters()).dtype
    latents = zeros(*config.latent_shape)
    condition = zeros(frames, dit.in_dim - latents.shape[1], rows, columns, dtype=dtype)
    fed_back = zeros(chunk.motion_frames_num, 3, chunk.height, chunk.width, dtype=dtype)
    known = len(list(vae.encode(fed_back)))
    for count in {1, known}:
        models.dit(latents, condition, modulation, rope, context, audio, known=count)
    state = None
    for step in decode_schedule(frames, chunk.warmup_frames, config.vae.temporal_stride):
        pixels, state = vae.decode_step(latents[step.latents].to(dtype), state, step.emit)
        if step.emit:
            lab_transfer(pixels, *lab_statistics(zeros(1, 3, 8, 8)), chunk.color_correction_strength)


def load_compiled(config: Config, folder: Path | None, device: torch.device, precision: Precision) -> Models:
    """`load_models`, or without a folder `random_models`, compiled for all that a chunk runs.

    The weights come from the disk while the compilers work, on a stand-in.
    """
    use_cache(device)
    if folder is None:
        models = random_models(config, device, precision)
        compile_models(models)
        warm(models)
        return models
    small = stand_in(config, device, precision)
    compile_models(small)
    with ThreadPoolExecutor(1) as background:
        loading = background.submit(load_models, config, folder, device, precision)
        ready = wait([loading], GLANCE).done  # most mistakes show at once
        if not ready:
            warm(small)
        models = loading.result()
    compile_models(models)
    if ready:
        warm(models)
    return models


def use_cache(device: torch.device) -> Path:
    """Makes Inductor and Triton keep what they compile in the device's folder, see `cache_folder`, and gives it."""
    folder = cache_folder(device)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    return folder
