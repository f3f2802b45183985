"""Whether the projections of the audio layers are absorbed once a chunk, or anew in every denoising step.

The student computes the same either way, bit for bit (`model.dit.DiT.absorb_audio`). Once a chunk saves all absorptions
but one, and needs memory for what is absorbed in all blocks: for 14B 8.8 GiB in bfloat16, 4.4 GiB in e4m3. It is done
if a GPU has room for that beside everything else that may still be allocated, by count:

    absorbed, twice       the next chunk's are made while memory of the last chunk's may still be in use
    a chunk's work        activations, and the results that pass between CUDA graphs
    the largest visitor   an encoder that is on the GPU while a session is prepared

On a CPU the absorption is done once a chunk if that takes little memory.
"""

import math

import torch
from torch import nn

from model.config import ChunkConfig
from model.text import TextEncoder
from model.weights.checkpoint import Models

LITTLE_BYTES = 64 * 2**20  # on a CPU, whose free memory belongs to others as well
WORK_BYTES_PER_PIXEL = 400  # of all frames of a chunk: docs/precision-and-memory.md counts 4.2 GiB for 11.4 million


def work_bytes(chunk: ChunkConfig) -> int:
    """Bytes that the generation of a chunk needs beside weights, keys and values."""
    return WORK_BYTES_PER_PIXEL * chunk.frame_num * chunk.height * chunk.width


def visitor_bytes(models: Models) -> int:
    """Bytes of the largest of the modules that are on the device only while a session is prepared."""
    with torch.device("meta"):  # it may not have been loaded
        text = TextEncoder(models.config.text)
    student = nn.ModuleList(models.dit.offloadable_modules().values())
    itemsize = models.dit.dtype.itemsize
    return itemsize * max(sum(x.numel() for x in module.parameters()) for module in (text, models.image, student))


def fits(absorbed: int, work: int, visitor: int, free: int) -> bool:
    """Whether `free` bytes have room for what the module's first lines count."""
    return 2 * absorbed + work + visitor <= free


def absorbs_once(models: Models, frames: int) -> bool:
    """Whether a chunk's audio projections are absorbed once, for `frames` latent frames, with what is free now."""
    absorbed = models.dit.absorbed_bytes(frames, math.prod(models.config.grid[1:]))
    if models.device.type != "cuda":
        return models.device.type == "cpu" and absorbed <= LITTLE_BYTES
    return fits(absorbed, work_bytes(models.config.chunk), visitor_bytes(models), free_bytes(models.device))


def free_bytes(device: torch.device) -> int:
    """Free bytes of a GPU, with those that PyTorch holds and does not use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
