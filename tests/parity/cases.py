"""Recomputes each golden case with our code: `RUN` is {case name: function from the case to {output name: tensor}}.

A case is a configuration in JSON and tensors; every width, weight file and count comes from there. Golden tensors have
a batch axis and channels before frames; ours have no batch axis and frames first.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from kernels.lab_transfer import lab_statistics, lab_transfer
from model.audio import SpeechEncoder, normalize_loudness, official_once_chunks, stream_window, windows
from model.config import (
    AudioConfig,
    ChunkConfig,
    Config,
    DiTConfig,
    ImageConfig,
    TextConfig,
    VAEConfig,
    from_official,
)
from model.dit import AudioProjector, DiT, resize_masks
from model.image import ImageEncoder, is_unused_key, resize_center_crop, to_pixels
from model.param_map import identity_map, load_parameters
from model.rope import rope_table
from model.sampler import NUM_TIMESTEPS, denoise_step, first_latents, shifted, timesteps
from model.text import TextEncoder
from model.text_cache import CachedTextEncoder
from model.vae import VAE
from model.weights.checkpoint import Models
from streaming.generator import ChunkGenerator, first_frame_mask
from streaming.timers import StageTimer

CPU = torch.device("cpu")
M = TypeVar("M", DiT, VAE, TextEncoder, ImageEncoder, SpeechEncoder, AudioProjector)


class Case:
    """One golden case of a folder."""

    def __init__(self, meta: Path) -> None:
        self.folder = meta.parent
        self.meta: dict[str, Any] = json.loads(meta.read_text())
        self.name: str = self.meta["case"]
        self.config: dict[str, Any] = self.meta["config"]
        self.tensors: dict[str, Tensor] = load_file(meta.with_suffix(".safetensors"))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def weights(self, component: str) -> dict[str, Tensor]:
        return load_file(self.folder / self.meta["weights"][component])

    def fill(self, component: str, module: M) -> M:
        """The module with the component's weights."""
        tensors = self.weights(component)
        if isinstance(module, ImageEncoder):
            tensors = {name: t for name, t in tensors.items() if not is_unused_key(name, module.config)}
        param_map = identity_map(module) if isinstance(module, VAE | AudioProjector) else module.param_map()
        load_parameters(module, param_map, tensors.items(), component, CPU, torch.float32)
        return module.eval()

    def dit(self) -> DiT:
        return self.fill("dit", DiT(from_official(DiTConfig, self.config["dit"])))

    def vae(self) -> VAE:
        return self.fill("vae", VAE(from_official(VAEConfig, self.config["vae"])))

    def text(self) -> TextEncoder:
        return self.fill("t5", TextEncoder(from_official(TextConfig, self.config["t5"])))

    def image(self) -> ImageEncoder:
        return self.fill("clip", ImageEncoder(from_official(ImageConfig, self.config["clip"])))

    def speech(self) -> SpeechEncoder:
        return self.fill("wav2vec", SpeechEncoder(from_official(AudioConfig, self.config["wav2vec"])))


def frames_first(x: Tensor) -> Tensor:
    """[1, C, F, H, W] or [C, F, H, W] -> [F, C, H, W]."""
    return x.reshape(x.shape[-4:]).transpose(0, 1)


