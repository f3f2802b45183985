"""Loads the official checkpoint folder to a device, tensor by tensor, or builds models with bundled or random weights.

    FOLDER/config.json, diffusion_pytorch_model*.safetensors          student
    FOLDER/Wan2.1_VAE.pth                                             video VAE
    FOLDER/models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/          text encoder, tokenizer
    FOLDER/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth    image encoder
    FOLDER/chinese-wav2vec2-base/ (or beside FOLDER)                  speech encoder

Modules are built on the meta device. Each tensor then goes from the memory-mapped file to its device in its final
dtype, so host memory holds only one tensor at a time, besides the modules that are offloaded to it.
"""

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from model.audio import SpeechEncoder, official_name
from model.config import BUNDLED, AudioConfig, Config, DiTConfig, Precision, from_official, is_known, precisions_of
from model.dit import DiT
from model.errors import UserError
from model.files import unreadable
from model.image import ImageEncoder, is_unused_key
from model.param_map import ParamMapping, identity_map, load_parameters, without_prefixes
from model.text import TextEncoder
from model.text_cache import CachedTextEncoder, cache_dir_for
from model.vae import VAE, writes_past_frames
from model.weights import quantize
from model.weights.shards import ShardReader, find_student_shards, iter_safetensors, read_json
from model.weights.trained import FOLDER, fill, load_trained

VAE_FILE = "Wan2.1_VAE.pth"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
AUDIO_FOLDER = "chinese-wav2vec2-base"

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Models:
    """The five networks of a system and the config that they were built from.

    The text and image encoders, and the modules of the student that compute text and image keys and values and the
    modulation, are needed only at the beginning of a session. They are offloaded to host memory.
    """

    config: Config
    dit: DiT
    vae: VAE
    text: CachedTextEncoder
    image: ImageEncoder
    audio: SpeechEncoder
    device: torch.device
    folder: Path | None  # of the checkpoint, which also holds the tokenizer; None for random weights


def preset_models(
    config: Config, device: torch.device, precision: Precision, text_device: torch.device | None = None
) -> Models:
    """Models of a preset without a checkpoint: with the weights that are part of the package, or else random ones.

    Of the presets in `BUNDLED`, student, codec and speech encoder are trained. The text and image encoders are random,
    and the student gets nothing from them. The text encoder runs on `text_device`, or on `device` if that is None.
    """
    if config.name not in BUNDLED:
        return random_models(config, device, precision, text_device=text_device)
    return random_models(
        config,
        device,
        precision,
        text_device=text_device,
        trained={name: load_trained(FOLDER / f"{name}.safetensors")[0] for name in ("student", "codec", "audio")},
    )


def random_models(
    config: Config,
    device: torch.device,
    precision: Precision,
    seed: int = 0,
    offload_device: str | torch.device = "cpu",
    trained: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
    text_device: torch.device | None = None,
) -> Models:
    """Models with random weights, the same for the same seed, device and precision. They generate coloured noise.

    Modules that are needed only at the beginning of a session go to `offload_device`. `trained` has tensors that are
    not random, by parameter, of "student", "codec" and "audio". The text encoder is made and runs on `text_device`, or
    on `device` if that is None.
    """

    def filled(name: str, module: M) -> M:
        if name in trained:
            fill(module, trained[name])
        return module

    def student() -> DiT:
        dit = filled("student", DiT(config.dit))
        if precision.eight_bits is not None:
            dit.quantize(precision.eight_bits)
        if precision.fp8_attention:
            dit.use_fp8_attention()
        return dit

    def build(factory: Callable[[], M], dtype: torch.dtype, device: torch.device = device) -> M:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                module = factory()
            return module.to(device).requires_grad_(False).eval()  # transformers makes some parameters on the CPU
        finally:
            torch.set_default_dtype(default)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        models = Models(
            config,
            build(student, precision.dit),
            build(lambda: filled("codec", VAE(config.vae)), precision.vae),
            CachedTextEncoder(
                partial(build, lambda: TextEncoder(config.text), precision.text, text_device or device),
                device,
                text_device=text_device,
            ),
            build(lambda: ImageEncoder(config.image), precision.image),
            build(lambda: filled("audio", SpeechEncoder(config.audio)), precision.audio),
            device,
            None,
        )
    for module in (models.text.encoder, models.image, *models.dit.offloadable_modules().values()):
        module.to(offload_device)
    _prepare_vae(models.vae, config, precision, device)
    return models


