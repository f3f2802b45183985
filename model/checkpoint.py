"""Loads the official checkpoint folder onto a device, tensor by tensor, or makes a system with random weights.

    FOLDER/config.json, diffusion_pytorch_model*.safetensors          student
    FOLDER/Wan2.1_VAE.pth                                             video VAE
    FOLDER/models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/          text encoder, tokenizer
    FOLDER/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth    image encoder
    FOLDER/chinese-wav2vec2-base/ (or beside FOLDER)                  speech encoder

Modules are built without storage; each tensor then goes from the mapped file to its device in its final dtype, so host
memory holds one tensor at a time beside what the target device itself needs.
"""

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from model import quantize
from model.audio import SpeechEncoder, official_name
from model.config import AudioConfig, Config, DiTConfig, Precision, from_official, is_known
from model.dit import DiT
from model.errors import UserError
from model.image import ImageEncoder, unused
from model.prompts import Prompts, kept_for
from model.slots import Slot, own_slots
from model.tensors import fill, read_json, safetensors_of, shards
from model.text import TextEncoder
from model.vae import VAE

VAE_FILE = "Wan2.1_VAE.pth"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
AUDIO_FOLDER = "chinese-wav2vec2-base"

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Models:
    """The five networks of a system, ready for one device, and the config they were built from.

    On a GPU, what only the beginning of a session needs stays in the host's memory, and visits: the encoders of text
    and image, and the part of the student that makes their keys and values, and the modulation.
    """

    config: Config
    dit: DiT
    vae: VAE
    text: Prompts
    image: ImageEncoder
    audio: SpeechEncoder
    device: torch.device
    folder: Path | None  # the checkpoint, where its tokenizer lies; None for random weights


def random_models(
    config: Config, device: torch.device, precision: Precision, seed: int = 0, home: str | torch.device = "cpu"
) -> Models:
    """A system of random weights, the same for the same seed, device and precision. What it draws is noise.

    What only visits the device lies at `home`.
    """

    def student() -> DiT:
        dit = DiT(config.dit)
        if precision.fp8 is not None:
            dit.quantize(precision.fp8)
        if precision.fp8_attention:
            dit.attend_in_fp8()
        return dit

    def build(factory: Callable[[], M], dtype: torch.dtype) -> M:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                module = factory()
            return module.to(device).requires_grad_(False).eval()  # transformers makes a few on the CPU all the same
        finally:
            torch.set_default_dtype(default)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        models = Models(
            config,
            build(student, precision.dit),
            build(lambda: VAE(config.vae), precision.vae),
            Prompts(partial(build, lambda: TextEncoder(config.text), precision.text), device),
            build(lambda: ImageEncoder(config.image), precision.image),
            build(lambda: SpeechEncoder(config.audio), precision.audio),
            device,
            None,
        )
    for module in (models.text.encoder, models.image, *models.dit.visitors().values()):
        module.to(home)
    models.vae.prepare_weights()
    models.vae.quantize(precision.fp8_vae)
    return models