def dit_forward(case: Case) -> dict[str, Tensor]:
    dit = case.dit()
    latent = frames_first(case["in.latent"])
    _, p, q = dit.config.patch_size
    grid = (latent.shape[0], latent.shape[2] // p, latent.shape[3] // q)
    masks = resize_masks(case["in.ref_target_masks"], grid) if "in.ref_target_masks" in case.tensors else None
    pred = dit(
        latent,
        frames_first(case["in.y"]),
        dit.modulate(case["in.t"].item()),
        rope_table(grid, dit.config.head_dim),
        dit.embed_context(case["in.context"], case["in.clip_fea"][0]),
        dit.embed_audio(case["in.audio"]),
        masks,
    )
    return {"out.pred": frames_first(pred)[None]}


def audio_proj(case: Case) -> dict[str, Tensor]:
    c = case.config["audio_proj"]
    features = c["blocks"] * c["channels"]
    sizes = (c["seq_len"], c["seq_len_vf"], features, c["intermediate_dim"], c["context_tokens"], c["output_dim"])
    return {"out.tokens": case.fill("audio_proj", AudioProjector(*sizes))(case["in.first"], case["in.later"])}


def vae_encode(case: Case) -> dict[str, Tensor]:
    vae, video = case.vae(), frames_first(case["in.video"])
    whole = len(video) - (len(video) - 1) % vae.config.temporal_stride  # the official code drops incomplete groups
    latents = torch.cat(list(vae.encode(video[:whole])))
    return {
        "out.latent": frames_first(latents),
        "out.latent_single_frame": frames_first(torch.cat(list(vae.encode(video[:1])))),
    }


def vae_decode(case: Case) -> dict[str, Tensor]:
    vae, latents = case.vae(), frames_first(case["in.latent"])
    return {
        "out.video": frames_first(torch.cat(list(vae.decode(latents))))[None],
        "out.video_single_frame": frames_first(torch.cat(list(vae.decode(latents[:1]))))[None],
    }


def wav2vec(case: Case) -> dict[str, Tensor]:
    encoder = case.speech()
    waves = {name.removeprefix("in.wave_"): wave for name, wave in case.tensors.items() if name.startswith("in.wave_")}
    rate, fps = case.config["sample_rate"], case.config["fps"]
    return {f"out.embedding_{name}": encoder(wave, rate, fps) for name, wave in waves.items()}


def official_stream(encoder: SpeechEncoder, wave: np.ndarray, chunk: ChunkConfig) -> Iterator[Tensor]:
    """The official stream mode: each slice is appended to the ring, which is normalised and encoded anew."""
    ring = np.zeros(chunk.cached_samples)
    for c in range(len(wave) // chunk.slice_samples):
        ring = np.concatenate((ring, wave[c * chunk.slice_samples :][: chunk.slice_samples]))[-chunk.cached_samples :]
        loud = normalize_loudness(ring, chunk.sample_rate)
        yield stream_window(encoder, torch.from_numpy(loud).float(), chunk)


def audio_windows(case: Case) -> dict[str, Tensor]:
    encoder, chunk = case.speech(), from_official(ChunkConfig, case.config["infer_params"])
    wave = case["in.wave"].numpy()
    loud = torch.from_numpy(normalize_loudness(wave, chunk.sample_rate)).float()
    embedding = encoder(loud, chunk.sample_rate, chunk.tgt_fps)
    once = windows(embedding, 0, len(embedding))
    stream = list(official_stream(encoder, wave, chunk))
    out = {
        "out.once.num_chunks": torch.tensor([official_once_chunks(len(embedding), chunk)]),
        "out.stream.num_chunks": torch.tensor([len(stream)]),
    }
    for c in case.config["keep_chunks"]["once"]:
        out[f"out.once.chunk{c}"] = once[None, c * chunk.new_frames :][:, : chunk.frame_num]
    for c in case.config["keep_chunks"]["stream"]:
        out[f"out.stream.chunk{c}"] = stream[c][None]
    return out


def t5_encoder(case: Case) -> dict[str, Tensor]:
    encoder = case.text()
    prompts = zip(case["in.ids"], case["in.mask"], strict=True)
    return {f"out.context{i}": encoder(ids[mask.bool()]) for i, (ids, mask) in enumerate(prompts)}


def clip_visual(case: Case) -> dict[str, Tensor]:
    return {"out.features": case.image()(case["in.image"][0, :, 0])[None]}


def official_timesteps(steps: int, shift: float) -> Tensor:
    """Those of the published code: for other numbers of steps than 2 and 4, spread from 1000 down to 1."""
    if steps in (2, 4):
        return timesteps(steps, shift)
    base = torch.cat((torch.linspace(NUM_TIMESTEPS, 1, steps), torch.zeros(1)))
    return shifted(base / NUM_TIMESTEPS, shift) * NUM_TIMESTEPS


def schedule(case: Case) -> dict[str, Tensor]:
    out = {f"out.timesteps.steps{n}.shift{shift}": official_timesteps(n, shift) for n, shift in case.config["cases"]}
    sizes = case.config["mask_example"]
    vae, dit = VAEConfig(), DiTConfig()
    frames = (sizes["frame_num"] - 1) // vae.temporal_stride + 1
    latents = torch.empty(
        frames, vae.z_dim, sizes["height"] // vae.spatial_stride, sizes["width"] // vae.spatial_stride
    )
    return out | {"out.first_frame_mask": frames_first(first_frame_mask(latents, dit.vae_scale))[None]}


def denoise_loop(case: Case) -> dict[str, Tensor]:
    return {f"out.latents.steps{steps}": replay(case, steps) for steps in case.config["steps"]}


def replay(case: Case, steps: int) -> Tensor:
    """The latents before every step and after the last, from recorded noise and velocities."""
    noise, velocities = (case[f"in.{name}.steps{steps}"].transpose(1, 2) for name in ("noise", "velocity"))
    times, motion = official_timesteps(steps, case.config["shift"]), frames_first(case["in.motion_latent"])
    seen = [first_latents(noise.__getitem__, motion)]
    for i in range(steps):
        seen.append(denoise_step(i, seen[i], lambda _: velocities[i], noise.__getitem__, times, motion))  # noqa: B023
    return torch.stack(seen).transpose(1, 2)


def color_correction(case: Case) -> dict[str, Tensor]:
    video, lab = frames_first(case["in.video"]), lab_statistics(frames_first(case["in.reference"]))
    strengths = case.config["strengths"]
    return {f"out.corrected.strength{s}": frames_first(lab_transfer(video, *lab, s)[0])[None] for s in strengths}


def resize_and_centercrop(case: Case) -> dict[str, Tensor]:
    out = {}
    for i, image in enumerate(case.config["images"]):
        crop = resize_center_crop(Image.fromarray(case[f"in.image{i}"].numpy()), *image["target_hw"])
        out[f"out.crop{i}"] = crop[None, :, None]
    return out


def loudness_norm(case: Case) -> dict[str, Tensor]:
    inputs = {name.removeprefix("in."): wave for name, wave in case.tensors.items() if name.startswith("in.")}
    rate, target = case.config["sample_rate"], case.config["lufs"]
    return {
        f"out.{name}": torch.from_numpy(np.asarray(normalize_loudness(wave.numpy(), rate, target)))
        for name, wave in inputs.items()
    }


def chunk_loop(case: Case) -> dict[str, Tensor]:
    """The chunk generator with recorded noise. Hooks record the inputs and outputs of student and VAE."""
    settings = dict(case.config["generate"])
    chunks = settings.pop("chunks")
    rates = {k: v for k, v in case.config["infer_params"].items() if k not in settings}
    dit, vae, text, image = case.dit(), case.vae(), case.text(), case.image()
    config = Config(
        "golden", dit.config, vae.config, text.config, image.config, chunk=from_official(ChunkConfig, settings | rates)
    )
    models = Models(config, dit, vae, CachedTextEncoder(lambda: text, CPU), image, case.speech(), CPU, None)

    def noise(_seed: int | Tensor, c: int | Tensor, draw: int) -> Tensor:
        return case[f"in.noise.chunk{c}"][draw].transpose(0, 1)

    generator = ChunkGenerator(models, StageTimer(CPU), noise)
    portrait = resize_center_crop(Image.fromarray(case["in.image"].numpy()), config.chunk.height, config.chunk.width)
    ids = case["in.ids"][0][case["in.mask"][0].bool()]
    conditions = generator.prepare(portrait, ids)
    state = generator.start(conditions, seed=0)
    pixels = to_pixels(portrait)
    out = {
        "out.prepare.clip_fea": image(pixels)[None],
        "out.prepare.cond_image": pixels[None, :, None],
        "out.prepare.context": text(ids),
        "out.prepare.motion_latent": frames_first(state.motion),
        "out.prepare.seq_len": torch.tensor([np.prod(config.grid)]),
        "out.prepare.timesteps": timesteps(config.chunk.sample_steps, config.chunk.sample_shift),
        "out.prepare.y": frames_first(conditions.condition)[None],
    }
    for c in range(chunks):
        seen = Recorder(dit, vae)
        shown, steps = [], generator.chunk(conditions, state, case[f"in.audio.chunk{c}"][0])
        try:
            while True:
                shown.append(next(steps))
        except StopIteration as end:
            state = end.value
        seen.remove()
        frames = (torch.cat([group.pixels for group in shown]) + 1) / 2
        out |= {
            f"out.chunk{c}.latents": torch.stack([*seen.latents, torch.cat(seen.decoder_inputs)]).transpose(1, 2),
            f"out.chunk{c}.velocity": torch.stack(seen.velocities).transpose(1, 2),
            f"out.chunk{c}.decoded": frames_first(torch.cat(seen.decoded))[None],
            f"out.chunk{c}.frames255": frames.clamp(0, 1).permute(0, 2, 3, 1) * 255,
            f"out.chunk{c}.motion_pixels": frames_first(torch.cat(seen.encoder_inputs))[None],
            f"out.chunk{c}.next_motion_latent": frames_first(state.motion),
        }
    return {name: value for name, value in out.items() if name in case.tensors}


class Recorder:
    """Records inputs and outputs of the student and of the VAE's steps."""

    def __init__(self, dit: nn.Module, vae: VAE) -> None:
        self.latents, self.velocities = [], []
        self.decoder_inputs, self.decoded, self.encoder_inputs = [], [], []
        self._vae, self._hook = vae, dit.register_forward_hook(self._student, with_kwargs=True)
        decode_step, encode_step = vae.decode_step, vae.encode_step

        def decode(latent: Tensor, state: Any = None, emit: bool = True, _rows: None = None) -> Any:
            """Decodes all frames, as the golden case has them."""
            self.decoder_inputs.append(latent.clone())
            frames, state = decode_step(latent, state)
            self.decoded.append(frames.clone())
            return frames if emit else frames[:0], state

        def encode(frames: Tensor, state: Any = None, _rows: None = None) -> Any:
            self.encoder_inputs.append(frames.clone())
            return encode_step(frames, state)

        vae.__dict__ |= {"decode_step": decode, "encode_step": encode}

    def _student(self, student: nn.Module, args: tuple[Tensor, ...], options: dict[str, int], output: Tensor) -> None:
        """The golden case has the velocity of motion latents, which the chunk loop does not compute."""
        num_motion_latents = options.pop("num_motion_latents")
        velocity = student.forward(*args, **options)
        assert (output[:num_motion_latents] == 0).all()
        torch.testing.assert_close(output[num_motion_latents:], velocity[num_motion_latents:], rtol=1e-4, atol=1e-4)
        self.latents.append(args[0].clone())
        self.velocities.append(velocity)

    def remove(self) -> None:
        self._hook.remove()
        del self._vae.__dict__["decode_step"], self._vae.__dict__["encode_step"]


RUN: dict[str, Callable[[Case], dict[str, Tensor]]] = {
    "dit_forward": dit_forward,
    "dit_forward_two_people": dit_forward,
    "audio_proj": audio_proj,
    "vae_encode": vae_encode,
    "vae_decode": vae_decode,
    "wav2vec": wav2vec,
    "audio_windows": audio_windows,
    "t5_encoder": t5_encoder,
    "clip_visual": clip_visual,
    "schedule": schedule,
    "denoise_loop": denoise_loop,
    "color_correction": color_correction,
    "resize_and_centercrop": resize_and_centercrop,
    "loudness_norm": loudness_norm,
    "chunk_loop": chunk_loop,
}