def load_models(
    config: Config,
    folder: Path,
    device: torch.device,
    precision: Precision,
    wav2vec: Path | None = None,
    text_device: torch.device | None = None,
) -> Models:
    """Models with the weights in `folder`, and in `wav2vec` if the speech encoder is elsewhere.

    The text encoder runs on `text_device`, or on `device` if that is None.

    Raises `UserError`, which names the file and the tensor, for anything that is missing, superfluous, of the wrong
    shape or unreadable.
    """
    places = (folder / AUDIO_FOLDER, folder.parent / AUDIO_FOLDER) if wav2vec is None else (wav2vec,)
    audio_folder = next((place for place in places if place.is_dir()), None)
    held = quantize.format_of(folder)
    if held == "int8" and (precision.eight_bits is None or precision.eight_bits.format != held):
        raise UserError(f"{folder} holds an {held.upper()} student: use --precision {' or '.join(precisions_of(held))}")
    shards = [] if held else find_student_shards(folder)
    for file in (VAE_FILE, TEXT_FILE, IMAGE_FILE):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not a complete checkpoint: {file} is missing")
    if audio_folder is None:
        missing = f"{AUDIO_FOLDER} is neither in it nor beside it" if wav2vec is None else f"{wav2vec} is not a folder"
        raise UserError(f"{folder} is not a complete checkpoint: {missing}")
    _check_matches_preset(config.dit, read_json(folder / "config.json"), folder / "config.json", config.name)
    config = replace(config, audio=_audio_config(config, audio_folder))

    def load(module: M, param_map: Mapping[str, ParamMapping], tensors: Iterable[tuple[str, Tensor]], *args: Any) -> M:
        load_parameters(module, param_map, tensors, *args)
        return module.requires_grad_(False).eval()

    def text() -> TextEncoder:
        with torch.device("meta"):
            encoder = TextEncoder(config.text)
        tensors = _pth_tensors(folder / TEXT_FILE)
        return load(encoder, encoder.param_map(), tensors, folder / TEXT_FILE, offload_device, precision.text)

    offload_device = torch.device("cpu")
    with torch.device("meta"):
        vae, image = VAE(config.vae), ImageEncoder(config.image)
        audio = _speech_encoder(config.audio, audio_folder)
    dit = load_student(config.dit, folder, shards, device, precision)
    speech = ((name, t) for raw, t in _speech_tensors(audio_folder) if (name := official_name(raw)) is not None)
    pixels = ((name, t) for name, t in _pth_tensors(folder / IMAGE_FILE) if not is_unused_key(name, config.image))
    load(vae, identity_map(vae), _pth_tensors(folder / VAE_FILE), folder / VAE_FILE, device, precision.vae)
    _prepare_vae(vae, config, precision, device)
    return Models(
        config,
        dit,
        vae,
        CachedTextEncoder(text, device, cache_dir_for(folder / TEXT_FILE, device, precision.text), text_device),
        load(image, image.param_map(), pixels, folder / IMAGE_FILE, offload_device, precision.image),
        load(audio, audio.param_map(), speech, audio_folder, device, precision.audio),
        device,
        folder,
    )


def _prepare_vae(vae: VAE, config: Config, precision: Precision, device: torch.device) -> None:
    """Makes a loaded VAE as it runs in this precision on this device."""
    vae.prepare_weights()
    vae.quantize(precision.fp8_vae)
    if writes_past_frames(config, precision.vae, device):
        vae.pair_caches()


def load_student(
    config: DiTConfig, folder: Path, shards: Sequence[Path], device: torch.device, precision: Precision
) -> DiT:
    """The student in these official shards or, without any, in the quantised checkpoint `folder`.

    An FP8 student becomes whatever the precision asks for. The submodules that are needed only at the beginning of a
    session stay in host memory. Raises like `load_models`.
    """
    with torch.device("meta"):
        dit = DiT(config)
    offloadable = dit.offloadable_modules()
    policy = precision.eight_bits
    held = None if shards else quantize.format_of(folder)
    if held is not None and policy is not None and policy.format == held:
        quantize.load_quantized_checkpoint(dit, folder, held, device, offloadable)
    elif held is not None:
        quantize.load_widened_checkpoint(dit, folder, held, policy, precision.dit, device, offloadable)
    elif policy is not None:
        quantize.load_and_quantize(dit, shards, policy, precision.dit, device, offloadable)
    else:
        reader = ShardReader(shards, dit.param_map())
        load_parameters(dit, dit.param_map(), reader.tensors(device), folder, device, precision.dit, offloadable)
    if precision.fp8_attention:
        dit.use_fp8_attention()
    return dit.requires_grad_(False).eval()


def _pth_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the named tensors of a pickled state dict, memory-mapped if the file has the zip format."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises many kinds of exceptions for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise unreadable(path, reason) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(x, Tensor) for k, x in state.items()):
        raise UserError(f"{path} holds something other than named tensors")
    names = without_prefixes(state)
    yield from ((names[key], tensor) for key, tensor in state.items())


def _speech_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    if (folder / "model.safetensors").is_file():
        return iter_safetensors([folder / "model.safetensors"], torch.device("cpu"))
    if (folder / "pytorch_model.bin").is_file():
        return _pth_tensors(folder / "pytorch_model.bin")
    raise UserError(f"{folder} is not a checkpoint: neither model.safetensors nor pytorch_model.bin is in it")


def _speech_encoder(config: AudioConfig, folder: Path) -> SpeechEncoder:
    try:
        return SpeechEncoder(config)
    except Exception as error:  # transformers checks a configuration in many places
        raise UserError(f"{folder / 'config.json'} does not describe a valid speech encoder: {error}") from error


def _known_fields(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The items of `values` that are fields of `config`, with lists as tuples."""
    names = {f.name for f in fields(config)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}


def _check_matches_preset(config: DiTConfig, values: Mapping[str, Any], path: Path, preset: str) -> None:
    """Raises `UserError` if a setting in the checkpoint's `config.json` differs from the preset's."""
    try:
        stated = from_official(DiTConfig, asdict(config) | {k: v for k, v in values.items() if is_known(DiTConfig, k)})
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    for name, want in asdict(config).items():
        if (value := getattr(stated, name)) != want:
            raise UserError(f"{path}: {name} is {value}, but preset {preset} has {want}")


def _audio_config(config: Config, folder: Path) -> AudioConfig:
    """The speech encoder's own configuration, checked against the features that the student expects."""
    values = read_json(folder / "config.json")
    if (folder / "preprocessor_config.json").is_file():
        values |= {"do_normalize": read_json(folder / "preprocessor_config.json").get("do_normalize", True)}
    audio = replace(config.audio, **_known_fields(config.audio, values))
    if audio.feature_shape != (config.dit.audio_blocks, config.dit.audio_channels):
        layers, channels = audio.feature_shape
        raise UserError(
            f"{folder}: {layers} layers of {channels} channels, but preset {config.name} "
            f"expects {config.dit.audio_blocks} layers of {config.dit.audio_channels}"
        )
    return audio
