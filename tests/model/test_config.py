"""Presets, derived geometry, official mappings."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import FLASHTALK_14B, TINY, TINY_RANDOM, ChunkConfig, Config, DiTConfig, VAEConfig, from_official
from model.errors import UserError


def test_production_geometry() -> None:
    chunk = FLASHTALK_14B.chunk
    assert FLASHTALK_14B.latent_shape == (9, 16, 96, 56)
    assert FLASHTALK_14B.grid == (9, 48, 28)
    assert (chunk.new_frames, chunk.frame_samples, chunk.slice_samples) == (28, 640, 17920)
    assert (chunk.cached_samples, chunk.cached_frames) == (128000, 200)
    assert (FLASHTALK_14B.vae.spatial_stride, FLASHTALK_14B.vae.temporal_stride) == (8, 4)


def test_defaults_are_the_official_values() -> None:
    keys = json.loads((Path(__file__).parents[1] / "golden" / "checkpoint_keys.json").read_text())
    assert from_official(DiTConfig, keys["dit"]["config"]) == DiTConfig()
    assert from_official(VAEConfig, keys["vae"]["config"]) == VAEConfig()


@pytest.mark.parametrize("config", [TINY, TINY_RANDOM], ids=lambda config: config.name)
def test_tiny_networks_fit_together(config: Config) -> None:
    dit, image = config.dit, config.image
    assert dit.text_dim == config.text.dim
    assert dit.img_dim == image.vision_dim
    assert dit.img_tokens == 1 + (image.image_size // image.patch_size) ** 2
    assert (dit.audio_blocks, dit.audio_channels) == config.audio.feature_shape
    assert (dit.in_dim, dit.out_dim) == (2 * config.vae.z_dim + config.vae.temporal_stride, config.vae.z_dim)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 12), st.integers(0, 3))
def test_any_chunk_geometry(rows: int, columns: int, latents: int, motion: int) -> None:
    motion = min(motion, latents - 1)
    chunk = ChunkConfig(16 * rows, 16 * columns, frame_num=1 + 4 * latents, motion_frames_num=1 + 4 * motion)
    config = Config("any", chunk=chunk)
    assert config.grid == (latents + 1, rows, columns)
    assert config.latent_shape == (latents + 1, 16, 2 * rows, 2 * columns)
    assert chunk.new_frames == 4 * (latents - motion)
    assert chunk.slice_samples == 640 * chunk.new_frames


@pytest.mark.parametrize(
    "values",
    [
        {"height": 100},
        {"frame_num": 32},
        {"motion_frames_num": 4},
        {"motion_frames_num": 33},
        {"motion_frames_num": 0},
        {"sample_steps": 0},
        {"frame_num": 205},
        {"sample_rate": 16001},
    ],
)
def test_impossible_chunks(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"\w+"):
        Config("bad", chunk=ChunkConfig(**values))


def test_official_settings_that_are_not_implemented_are_refused() -> None:
    assert from_official(DiTConfig, {"_class_name": "x", "qk_norm": True, "patch_size": [1, 2, 2]}) == DiTConfig()
    with pytest.raises(UserError, match="qk_norm"):
        from_official(DiTConfig, {"qk_norm": False})
    for wrong in ("64", [64], 64.0, True, None):
        with pytest.raises(UserError, match=r"^dim = .* is no value of this setting, whose type is int$"):
            from_official(DiTConfig, {"dim": wrong})
    assert from_official(DiTConfig, {"eps": 1}).eps == 1
    with pytest.raises(UserError, match="mystery"):
        from_official(DiTConfig, {"mystery": 1})
