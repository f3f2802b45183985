"""Cached text features: equal to the encoder's, without loading it; and every failure of the disk is survived."""

import os
from pathlib import Path

import pytest
import torch

from model.config import PRECISIONS
from model.machine import CACHE_ENV
from model.text_cache import CachedTextEncoder
from model.weights.checkpoint import TEXT_FILE, Models, load_models, random_models
from tests.small import SMALL, write_checkpoint

CPU = torch.device("cpu")
ONE, TWO = torch.tensor([40, 50, 60, 1]), torch.tensor([40, 50, 1])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint")


def load(folder: Path, precision: str = "fp32") -> Models:
    return load_models(SMALL, folder, CPU, PRECISIONS[precision])


def has_encoder(models: Models) -> bool:
    return "encoder" in vars(models.text)


def cached_files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


@torch.inference_mode()
def test_a_cached_prompt_needs_no_encoder(cache: Path, folder: Path) -> None:
    first = load(folder)
    assert has_encoder(first)
    want = first.text(ONE)
    assert torch.equal(want, first.text.encoder(ONE))
    second = load(folder)
    assert torch.equal(second.text(ONE), want)
    assert not has_encoder(second)
    assert torch.equal(second.text(TWO), first.text.encoder(TWO))  # a new one
    assert has_encoder(second)
    assert len(cached_files(cache)) == 2


@torch.inference_mode()
def test_other_weights_or_another_dtype_miss_the_cache(cache: Path, folder: Path) -> None:
    load(folder).text(ONE)
    narrow = load(folder, "bf16")
    assert has_encoder(narrow)
    assert narrow.text(ONE).dtype == torch.bfloat16
    os.utime(folder / TEXT_FILE, (0, 0))
    assert has_encoder(load(folder))
    assert len({path.parent for path in cached_files(cache)}) == 2


@torch.inference_mode()
def test_a_damaged_file_is_computed_again(cache: Path, folder: Path) -> None:
    want = load(folder).text(ONE)
    (path,) = cached_files(cache)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    assert torch.equal(load(folder).text(ONE), want)
    assert path.read_bytes() == whole


@torch.inference_mode()
def test_an_unwritable_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "file"))
    models = load(folder)
    assert torch.equal(models.text(ONE), models.text.encoder(ONE))


@torch.inference_mode()
def test_random_weights_are_not_cached(cache: Path) -> None:
    models = random_models(SMALL, CPU, PRECISIONS["fp32"])
    assert isinstance(models.text, CachedTextEncoder)
    assert torch.equal(models.text(ONE), models.text.encoder(ONE))
    assert not cache.exists()


@torch.inference_mode()
def test_the_encoder_may_run_on_the_cpu_while_features_go_to_the_device(folder: Path) -> None:
    loaded, ran = load(folder).text.encoder, []
    text = CachedTextEncoder(lambda: loaded, torch.device("meta"), text_device=CPU)
    hook = loaded.register_forward_hook(lambda _module, _inputs, features: ran.append(features.device))
    assert text(ONE).is_meta
    hook.remove()
    assert ran == [CPU]
