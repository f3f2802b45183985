"""Loudness, speech encoder and windows against golden outputs of the official code; properties of the ring."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from model.audio import (
    MAX_GAIN,
    MAX_GAIN_RATE,
    Ring,
    SpeechEncoder,
    normalize_loudness,
    official_name,
    official_once_chunks,
    once_window,
    stream_window,
    windows,
)
from model.config import TINY_RANDOM, AudioConfig, ChunkConfig, from_official
from model.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
CHUNK = ChunkConfig()
SMALL = ChunkConfig(frame_num=9, cached_audio_duration=1)  # slices of 0.16 s, shorter than a gating block


@pytest.fixture(scope="module")
def encoder() -> SpeechEncoder:
    config = json.loads((GOLDEN / "wav2vec.json").read_text())["config"]["wav2vec"]
    with torch.device("meta"):
        encoder = SpeechEncoder(from_official(AudioConfig, config))
    tensors = load_file(GOLDEN / "weights_wav2vec.safetensors")
    param_map = encoder.param_map()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {n: s.shape for n, s in param_map.items()}
    encoder.load_state_dict({mapping.params[0]: tensors[name] for name, mapping in param_map.items()}, assign=True)
    return encoder


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["speech", "speech_f64", "padded_f64", "short_400ms", "silence"])
def test_golden_loudness(name: str) -> None:
    case = load_file(GOLDEN / "loudness_norm.safetensors")
    wave = case[f"in.{name}"].numpy()
    normalized = normalize_loudness(wave, 16000)
    assert normalized.dtype == wave.dtype
    np.testing.assert_allclose(normalized, case[f"out.{name}"].numpy(), rtol=0, atol=1e-7)
    other_target = normalize_loudness(wave, 16000, target=-3.0)
    np.testing.assert_allclose(other_target, normalized * (1 if name == "silence" else 10), rtol=1e-6)


def test_wave_shorter_than_a_loudness_block() -> None:
    with pytest.raises(ValueError, match=r"wave: got \(6399,\), wanted .* 0.4 s"):
        normalize_loudness(np.zeros(6399), 16000)
    with pytest.raises(ValueError, match=r"wave: got \(16000, 2\)"):
        normalize_loudness(np.zeros((16000, 2)), 16000)


@pytest.mark.parametrize("name", ["a", "b", "exact", "silence"])
@torch.inference_mode()
def test_golden_embedding(encoder: SpeechEncoder, name: str) -> None:
    case = load_file(GOLDEN / "wav2vec.safetensors")
    close(encoder(case[f"in.wave_{name}"], 16000, 25), case[f"out.embedding_{name}"])


@torch.inference_mode()
def test_without_interpolation_it_equals_the_transformers_model() -> None:
    torch.manual_seed(3)
    encoder = SpeechEncoder(replace(TINY_RANDOM.audio, do_normalize=False))
    wave = torch.randn(16000)
    states = encoder.model(wave[None], output_hidden_states=True).hidden_states[1:]
    close(encoder(wave, 16000, 49), torch.cat(states).transpose(0, 1))  # 49 convolution features


def test_norm_first_encoders_are_refused() -> None:
    with pytest.raises(UserError, match="do_stable_layer_norm"):
        SpeechEncoder(replace(TINY_RANDOM.audio, do_stable_layer_norm=True))


@torch.inference_mode()
def test_normalization_cancels_scale_and_offset(encoder: SpeechEncoder) -> None:
    wave = load_file(GOLDEN / "wav2vec.safetensors")["in.wave_b"]
    torch.testing.assert_close(encoder(3 * wave + 0.5, 16000, 25), encoder(wave, 16000, 25), rtol=0, atol=1e-3)


def test_bad_waves(encoder: SpeechEncoder) -> None:
    with pytest.raises(ValueError, match=r"wave: got torch.float64 \(9,\)"):
        encoder(torch.zeros(9, dtype=torch.float64), 16000, 25)
    with pytest.raises(ValueError, match=r"wave: got torch.float32 \(1, 16000\)"):
        encoder(torch.zeros(1, 16000), 16000, 25)
    with pytest.raises(ValueError, match=r"wave: got 639 samples"):
        encoder(torch.zeros(639), 16000, 25)
    with pytest.raises(ValueError, match=r"samples: got \(16000,\), wanted \[128000\]"):
        stream_window(encoder, torch.zeros(16000), CHUNK)


@torch.inference_mode()
def test_golden_windows_once(encoder: SpeechEncoder) -> None:
    case = load_file(GOLDEN / "audio_windows.safetensors")
    wave = torch.from_numpy(normalize_loudness(case["in.wave"].numpy(), 16000))
    embedding = encoder(wave, 16000, 25)
    assert official_once_chunks(len(embedding), CHUNK) == case["out.once.num_chunks"]
    for c in (0, 1, 6):
        close(windows(embedding, 28 * c, 28 * c + 33), case[f"out.once.chunk{c}"][0])


@torch.inference_mode()
def test_golden_windows_stream(encoder: SpeechEncoder) -> None:
    case = load_file(GOLDEN / "audio_windows.safetensors")
    track = np.concatenate((np.zeros(CHUNK.cached_samples), case["in.wave"].numpy()))
    for c in (0, 1, 6, 7):
        heard = normalize_loudness(track[(c + 1) * CHUNK.slice_samples :][: CHUNK.cached_samples], 16000)
        window = stream_window(encoder, heard.astype(np.float32), CHUNK)
        close(window, case[f"out.stream.chunk{c}"][0])
        assert torch.equal(window, stream_window(encoder, torch.from_numpy(heard).float(), CHUNK))


@given(st.integers(1, 12), st.integers(-9, 20), st.integers(0, 9), st.sampled_from([1, 3, 5]))
def test_windows(frames: int, start: int, count: int, width: int) -> None:
    embedding = torch.arange(frames * 6.0).view(frames, 2, 3)
    got = windows(embedding, start, start + count, width)
    assert got.shape == (count, width, 2, 3)
    for j in range(count):
        for w in range(width):
            assert torch.equal(got[j, w], embedding[min(max(start + j + w - width // 2, 0), frames - 1)])


@given(st.integers(1, 200), st.sampled_from([(33, 5), (9, 5), (13, 1)]))
def test_once_window_aligns_frames_with_sound(frames: int, geometry: tuple[int, int]) -> None:
    chunk = ChunkConfig(frame_num=geometry[0], motion_frames_num=geometry[1])
    embedding = torch.arange(float(frames)).view(frames, 1, 1)
    track = [once_window(embedding, c, chunk) for c in range(-(-frames // chunk.new_frames))]
    assert all(window.shape == (chunk.frame_num, 5, 1, 1) for window in track)
    shown = torch.cat([window[chunk.motion_frames_num :, 2] for window in track])
    assert torch.equal(shown[:frames], embedding)
    assert len(shown) - frames < chunk.new_frames
    for before, after in pairwise(track):  # motion frames have the same windows as when they were new frames
        assert torch.equal(before[-chunk.motion_frames_num :], after[: chunk.motion_frames_num])


@pytest.mark.parametrize(("frames", "chunks"), [(0, 0), (1, 0), (33, 0), (60, 0), (61, 1), (88, 1), (89, 2), (242, 7)])
def test_official_chunk_count(frames: int, chunks: int) -> None:
    assert official_once_chunks(frames, CHUNK) == chunks


def noise(seed: int, levels: list[float], chunk: ChunkConfig) -> list[NDArray[np.float32]]:
    """Slices of white noise whose every sample is +-level, so that the gain of each can be seen."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (len(levels), chunk.slice_samples))
    return list((signs * np.array(levels)[:, None]).astype(np.float32))


