"""Trains the small video codec of the talking heads, and measures it.

The codec is the product's video VAE with few channels. It starts at the linear codec (`codec_start`), so its picture is
good from the first step, and training adds what a linear map cannot do: above all the fast movements of the mouth, of
which four frames share one latent frame.

Only the decoder is trained. The encoder stays the linear one: a trained encoder gained 0.3 dB, and let what goes
through the codec again and again drift away. For a linear encoder E the best decoder D gives back its latents,
E(D(z)) = z. So a still survives any number of round trips, as a stream's motion frames must.

Training sees windows of WINDOW x WINDOW pixels and FRAMES frames of fresh clips. The mouth counts MOUTH_WEIGHT times.
The loss is a squared and an absolute difference to the true pixels, and how far a round trip moves the latents. Half of
the batches first send the middle of their windows through the codec up to TRIPS times, and then ask for the same.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import TINY, VAEConfig, from_official
from model.distill.clips import Clip, draw_clip
from model.distill.codec_network import decode_clips, encode_clips
from model.distill.codec_start import Sample, start_at_linear_codec
from model.distill.face import mouth_centre, render
from model.distill.training import CHECKPOINT, Budget, Counters, Task
from model.distill.training import train as run_training
from model.vae import VAE
from model.weights.trained import FOLDER, fill, load_trained, save_trained

SIZE = 128  # pixels of a side of the picture
WINDOW = 64  # pixels of a side of what training sees
FRAMES = 9
BATCH = 2
TRIPS = 8
STAY_WEIGHT = 1000.0  # of what a trip moves, which fifty trips in one direction make 2,500 times as large
MOUTH_WEIGHT = 5.0
START_MOUTH_WEIGHT = 20.0  # with 14 the reader follows the opening at r .944 instead of .957; photos gain 1 dB
MOUTH_BOX = (20, 18)  # half width and height in pixels
WEIGHTS = FOLDER / "codec.safetensors"
CODEC = TINY.vae


@dataclass(frozen=True)
class Batch:
    """Windows of clips: frames [B, 3, T, H, W] in [-1, 1], and the weight of each pixel's error."""

    frames: Tensor
    weight: Tensor  # [B, 1, T, H, W]
    trips: int  # how often the middle of the windows goes through the codec before it must still be true


