"""Official checkpoint folders: every tensor is loaded, and every kind of damage is reported by name."""

import json
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import PRECISIONS, TINY, TINY_RANDOM
from model.errors import UserError
from model.rope import rope_table
from model.weights.checkpoint import (
    AUDIO_FOLDER,
    IMAGE_FILE,
    TEXT_FILE,
    VAE_FILE,
    Models,
    load_models,
    preset_models,
    random_models,
)
from model.weights.shards import iter_safetensors
from model.weights.trained import FOLDER, fill, load_trained
from tests.small import SMALL, weights, write_checkpoint

CPU = torch.device("cpu")
SHARD = "diffusion_pytorch_model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def load(folder: Path, precision: str = "fp32") -> Models:
    return load_models(SMALL, folder, CPU, PRECISIONS[precision])


def test_tensors_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Not in the order of names, because sequential reading is faster."""
    tensors = {name: torch.zeros(2, dtype=torch.float32 if name in "yz" else torch.int8) for name in "abyz"}
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        save_file(tensors, path)
    assert [name for name, _ in iter_safetensors(paths, CPU)] == list("yzab") * 2


def test_every_tensor_is_loaded(folder: Path) -> None:
    models = load(folder)
    state = models.vae.state_dict()
    assert {name: t.shape for name, t in weights("vae").items()} == {n: t.shape for n, t in state.items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in weights("vae").items())
    state, official = models.dit.state_dict(), weights("dit")
    assert models.dit.param_map().keys() == official.keys()
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in official.values())
    for name, mapping in models.dit.param_map().items():
        rows = state[mapping.params[0]]
        rows = rows if mapping.start_row is None else rows[mapping.start_row :][: mapping.shape[0]]
        assert torch.equal(rows, official[name]), name
    for component, module in (("t5", models.text.encoder), ("clip", models.image), ("wav2vec", models.audio)):
        official, state = weights(component), module.state_dict()
        for name, mapping in module.param_map().items():
            pieces = torch.cat([state[ours].reshape(-1) for ours in mapping.params])
            assert torch.equal(pieces, official[name].flatten()), name
    for module in (models.dit, models.vae, models.text.encoder, models.image, models.audio):
        assert not module.training
        assert all(p.device == CPU and not p.requires_grad for p in module.parameters())
        assert not any(b.is_meta for b in module.buffers())


def test_precision_of_each_network(folder: Path) -> None:
    models = load(folder, "bf16")
    modules = models.dit, models.vae, models.text.encoder, models.image, models.audio
    dtypes = [next(module.parameters()).dtype for module in modules]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]


def test_speech_folder_beside_the_checkpoint_and_safetensors_speech(folder: Path) -> None:
    speech = folder / AUDIO_FOLDER
    (speech / "pytorch_model.bin").unlink()
    save_file(weights("wav2vec"), speech / "model.safetensors")
    speech.rename(folder.parent / AUDIO_FOLDER)
    loaded = load(folder).audio.state_dict()
    assert all(torch.equal(loaded[f"model.{name}"], tensor) for name, tensor in weights("wav2vec").items())


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    change(state)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def set_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing tensor": (
        lambda d: edit(d / SHARD, lambda s: s.pop("blocks.2.norm3.weight")),
        ["blocks.2.norm3.weight", "[256]", "missing"],
    ),
    "extra tensor": (
        lambda d: edit(d / VAE_FILE, lambda s: s.update(decoy=torch.zeros(2, 3))),
        [VAE_FILE, "decoy", "[2, 3]", "not part"],
    ),
    "wrong shape": (
        lambda d: edit(d / TEXT_FILE, lambda s: s.update({"blocks.1.norm2.weight": torch.zeros(65)})),
        [TEXT_FILE, "blocks.1.norm2.weight", "[65]", "expected [64]"],
    ),
    "wrong fused shape": (
        lambda d: edit(
            d / IMAGE_FILE, lambda s: s.update({"visual.transformer.0.attn.to_qkv.weight": torch.zeros(160, 80)})
        ),
        ["visual.transformer.0.attn.to_qkv.weight", "[160, 80]", "expected [240, 80]"],
    ),
    "truncated shard": (lambda d: truncate(d / SHARD), [SHARD, "truncated"]),
    "truncated pickle": (lambda d: truncate(d / VAE_FILE), [VAE_FILE, "truncated"]),
    "text instead of a pickle": (lambda d: (d / TEXT_FILE).write_text("hello"), [TEXT_FILE, "truncated or damaged"]),
    "shard gone": (lambda d: (d / SHARD).unlink(), [SHARD, "missing"]),
    "VAE gone": (lambda d: (d / VAE_FILE).unlink(), [VAE_FILE, "missing"]),
    "config gone": (lambda d: (d / "config.json").unlink(), ["not a checkpoint", "config.json"]),
    "config damaged": (lambda d: (d / "config.json").write_text("{"), ["config.json", "cannot be read"]),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), ["config.json", "JSON object"]),
    "other size": (lambda d: set_json(d / "config.json", num_layers=40), ["num_layers is 40", "small has 3"]),
    "speech gone": (
        lambda d: (d / AUDIO_FOLDER / "pytorch_model.bin").unlink(),
        [AUDIO_FOLDER, "neither model.safetensors nor pytorch_model.bin"],
    ),
    "speech of other size": (
        lambda d: set_json(d / AUDIO_FOLDER / "config.json", num_hidden_layers=12),
        ["12 layers of 48", "expects 3 layers of 48"],
    ),
    "speech that cannot be": (
        lambda d: set_json(d / AUDIO_FOLDER / "config.json", num_attention_heads=5),
        [AUDIO_FOLDER, "does not describe a valid speech encoder"],
    ),
    "option we do not have": (lambda d: set_json(d / "config.json", qk_norm=False), ["qk_norm", "not supported"]),
    "impossible option": (lambda d: set_json(d / "config.json", num_heads=7), ["config.json", "7 heads"]),
    "a tensor instead of a dict": (lambda d: torch.save(torch.zeros(2), d / VAE_FILE), [VAE_FILE, "other than named"]),
    "more than tensors": (
        lambda d: edit(d / VAE_FILE, lambda s: s.update(step=3)),  # type: ignore[arg-type]
        [VAE_FILE, "other than named tensors"],
    ),
    "git-lfs pointer": (lambda d: (d / SHARD).write_text(LFS_POINTER), [SHARD, "git-lfs pointer", "git lfs pull"]),
    "git-lfs pointer of a pickle": (
        lambda d: (d / VAE_FILE).write_text(LFS_POINTER),
        [VAE_FILE, "git-lfs pointer", "git lfs pull"],
    ),
    "git-lfs pointer of JSON": (
        lambda d: (d / "config.json").write_text(LFS_POINTER),
        ["config.json", "git-lfs pointer", "git lfs pull"],
    ),
    "web page": (
        lambda d: (d / IMAGE_FILE).write_text("<!DOCTYPE html><html>404</html>"),
        [IMAGE_FILE, "is a web page", "download it again"],
    ),
    "link to nowhere": (
        lambda d: ((d / SHARD).unlink(), (d / SHARD).symlink_to("../../blobs/0")),
        [SHARD, "missing (a link that leads nowhere): download it again"],
    ),
    "names that are numbers": (lambda d: torch.save({0: torch.zeros(1)}, d / VAE_FILE), [VAE_FILE, "other than named"]),
    "NaN in the VAE": (
        lambda d: edit(d / VAE_FILE, lambda s: s["conv1.weight"].view(-1)[7:8].fill_(torch.nan)),
        [VAE_FILE, "conv1.weight holds NaN or infinite numbers"],
    ),
    "a number beyond float16": (
        lambda d: edit(d / IMAGE_FILE, lambda s: s["visual.pos_embedding"].view(-1)[:1].fill_(1e5)),
        [IMAGE_FILE, "holds NaN or infinite numbers"],
    ),
    "index without a map": (
        lambda d: set_json(d / "diffusion_pytorch_model.safetensors.index.json", weight_map=["a"]),
        ["index.json", "no weight_map"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_in_one_line(damage: str, folder: Path) -> None:
    harm, words = DAMAGE[damage]
    harm(folder)
    with pytest.raises(UserError) as caught:
        load(folder, "bf16" if "float16" in damage else "fp32")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert damage == "speech that cannot be" or "\n" not in message  # transformers' own message may have several lines


def test_what_trainers_put_in_front_of_names_in_pickles(folder: Path) -> None:
    for file in (VAE_FILE, TEXT_FILE, IMAGE_FILE):
        torch.save({f"module.{name}": tensor for name, tensor in torch.load(folder / file).items()}, folder / file)
    state = load(folder).vae.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights("vae").items())


def test_json_with_a_byte_order_mark(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text(), encoding="utf-8-sig")
    load(folder)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a checkpoint"):
        load(tmp_path)


def test_random_weights_follow_the_seed_and_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    a, b, c = (random_models(TINY_RANDOM, CPU, PRECISIONS["fp32"], seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    for name in ("dit", "vae", "text.encoder", "image", "audio"):
        one, two, other = (attrgetter(name)(m).state_dict() for m in (a, b, c))
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert any(not torch.equal(one[key], other[key]) for key in one), name
    assert torch.get_default_dtype() == torch.float32


def test_random_networks_are_on_the_given_device() -> None:
    """All parameters, although transformers creates some on the CPU whatever the default device is."""
    meta = torch.device("meta")
    models = random_models(SMALL, meta, PRECISIONS["fp32"], offload_device=meta)
    for module in (models.dit, models.vae, models.text.encoder, models.image, models.audio):
        assert {parameter.device for parameter in module.parameters()} == {meta}


# --- Presets with weights in the package ----------------------------------------------------------------------------


def test_what_a_file_lacks_is_zero(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 3, dtype=torch.bfloat16)
    fill(layer, {"weight": torch.arange(6.0).view(3, 2)})
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert not layer.bias.any()
    for name, shape in (("weights", (3, 2)), ("weight", (2, 3))):
        with pytest.raises(UserError, match=rf"^{name} \[{shape[0]}, {shape[1]}\]: the network has no such tensor"):
            fill(layer, {name: torch.zeros(shape)})


def test_the_trained_preset_has_its_weights_in_any_precision() -> None:
    trained = {name: load_trained(FOLDER / f"{name}.safetensors")[0] for name in ("student", "codec", "audio")}
    for precision in ("fp32", "bf16"):
        models = preset_models(TINY, CPU, PRECISIONS[precision])
        for name, network in (("student", models.dit), ("codec", models.vae), ("audio", models.audio)):
            state = network.state_dict()
            assert trained[name].keys() <= state.keys()
            for key, tensor in trained[name].items():
                want = tensor.to(state[key].dtype)
                torch.testing.assert_close(state[key], want, msg=f"{precision} {name} {key}")


@torch.inference_mode()
def test_the_trained_student_gets_nothing_from_prompt_and_portrait_features() -> None:
    dit, config = preset_models(TINY, CPU, PRECISIONS["fp32"]).dit, TINY.dit
    torch.manual_seed(0)
    latents, condition = torch.randn(TINY.latent_shape), torch.randn(9, config.in_dim - config.out_dim, 16, 16)
    audio, rope = dit.embed_audio(torch.randn(1, 33, 5, 1, 6)), rope_table(TINY.grid, config.head_dim)
    one, two = (
        dit(latents, condition, dit.modulate(900.0), rope, dit.embed_context(*features), audio)
        for features in (
            (torch.randn(count, config.text_dim), torch.randn(config.img_tokens, config.img_dim)) for count in (3, 20)
        )
    )
    assert torch.equal(one, two)


def test_other_presets_are_random() -> None:
    ours, random = (make(TINY_RANDOM, CPU, PRECISIONS["fp32"]) for make in (preset_models, random_models))
    assert torch.equal(ours.dit.patch_embedding.weight, random.dit.patch_embedding.weight)