def heard(slices: list[NDArray[np.float32]], chunk: ChunkConfig) -> list[Ring]:
    rings = [Ring.empty(chunk)]
    for samples in slices:
        rings.append(rings[-1].append(samples))
    return rings


def gains(rings: list[Ring]) -> list[float]:
    return [ring.gain for ring in rings if ring.gain is not None]


SEEDS = st.integers(0, 2**32 - 1)
LEVELS = st.lists(st.sampled_from([0.0, 1e-5, 0.003, 0.02, 0.1, 0.9]), min_size=1, max_size=9)


@settings(max_examples=40)
@given(SEEDS, LEVELS)
def test_ring_keeps_earlier_samples_unchanged(seed: int, levels: list[float]) -> None:
    rings = heard(noise(seed, levels, SMALL), SMALL)
    for before, after in pairwise(rings):
        assert after.samples.dtype == np.float32
        assert after.samples.shape == (SMALL.cached_samples,)
        assert np.array_equal(before.samples[SMALL.slice_samples :], after.samples[: -SMALL.slice_samples])


@settings(max_examples=40)
@given(SEEDS, st.lists(st.sampled_from([0.003, 0.02, 0.1, 0.9]), min_size=1, max_size=6))
def test_gain_has_no_step(seed: int, levels: list[float]) -> None:
    slices = noise(seed, levels, SMALL)
    raw = np.concatenate(slices).astype(np.float64)
    gain = 20 * np.log10(heard(slices, SMALL)[-1].samples[-len(raw) :] / raw)
    assert np.abs(np.diff(gain)).max() < 1.01 * MAX_GAIN_RATE / SMALL.sample_rate


def test_gain_changes_at_the_maximum_rate() -> None:
    rings = heard(noise(1, [0.02] * 3 + [0.9] * 3, SMALL), SMALL)
    fall = MAX_GAIN_RATE * SMALL.slice_samples / SMALL.sample_rate
    np.testing.assert_allclose(np.diff(gains(rings[3:])), [-fall] * 3, rtol=1e-9)


