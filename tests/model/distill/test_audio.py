"""The mouth encoder: rings as the product makes them, scale of its outputs, R^2, training and files; and its form."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.audio import Ring, SpeechEncoder, stream_window
from model.config import TINY_RANDOM, AudioConfig
from model.distill import audio, espeak
from model.distill.audio import (
    CHUNK,
    CONFIG,
    Heard,
    MouthScale,
    Pool,
    draw_rings,
    hear,
    hear_streams,
    load_audio,
    mouth_loss,
    new_encoder,
    r_squared,
    ring_at,
    save_audio,
)
from model.distill.face import MOUTH
from model.distill.speech import Track
from model.distill.training import Budget
from model.errors import UserError

needs_espeak = pytest.mark.skipif(not espeak.available(), reason="needs espeak-ng")
SMALL = replace(
    CONFIG, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(16, 8, 8)
)
UNIT = MouthScale((0.0,) * 6, (1.0,) * 6)


def noise_track(seed: int, slices: int) -> Track:
    rng = np.random.default_rng(seed)
    wave = 0.05 * rng.standard_normal(slices * CHUNK.slice_samples) * np.repeat(rng.uniform(0.2, 2, 4 * slices), 4480)
    mouth = rng.random((slices * CHUNK.new_frames, 6), dtype=np.float32)
    return Track(wave.astype(np.float32), mouth, "noise", "", ())


@pytest.fixture(scope="module")
def encoder() -> SpeechEncoder:
    torch.manual_seed(1)
    return new_encoder(SMALL)


@torch.inference_mode()
def test_an_encoder_with_a_head_gives_numbers_of_the_mouth(encoder: SpeechEncoder) -> None:
    wave = torch.randn(16000)
    outputs = encoder(wave, 16000, 25)
    assert (outputs.dtype, outputs.shape) == (torch.float32, (25, 1, 6))
    assert (encoder.config.feature_shape, TINY_RANDOM.audio.feature_shape) == ((1, 6), (4, 96))
    headless = SpeechEncoder(replace(SMALL, mouth_outputs=0))
    assert headless.head is None
    headless.model.load_state_dict(encoder.model.state_dict())
    assert encoder.head is not None
    torch.testing.assert_close(outputs, encoder.head(headless(wave, 16000, 25)[:, -1:]))


def test_only_an_encoder_with_a_head_has_its_parameters(encoder: SpeechEncoder) -> None:
    own = encoder.param_map()
    assert {name for name, mapping in own.items() if name.startswith("head.")} == {"head.weight", "head.bias"}
    assert {mapping.params for mapping in own.values()} == {(name,) for name in encoder.state_dict()}
    assert not any("head" in name for name in SpeechEncoder(replace(SMALL, mouth_outputs=0)).state_dict())


@pytest.mark.parametrize("config", [SMALL, replace(TINY_RANDOM.audio, num_hidden_layers=2)])
@torch.inference_mode()
def test_several_waves_are_encoded_like_each(config: AudioConfig) -> None:
    torch.manual_seed(2)
    encoder = SpeechEncoder(config)
    waves = torch.randn(3, 16000) * torch.tensor([1.0, 0.01, 3.0])[:, None] + 0.1
    together = encoder.encode(waves, 25)
    assert together.shape == (3, 25, *config.feature_shape)
    for wave, outputs in zip(waves, together, strict=True):
        torch.testing.assert_close(encoder(wave, 16000, 25), outputs, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_first_filters_hear_a_frequency_whatever_its_phase() -> None:
    filters = new_encoder().state_dict()["model.feature_extractor.conv_layers.0.conv.weight"][:, 0]
    tones, constants = filters[:-4], filters[-4:]
    assert not constants.any()
    spectrum = torch.fft.rfft(tones, 16000).abs()[::4]  # [bands, Hz]
    peaks = spectrum.argmax(1)
    assert (peaks.diff() > 0).all()
    assert 60 < peaks[0] < 150
    assert 7000 < peaks[-1] < 7500
    band = int((peaks - 700).abs().argmin())
    time = torch.arange(filters.shape[1]) / 16000
    levels = [
        (tones @ torch.cos(2 * torch.pi * float(peaks[band]) * time + phase)).relu().view(-1, 4).sum(1)
        / spectrum.amax(1)
        for phase in (0.0, 0.7, 1.9)
    ]
    assert all(int(level.argmax()) == band for level in levels)
    assert max(level[band] for level in levels) < 1.5 * min(level[band] for level in levels)


@torch.inference_mode()
def test_there_is_one_feature_per_frame_made_of_its_own_samples() -> None:
    torch.manual_seed(4)
    encoder = new_encoder()
    wave = torch.randn(1, 20 * 640)
    features = encoder.model.feature_extractor(wave)
    assert features.shape[2] == 20
    wave[0, 7 * 640 : 8 * 640] = torch.randn(640)
    changed = (encoder.model.feature_extractor(wave) - features).abs().amax((0, 1)) > 1e-6
    assert changed.nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("ending", [1, 4, 9])
def test_rings_are_the_products(ending: int) -> None:
    track = noise_track(ending, 9)
    heard = hear(track)
    ring = Ring.empty(CHUNK)
    for piece in track.wave.reshape(-1, CHUNK.slice_samples)[:ending]:
        ring = ring.append(piece)
    wave, mouth = ring_at(heard, ending * CHUNK.new_frames)
    np.testing.assert_allclose(wave, ring.samples, atol=1 / 16384)
    known = min(ending * CHUNK.new_frames, CHUNK.cached_frames)
    assert np.array_equal(mouth[-known:], track.mouth[: ending * CHUNK.new_frames][-known:])
    assert not mouth[:-known].any()


@given(st.integers(1, 56))
def test_a_ring_may_end_at_any_frame(end: int) -> None:
    heard = Heard(np.arange(56 * 640, dtype=np.int32).astype(np.int16), np.ones((56, 6), np.float32), "", "speech")
    wave, mouth = ring_at(heard, end)
    assert (wave.dtype, wave.shape, mouth.shape) == (np.float32, (128000,), (200, 6))
    assert np.array_equal(wave[-640 * end :] * 16384, heard.wave[: 640 * end])
    assert not wave[: -640 * end].any()
    assert mouth.sum() == 6 * end


@torch.inference_mode()
def test_streams_are_heard_as_the_product_hears_them(encoder: SpeechEncoder) -> None:
    track = noise_track(3, 9)
    scale = MouthScale(tuple(0.1 * k for k in range(6)), (0.2,) * 6)
    ((heard, true),) = hear_streams(encoder, scale, [hear(track)])
    assert heard.shape == true.shape == (9, 33, 6)
    ring = Ring.empty(CHUNK)
    for number, piece in enumerate(track.wave.reshape(-1, CHUNK.slice_samples)):
        ring = ring.append(piece)
        window = stream_window(encoder, ring.samples, CHUNK)[:, 2, 0]  # each frame without its neighbours
        np.testing.assert_allclose(heard[number], scale.mouth(window), atol=0.01)
        assert np.array_equal(true[number, 5:], track.mouth[28 * number :][:28])


def test_the_scale_standardises() -> None:
    mouths = [np.random.default_rng(seed).random((50, 6), dtype=np.float32) for seed in range(4)]
    for mouth in mouths:
        mouth *= np.arange(1, 7) / 6
    scale = MouthScale.measured(mouths)
    outputs = scale.standardised(torch.from_numpy(np.concatenate(mouths)))
    torch.testing.assert_close(outputs.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.std(0, correction=0), torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(scale.mouth(outputs), torch.from_numpy(np.concatenate(mouths)), atol=1e-5, rtol=0)
    assert scale.mouth(torch.full((1, 6), 99.0)).tolist() == [[1.0] * 6]
    still = MouthScale.measured([np.full((9, 6), 0.25, np.float32)])
    assert still == MouthScale((0.25,) * 6, (0.01,) * 6)


def test_r_squared_against_its_definition() -> None:
    rng = np.random.default_rng(1)
    pairs = [rng.random((2, 3, 33, 6)).astype(np.float32) for _ in range(5)]
    for pair in pairs:
        pair[0, ..., 2] = pair[1, ..., 2]  # heard exactly
        pair[0, ..., 3] = 0.5  # never heard
    scores = r_squared(pairs)
    assert tuple(scores) == MOUTH
    heard, true = np.stack([pair.reshape(2, -1, 6) for pair in pairs], 1)[..., 0].reshape(2, -1).astype(np.float64)
    assert scores["open"].value == pytest.approx(
        1 - np.square(true - heard).sum() / np.square(true - true.mean()).sum()
    )
    assert scores["open"].low < scores["open"].value < scores["open"].high
    assert scores["round"].value == 1
    assert scores["close"].value == pytest.approx(0, abs=0.02)
    last = r_squared([pair[:, :, -2:] for pair in pairs])
    assert r_squared(pairs, newest=2)["open"].value == pytest.approx(last["open"].value)


def test_the_newest_frames_count_most(encoder: SpeechEncoder) -> None:
    waves = torch.randn(2, CHUNK.cached_samples)
    with torch.no_grad():
        outputs = encoder.encode(waves, 200)[:, :, 0]
        losses = []
        for frame in (10, 190):
            mouths = outputs.clone()
            mouths[:, frame] += 1
            loss, numbers = mouth_loss(encoder, UNIT, waves, mouths)
            losses.append(float(loss))
            assert numbers["newest"] == pytest.approx(0 if frame == 10 else 1 / 33, abs=1e-5)
    total = 33 + audio.EARLIER_WEIGHT * 167
    assert losses == pytest.approx([audio.EARLIER_WEIGHT / total, 1 / total], rel=1e-3)


@needs_espeak
def test_rings_are_drawn_from_a_seed() -> None:
    one, same, other = (Pool(seed, 2) for seed in (4, 4, 5))
    lengths = set()
    for step in range(4):
        waves, mouths = draw_rings(one, 2, np.random.default_rng(step))
        again = draw_rings(same, 2, np.random.default_rng(step))
        assert (waves.dtype, mouths.dtype) == (torch.float32, torch.float32)
        assert (waves.shape, mouths.shape) in (((2, 128000), (2, 200, 6)), ((8, 32000), (8, 50, 6)))
        assert torch.equal(waves, again[0])
        assert torch.equal(mouths, again[1])
        assert not torch.equal(waves, draw_rings(other, 2, np.random.default_rng(step))[0])
        lengths.add(waves.shape[1])
    assert lengths == {128000, 32000}
    assert not np.array_equal(one[0].wave, Pool(4, 2, held_out=True)[0].wave)


@needs_espeak
def test_a_training_learns_writes_and_loads(tmp_path: Path) -> None:
    lines: list[str] = []
    train = partial(audio.train, config=SMALL, batch=2, pool=2, scale_tracks=1, evaluation_tracks=1)
    counters = train(tmp_path, Budget(steps=20), 1, report=lines.append)
    losses = [row["loss"] for row in counters.history]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert "R2 close" in lines[-1]
    encoder, scale = load_audio(tmp_path / "audio.safetensors")
    assert encoder.config == SMALL
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    save_audio(encoder, scale, tmp_path / "again.safetensors")
    again, same_scale = load_audio(tmp_path / "again.safetensors")
    assert same_scale == scale
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in encoder.state_dict().items())
    train(tmp_path / "more", Budget(steps=1), 2, start=tmp_path / "audio.safetensors")
    more, same_scale = load_audio(tmp_path / "more" / "audio.safetensors")
    assert same_scale == scale
    assert all((x - encoder.state_dict()[name]).abs().max() < 0.01 for name, x in more.state_dict().items())
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="not a trained network"):
        load_audio(tmp_path / "damaged.safetensors")