def as_clip(frames: NDArray[np.uint8]) -> Tensor:
    """RGB bytes [T, H, W, 3] -> [1, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def as_bytes(frames: Tensor) -> NDArray[np.uint8]:
    """[1, 3, T, H, W] in [-1, 1] -> RGB bytes [T, H, W, 3], rounded."""
    return (frames[0].clamp(-1, 1) * 127.5 + 128).byte().permute(1, 2, 3, 0).numpy()


def mouth_mask(centres: NDArray[np.float32], corner: tuple[int, int], size: int) -> NDArray[np.bool_]:
    """Which pixels [T, size, size] of the window at `corner` (column, row) are in the mouth box around each centre."""
    column = np.arange(size)[None, None, :] + 0.5 + corner[0]
    row = np.arange(size)[None, :, None] + 0.5 + corner[1]
    x, y = centres[:, 0, None, None], centres[:, 1, None, None]
    return (np.abs(column - x) < MOUTH_BOX[0]) & (np.abs(row - y) < MOUTH_BOX[1])


def draw_window(rng: np.random.Generator, seed: int) -> tuple[Tensor, Tensor]:
    """A random window of a fresh clip, [1, 3, T, H, W], and its weights [1, 1, T, H, W]. 60 % are around the mouth."""
    clip = draw_clip(seed, int(rng.integers(2**31)))
    start = int(rng.integers(len(clip.motion) - FRAMES + 1))
    motion = clip.motion[start : start + FRAMES]
    if rng.random() < 0.25:
        motion = np.repeat(motion[:1], FRAMES, 0)  # a still: its latents must not move
    centres = mouth_centre(clip.identity, motion, SIZE)
    corner = rng.integers(0, SIZE - WINDOW + 1, 2)
    if rng.random() < 0.6:
        corner = centres[FRAMES // 2] - WINDOW / 2 + rng.uniform(-14, 14, 2)
    x, y = (int(c) // CODEC.spatial_stride * CODEC.spatial_stride for c in np.clip(corner, 0, SIZE - WINDOW))
    frames = render(clip.identity, motion, SIZE, window=(x, y, WINDOW))
    weight = 1 + (MOUTH_WEIGHT - 1) * mouth_mask(centres, (x, y), WINDOW)
    return as_clip(frames), torch.from_numpy(weight).float()[None, None]


def draw_batch(rng: np.random.Generator, seed: int) -> Batch:
    """The windows of a step, from new clips."""
    windows = [draw_window(rng, seed) for _ in range(BATCH)]
    frames, weights = (torch.cat(part) for part in zip(*windows, strict=True))
    return Batch(frames, weights, int(rng.integers(1, TRIPS + 1)) if rng.random() < 0.5 else 0)


def codec_loss(vae: VAE, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """The loss of decoded windows, and of their middle after some trips through the codec, if the batch has trips.

    The middle is a fourth of the window's area and the first five frames, as in a stream: enough for what grows from
    trip to trip, and cheap.
    """
    loss, numbers = _decoded_loss(vae, batch.frames, batch.frames, batch.weight)
    if batch.trips:
        inner = slice(WINDOW // 4, WINDOW - WINDOW // 4)
        true, weight = (x[:, :, : 1 + CODEC.temporal_stride, inner, inner] for x in (batch.frames, batch.weight))
        seen = true
        with torch.no_grad():
            for _ in range(batch.trips):
                seen = decode_clips(vae, encode_clips(vae, seen)).clamp(-1, 1)
        more, after = _decoded_loss(vae, seen, true, weight)
        loss, numbers = loss + more, numbers | {f"{name} after trips": value for name, value in after.items()}
    return loss, numbers


def _decoded_loss(vae: VAE, seen: Tensor, true: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, float]]:
    """What is wrong with `seen` after a trip: the error of pixels, and the move of latents.

    The move is measured before latents are normalised, and divided by the number of pixel values: the linear codec is
    nearly orthonormal, so there a latent's move is a move of about the same size in pixels.
    """
    with torch.no_grad():
        latents = encode_clips(vae, seen)
    decoded = decode_clips(vae, latents)
    error, quality = _error(decoded, true, weight)
    move = (encode_clips(vae, decoded) - latents) * latent_deviation(vae).detach().view(-1, 1, 1, 1)
    moved = move.square().sum() / true.numel()
    return error + 8 * STAY_WEIGHT * moved, {"psnr": quality, "moved": moved.item()}


def _error(decoded: Tensor, true: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """(8 mean w d^2 + 0.2 mean w |d|) / mean w, with d = decoded - true, and the PSNR."""
    d = decoded - true
    loss = (8 * (weight * d.square()).mean() + 0.2 * (weight * d.abs()).mean()) / weight.mean()
    return loss, 10 * float(torch.log10(4 / d.detach().square().mean()))


def make_optimizer(vae: VAE) -> torch.optim.Optimizer:
    """AdamW with a rate for each role of a parameter.

    Adam moves every weight by about its rate. What a layer adds to the picture must move by much less than the error of
    the picture, which is small from the start: so the linear path and the last convolutions of branches are slow.
    """
    linear, first, last = [], [], []
    for name, parameter in vae.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".residual.6" in name or ".proj." in name:
            last.append(parameter)
        elif ".residual." in name or ".to_qkv." in name or name.endswith("norm.gamma"):
            first.append(parameter)
        else:
            linear.append(parameter)
    groups = [{"params": part, "lr": rate} for part, rate in ((linear, 4e-5), (first, 6e-4), (last, 6e-5))]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0)


def start_samples(seed: int, count: int) -> list[Sample]:
    """Clips that the linear codec is fitted to. The mouth counts START_MOUTH_WEIGHT times."""
    samples = []
    for index in range(count):
        clip = draw_clip(seed, index)
        mask = mouth_mask(mouth_centre(clip.identity, clip.motion, SIZE), (0, 0), SIZE)
        weight = torch.from_numpy(1 + (START_MOUTH_WEIGHT - 1) * mask).float()
        samples.append(Sample(as_clip(clip.frames(SIZE)), weight))
    return samples


def held_out_clips(count: int, frames: int = 17) -> list[Clip]:
    """Clips with identities and voices that no training draws."""
    return [draw_clip(0, index, frames, held_out=True) for index in range(count)]


def through_codec(vae: VAE, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames [T, H, W, 3] encoded and decoded by the product's steps."""
    with torch.inference_mode():
        latents = torch.cat(list(vae.encode(as_clip(frames)[0].transpose(0, 1))))
        decoded = torch.cat(list(vae.decode(latents)))
    return as_bytes(decoded.transpose(0, 1)[None])


def _progress(vae: VAE, clips: Sequence[Clip], pictures: Sequence[NDArray[np.uint8]]) -> dict[str, float]:
    """PSNR of held-out pictures, whole and in the mouth box."""
    whole, mouth = [], []
    for clip, frames in zip(clips, pictures, strict=True):
        truth = as_clip(frames)
        error = (decode_clips(vae, encode_clips(vae, truth)).clamp(-1, 1) - truth).square()[0].mean(0)
        mask = mouth_mask(mouth_centre(clip.identity, clip.motion, SIZE), (0, 0), SIZE)
        whole.append(error.mean())
        mouth.append(error[torch.from_numpy(mask)].mean())
    decibel = {"held-out psnr": whole, "held-out mouth psnr": mouth}
    return {name: 10 * float(torch.log10(4 / torch.stack(errors).mean())) for name, errors in decibel.items()}


