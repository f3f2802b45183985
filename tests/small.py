"""A system that is small enough for tests: the golden weights, also as a checkpoint folder."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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
from model.weights.checkpoint import AUDIO_FOLDER, IMAGE_FILE, TEXT_FILE, VAE_FILE

GOLDEN = Path(__file__).parent / "golden"
_WEIGHTS = json.loads((GOLDEN / "manifest.json").read_text())["weights"]

SMALL = Config(
    name="small",
    dit=from_official(DiTConfig, _WEIGHTS["dit"]["config"]),
    vae=from_official(VAEConfig, _WEIGHTS["vae"]["config"]),
    text=from_official(TextConfig, _WEIGHTS["t5"]["config"] | {"tokenizer": "bytes"}),
    image=from_official(ImageConfig, _WEIGHTS["clip"]["config"]),
    audio=from_official(AudioConfig, _WEIGHTS["wav2vec"]["config"]),
    chunk=ChunkConfig(height=32, width=48, frame_num=9, motion_frames_num=5, sample_steps=2),
)


def weights(component: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / _WEIGHTS[component]["file"])


def write_checkpoint(folder: Path) -> Path:
    """Writes the golden weights as an official checkpoint: two shards and an index, state dicts, an old speech file."""
    folder.mkdir()
    names = sorted(student := weights("dit"))
    index = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors"
        save_file({name: student[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(_WEIGHTS["dit"]["config"] | {"_class_name": "WanModel"}))
    for component, file in (("vae", VAE_FILE), ("t5", TEXT_FILE), ("clip", IMAGE_FILE)):
        torch.save(weights(component), folder / file)
    speech = folder / AUDIO_FOLDER
    speech.mkdir()
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = {}
    for name, tensor in weights("wav2vec").items():
        for new, before in old.items():
            name = name.replace(new, before)
        state[f"wav2vec2.{name}"] = tensor
    state["quantizer.codevectors"] = torch.zeros(1)
    torch.save(state, speech / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (speech / "config.json").write_text(json.dumps(_WEIGHTS["wav2vec"]["config"]))
    (speech / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    return folder


def edit_student(folder: Path, change: Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]) -> None:
    """Replaces a checkpoint's student by one file without an index: of each tensor, what `change` makes of it."""
    tensors = {k: x for name, tensor in weights("dit").items() for k, x in change(name, tensor).items()}
    for path in folder.glob("diffusion_pytorch_model*"):
        path.unlink()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