def load_models(config: Config, folder: Path, device: torch.device, precision: Precision) -> Models:
    """The system whose weights lie in `folder`.

    Raises `UserError`, naming the file and tensor, for anything missing, extra, wrongly shaped or unreadable.
    """
    audio_folder = next((p for p in (folder / AUDIO_FOLDER, folder.parent / AUDIO_FOLDER) if p.is_dir()), None)
    quantised = quantize.is_quantised(folder)
    if quantised and precision.fp8 is None:
        raise UserError(f"{folder} holds an FP8 student: use --precision fp8 or fp8-attn")
    weights = [] if quantised else shards(folder)
    for file in (VAE_FILE, TEXT_FILE, IMAGE_FILE):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not a whole checkpoint: {file} is missing")
    if audio_folder is None:
        raise UserError(f"{folder} is not a whole checkpoint: the folder {AUDIO_FOLDER} is neither in it nor beside it")
    _check_same(config.dit, read_json(folder / "config.json"), folder / "config.json", config.name)
    config = replace(config, audio=_audio_config(config, audio_folder))

    def place(module: M, slots: Mapping[str, Slot], tensors: Iterable[tuple[str, Tensor]], *args: Any) -> M:
        fill(module, slots, tensors, *args)
        return module.requires_grad_(False).eval()

    def text() -> TextEncoder:
        with torch.device("meta"):
            encoder = TextEncoder(config.text)
        tensors = _pth_tensors(folder / TEXT_FILE)
        return place(encoder, encoder.slots(), tensors, folder / TEXT_FILE, home, precision.text)

    home = torch.device("cpu")
    with torch.device("meta"):
        dit, vae = DiT(config.dit), VAE(config.vae)
        image, audio = ImageEncoder(config.image), _speech_encoder(config.audio, audio_folder)
    visitors = dit.visitors()
    if quantised:
        quantize.load(dit, folder, device, visitors)
    elif precision.fp8 is not None:
        quantize.load_official(dit, weights, precision.fp8, precision.dit, device, visitors)
    else:
        fill(dit, dit.slots(), safetensors_of(weights, device), folder, device, precision.dit, visitors)
    if precision.fp8_attention:
        dit.attend_in_fp8()
    speech = ((name, t) for raw, t in _speech_tensors(audio_folder) if (name := official_name(raw)) is not None)
    pixels = ((name, t) for name, t in _pth_tensors(folder / IMAGE_FILE) if not unused(name, config.image))
    place(vae, own_slots(vae), _pth_tensors(folder / VAE_FILE), folder / VAE_FILE, device, precision.vae)
    vae.prepare_weights()
    vae.quantize(precision.fp8_vae)
    return Models(
        config,
        dit.requires_grad_(False).eval(),
        vae,
        Prompts(text, device, kept_for(folder / TEXT_FILE, device, precision.text)),
        place(image, image.slots(), pixels, folder / IMAGE_FILE, home, precision.image),
        place(audio, audio.slots(), speech, audio_folder, device, precision.audio),
        device,
        folder,
    )


def _pth_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a pickled state dict, mapped from the file (files of the old, unzipped format are read)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises whatever its unpickler meets
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read, it is truncated or damaged: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path} holds something other than named tensors")
    yield from state.items()


def _speech_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    if (folder / "model.safetensors").is_file():
        return safetensors_of([folder / "model.safetensors"], torch.device("cpu"))
    if (folder / "pytorch_model.bin").is_file():
        return _pth_tensors(folder / "pytorch_model.bin")
    raise UserError(f"{folder} is not a checkpoint: neither model.safetensors nor pytorch_model.bin is in it")


def _speech_encoder(config: AudioConfig, folder: Path) -> SpeechEncoder:
    try:
        return SpeechEncoder(config)
    except Exception as error:  # the library checks a configuration in many places
        raise UserError(f"{folder / 'config.json'} describes no speech encoder: {error}") from error


def _known(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are fields of `config`, lists as tuples."""
    names = {f.name for f in fields(config)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}


def _check_same(config: DiTConfig, values: Mapping[str, Any], path: Path, preset: str) -> None:
    """Holds the settings that a checkpoint states, and that are known here, to those of the preset."""
    try:
        stated = from_official(DiTConfig, asdict(config) | {k: v for k, v in values.items() if is_known(DiTConfig, k)})
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    for name, want in asdict(config).items():
        if (value := getattr(stated, name)) != want:
            raise UserError(f"{path}: {name} is {value}, but preset {preset} has {want}")


def _audio_config(config: Config, folder: Path) -> AudioConfig:
    """The speech encoder's own configuration, checked against what the student was made for."""
    values = read_json(folder / "config.json")
    if (folder / "preprocessor_config.json").is_file():
        values |= {"do_normalize": read_json(folder / "preprocessor_config.json").get("do_normalize", True)}
    audio = replace(config.audio, **_known(config.audio, values))
    if (audio.num_hidden_layers, audio.hidden_size) != (config.dit.audio_blocks, config.dit.audio_channels):
        raise UserError(
            f"{folder}: {audio.num_hidden_layers} layers of {audio.hidden_size} channels, but preset {config.name} "
            f"hears {config.dit.audio_blocks} of {config.dit.audio_channels}"
        )
    return audio