def train(
    folder: Path,
    budget: Budget,
    seed: int = 0,
    resume: bool = False,
    start: Path | None = None,
    start_clips: int = 60,
    evaluation_clips: int = 6,
    report: Callable[[str], None] = print,
) -> Counters:
    """Trains a codec in `folder`, and writes `codec.safetensors` there, which `load_codec` reads.

    Args:
        folder: For the checkpoint, curves and the result, see `model.distill.training.train`.
        budget: How long, without the minutes that the linear codec takes at the start and the statistics at the end.
        seed: Of people, voices, movement and windows.
        resume: Continues the training in `folder`.
        start: Weights to begin with, such as the shipped ones, instead of the linear codec.
        start_clips: How many clips the linear codec is fitted to, and the latent statistics measured on.
        evaluation_clips: How many held-out clips are measured on the way.
        report: Gets lines of progress.

    Raises:
        UserError: As for `model.distill.training.train`, and if no clips can be drawn.
    """
    torch.manual_seed(seed)
    vae = VAE(CODEC)
    if start is not None:
        vae.load_state_dict(load_codec(start).state_dict())
    elif not (resume and (folder / CHECKPOINT).exists()):
        report(f"codec: fits the linear codec to {start_clips} clips")
        start_at_linear_codec(vae, start_samples(seed, start_clips))
    for part in (vae.conv2, vae.decoder):
        part.requires_grad_(True)
    clips = held_out_clips(evaluation_clips)
    pictures = [clip.frames(SIZE) for clip in clips]

    def write(_: Counters) -> None:
        normalise_latents(vae.requires_grad_(False), seed, start_clips)
        save_codec(vae, folder / WEIGHTS.name)

    task = Task(
        name="codec",
        network=vae,
        optimizer=make_optimizer(vae),
        batch=lambda rng: draw_batch(rng, seed),
        loss=lambda batch: codec_loss(vae, batch),
        evaluate=lambda _: _progress(vae, clips, pictures),
        write=write,
        mixed=False,  # a latent may move by less than bfloat16 can tell
    )
    return run_training(task, folder, budget, seed, resume, report=report)


def latent_deviation(vae: VAE) -> Tensor:
    """The deviation that each normalised latent [z] had before: the gain that the decoder's first layer gives it."""
    return vae.conv2.weight.flatten(1).norm(dim=0)


@torch.no_grad()
def normalise_latents(vae: VAE, seed: int, count: int) -> None:
    """Gives latents mean 0 and deviation 1 over `count` training clips, by the layers before and after them."""
    rows = [encode_clips(vae, as_clip(draw_clip(seed, index).frames(SIZE)))[0].flatten(1) for index in range(count)]
    latents, z = torch.cat(rows, 1), vae.config.z_dim
    mean, deviation = latents.mean(1), latents.std(1)
    vae.conv1.weight[:z].div_(deviation.view(-1, 1, 1, 1, 1))
    vae.conv1.bias[:z].sub_(mean).div_(deviation)
    vae.conv2.bias.add_(vae.conv2.weight.flatten(1) @ mean)
    vae.conv2.weight.mul_(deviation.view(1, -1, 1, 1, 1))


def save_codec(vae: VAE, path: Path) -> None:
    """Writes the codec, with the convolutions of its branches in half precision.

    The linear path stays in float32: rounding would change its gain, and a stream's round trips multiply that. Branches
    of the encoder, which add nothing, are left out.
    """
    state = {name: x for name, x in vae.state_dict().items() if not _in_silent_branch(name, vae)}
    tensors = {name: x.half() if ".residual." in name and x.ndim == 5 else x for name, x in state.items()}
    save_trained(path, tensors, dataclasses.asdict(vae.config))


def _in_silent_branch(name: str, vae: VAE) -> bool:
    """Whether the tensor is of a residual branch that ends in zeros."""
    block, branch, _ = name.partition(".residual.")
    return bool(branch) and not vae.get_parameter(f"{block}.residual.6.weight").any()


def load_codec(path: Path = WEIGHTS) -> VAE:
    """The trained codec, float32 and ready to run. Raises `UserError` if the file is not one."""
    tensors, settings = load_trained(path)
    vae = VAE(from_official(VAEConfig, settings))
    fill(vae, tensors)
    vae.prepare_weights()
    return vae


def round_trips(vae: VAE, still: NDArray[np.uint8], trips: int = 50) -> list[float]:
    """PSNR of a still [H, W, 3] after each round trip: decode, keep the last five frames, encode them again.

    This is how a stream's motion frames travel from chunk to chunk, without the network between.
    """
    frames = np.repeat(still[None], 1 + vae.config.temporal_stride, 0)
    x, losses = as_clip(frames)[0].transpose(0, 1), []
    truth = x
    with torch.inference_mode():
        for _ in range(trips):
            x = torch.cat(list(vae.decode(torch.cat(list(vae.encode(x))))))
            losses.append(10 * float(torch.log10(4 / (x - truth).square().mean())))
    return losses