def test_first_slice_gets_its_full_gain() -> None:
    (samples,) = noise(2, [0.02], CHUNK)
    ring = Ring.empty(CHUNK).append(samples)
    wanted = normalize_loudness(samples.astype(np.float64), 16000)
    np.testing.assert_allclose(ring.samples[-CHUNK.slice_samples :], wanted, rtol=1e-6)
    assert not ring.samples[: -CHUNK.slice_samples].any()


@pytest.mark.parametrize("chunk", [CHUNK, SMALL])
def test_constant_level_has_constant_gain(chunk: ChunkConfig) -> None:
    time = np.arange(12 * chunk.slice_samples) / chunk.sample_rate
    tone = (0.1 * np.sin(2 * np.pi * 440 * time)).astype(np.float32).reshape(12, -1)
    measured = gains(heard(list(tone), chunk))
    assert len(measured) == 12
    assert np.ptp(measured) < 0.2  # dB; a block need not hold whole periods


@settings(max_examples=40)
@given(SEEDS, st.lists(st.sampled_from([0.02, 0.05, 0.2]), min_size=1, max_size=6), st.floats(0.3, 3))
def test_gain_cancels_the_input_scale(seed: int, levels: list[float], scale: float) -> None:
    slices = noise(seed, levels, SMALL)
    scaled = [(scale * samples).astype(np.float32) for samples in slices]
    np.testing.assert_allclose(heard(scaled, SMALL)[-1].samples, heard(slices, SMALL)[-1].samples, rtol=1e-5)


@pytest.mark.parametrize(("level", "gain"), [(0.001, MAX_GAIN), (30.0, -MAX_GAIN)])
def test_gain_is_bounded(level: float, gain: float) -> None:
    silence = [np.zeros(SMALL.slice_samples, np.float32)] * 8
    rings = heard(silence + noise(3, [level] * 3, SMALL), SMALL)
    assert [ring.gain for ring in rings[-3:]] == [gain] * 3
    assert np.abs(rings[-1].samples).max() == pytest.approx(level * 10 ** (gain / 20), rel=1e-5)


def test_silence_does_not_change_the_gain() -> None:
    silence = [np.zeros(SMALL.slice_samples, np.float32)] * 10  # longer than the ring
    before = heard(silence, SMALL)[-1]
    assert before.gain is None
    assert not before.samples.any()
    rings = heard(noise(4, [0.05] * 2, SMALL) + silence, SMALL)
    assert rings[-1].gain is not None
    assert not rings[-1].samples.any()
    assert rings[-1].gain == rings[-2].gain == rings[-3].gain
    assert len(rings[-1].raw) == SMALL.cached_samples


def test_partial_slice_is_padded_and_append_does_not_change_the_ring() -> None:
    first, second = noise(5, [0.1, 0.3], SMALL)
    ring = Ring.empty(SMALL).append(first)
    kept = ring.samples.copy()
    partial = ring.append(second[:100])
    filled = ring.append(np.concatenate((second[:100], np.zeros(SMALL.slice_samples - 100, np.float32))))
    assert np.array_equal(partial.samples, filled.samples)
    assert partial.gain == filled.gain
    assert np.array_equal(ring.samples, kept)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(SMALL.slice_samples + 1, np.float32), r"got float32 \(2561,\), wanted float32 \[<= 2560\]"),
        (np.zeros(9), r"got float64 \(9,\)"),
        (np.zeros((1, 9), np.float32), r"got float32 \(1, 9\)"),
        (np.array([0, np.nan], np.float32), r"not finite"),
    ],
)
def test_bad_slices(samples: NDArray[np.float32], message: str) -> None:
    with pytest.raises(ValueError, match=f"samples: {message}" if message[0] == "g" else message):
        Ring.empty(SMALL).append(samples)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("wav2vec2.encoder.layer_norm.bias", "encoder.layer_norm.bias"),
        (
            "wav2vec2.encoder.pos_conv_embed.conv.weight_g",
            "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
        ),
        ("encoder.pos_conv_embed.conv.weight_v", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
        ("quantizer.codevectors", None),
        ("project_q.weight", None),
        ("project_hid.bias", None),
    ],
)
def test_official_names_of_raw_keys(key: str, name: str | None) -> None:
    assert official_name(key) == name


def test_param_map_has_the_official_keys() -> None:
    official = json.loads((GOLDEN / "checkpoint_keys.json").read_text())["wav2vec"]["keys"]
    with torch.device("meta"):
        encoder = SpeechEncoder(AudioConfig())
    param_map = encoder.param_map()
    assert {name: mapping.shape for name, mapping in param_map.items()} == {
        name: tuple(shape) for name, shape in official.items()
    }
    assert {ours for mapping in param_map.values() for ours in mapping.params} == encoder.state_dict().keys()
    assert all(official_name(name) == name for name in official)


def test_evaluation_mode() -> None:
    assert not any(module.training for module in SpeechEncoder(TINY_RANDOM.audio).modules())
