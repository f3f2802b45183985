"""Training and measuring the codec: its windows, loss and optimizer, what it saves, and what the shipped one keeps."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from model.distill import codec
from model.distill.codec import (
    CODEC,
    FRAMES,
    MOUTH_WEIGHT,
    SIZE,
    WINDOW,
    Batch,
    as_bytes,
    as_clip,
    codec_loss,
    draw_batch,
    load_codec,
    make_optimizer,
    mouth_mask,
    normalise_latents,
    round_trips,
    save_codec,
)
from model.distill.codec_network import decode_clips, encode_clips
from model.distill.training import Budget, step_generator
from model.errors import UserError
from model.vae import VAE
from tests.model.distill.conditions import needs_espeak


def test_bytes_survive_the_way_to_clips_and_back():
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 8, 8, 3)
    clip = as_clip(frames)
    assert clip.shape == (1, 3, 4, 8, 8)
    assert clip.min() == -1
    assert clip.max() == 1
    np.testing.assert_array_equal(as_bytes(clip), frames)


def test_mouth_mask_is_a_box_around_the_centre():
    mask = mouth_mask(np.array([[60.0, 90.0]], np.float32), (40, 64), 64)
    columns, rows = np.flatnonzero(mask[0].any(0)), np.flatnonzero(mask[0].any(1))
    assert (columns[0] + 40, columns[-1] + 40) == (40, 79)
    assert (rows[0] + 64, rows[-1] + 64) == (72, 107)
    assert mask.sum() == 40 * 36


@needs_espeak
def test_a_batch_is_a_function_of_seed_and_step():
    first, second, other = draw_batch(step_generator(0, 3), 0), draw_batch(step_generator(0, 3), 0), None
    other = draw_batch(step_generator(0, 4), 0)
    assert first.frames.shape == (codec.BATCH, 3, FRAMES, WINDOW, WINDOW)
    assert first.weight.shape == (codec.BATCH, 1, FRAMES, WINDOW, WINDOW)
    assert set(first.weight.unique().tolist()) <= {1.0, MOUTH_WEIGHT}
    assert torch.equal(first.frames, second.frames)
    assert not torch.equal(first.frames, other.frames)


def test_loss_is_its_formula():
    torch.manual_seed(0)
    vae = VAE(CODEC)
    frames, weight = torch.rand(1, 3, 9, 64, 64) * 2 - 1, torch.rand(1, 1, 9, 64, 64) + 0.5
    inner, inner_weight = frames[:, :, :5, 16:48, 16:48], weight[:, :, :5, 16:48, 16:48]

    def expected(seen: torch.Tensor, true: torch.Tensor, weight: torch.Tensor) -> tuple[float, float, float]:
        latents = encode_clips(vae, seen)
        decoded = decode_clips(vae, latents)
        difference, share = (decoded - true).double(), (weight / weight.mean()).double()
        error = (8 * (share * difference**2).mean() + 0.2 * (share * difference.abs()).mean()).item()
        gain = vae.conv2.weight[:, :, 0, 0, 0].square().sum(0).sqrt().view(-1, 1, 1, 1)
        moved = ((encode_clips(vae, decoded) - latents) * gain).double().square().sum().item() / true.numel()
        psnr = -10 * math.log10(difference.square().mean().item() / 4)
        return error + 8 * codec.STAY_WEIGHT * moved, psnr, moved

    with torch.no_grad():
        plain, numbers = codec_loss(vae, Batch(frames, weight, 0))
        tripped, more = codec_loss(vae, Batch(frames, weight, 2))
        seen = inner
        for _ in range(2):
            seen = decode_clips(vae, encode_clips(vae, seen)).clamp(-1, 1)
        first, psnr, moved = expected(frames, frames, weight)
        second, psnr_after, moved_after = expected(seen, inner, inner_weight)
    assert plain.item() == pytest.approx(first, rel=1e-4)
    assert tripped.item() == pytest.approx(first + second, rel=1e-4)
    assert numbers == {"psnr": pytest.approx(psnr, abs=1e-3), "moved": pytest.approx(moved, rel=1e-4)}
    after = {
        "psnr after trips": pytest.approx(psnr_after, abs=1e-3),
        "moved after trips": pytest.approx(moved_after, rel=1e-4),
    }
    assert more == numbers | after


def test_optimizer_has_every_trained_parameter_once_and_spares_the_linear_path():
    vae = VAE(CODEC)
    vae.decoder.requires_grad_(True)
    groups = make_optimizer(vae).param_groups
    names = {id(p): f"decoder.{name}" for name, p in vae.decoder.named_parameters()}
    linear, first, last = ({names[id(p)] for p in group["params"]} for group in groups)
    assert sorted([*linear, *first, *last]) == sorted(names.values())
    assert "decoder.upsamples.2.phase_weights" in linear
    assert "decoder.head.2.weight" in linear
    assert "decoder.middle.0.residual.2.weight" in first
    assert "decoder.middle.0.residual.6.weight" in last
    assert groups[1]["lr"] > 5 * groups[0]["lr"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[VAE, list[str]]:
    """What a short training from the beginning saves, and the lines that it reports."""
    folder, lines = tmp_path_factory.mktemp("codec"), []
    codec.train(folder, Budget(steps=2), start_clips=3, evaluation_clips=1, report=lines.append)
    return load_codec(folder / codec.WEIGHTS.name), lines


@needs_espeak
def test_the_encoder_stays_linear_while_the_decoder_learns(trained):
    branches = {n: x for n, x in trained[0].state_dict().items() if ".residual.6." in n or ".proj." in n}
    assert not any(x.any() for n, x in branches.items() if n.startswith("encoder."))
    assert any(x.any() for n, x in branches.items() if n.startswith("decoder."))


def test_a_silent_branch_is_left_out_with_the_same_result():
    torch.manual_seed(0)
    vae, frames = VAE(CODEC), torch.rand(1, 3, 5, 16, 16) * 2 - 1
    for name, parameter in vae.encoder.named_parameters():
        if ".residual.6." in name or ".proj." in name:
            parameter.zero_()
    silent = encode_clips(vae, frames)
    vae.encoder.requires_grad_(True)
    torch.testing.assert_close(silent, encode_clips(vae, frames), rtol=0, atol=0)


@needs_espeak
def test_training_starts_at_the_linear_codec_and_its_result_loads(trained):
    vae, lines = trained
    assert "fits the linear codec to 3 clips" in lines[0]
    assert all(not p.requires_grad for p in vae.parameters())
    clip = codec.held_out_clips(1, frames=9)[0].frames(SIZE)
    decoded = codec.through_codec(vae, clip)
    assert decoded.shape == clip.shape
    assert -10 * math.log10(np.square(decoded / 255 - clip / 255).mean()) > 26


@needs_espeak
def test_training_can_begin_with_saved_weights(tmp_path):
    torch.manual_seed(0)
    vae, lines = VAE(CODEC), []
    save_codec(vae, tmp_path / "first.safetensors")
    start = tmp_path / "first.safetensors"
    codec.train(tmp_path / "run", Budget(steps=1), start=start, start_clips=1, evaluation_clips=1, report=lines.append)
    assert not any("linear" in line for line in lines)
    trained = load_codec(tmp_path / "run" / "codec.safetensors").state_dict()
    for name, tensor in vae.state_dict().items():
        if not name.startswith(("conv1.", "conv2.")):  # which then normalise the latents
            torch.testing.assert_close(trained[name], tensor, atol=2e-3, rtol=2e-3)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    torch.manual_seed(0)
    vae = VAE(CODEC)
    path = tmp_path / "codec.safetensors"
    save_codec(vae, path)
    again = load_codec(path)
    assert again.config == CODEC
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, vae.state_dict()[name], rtol=1e-3, atol=1e-7)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a trained network"):
        load_codec(path)


@needs_espeak
def test_normalised_latents_are_standard_and_give_the_same_picture(monkeypatch):
    monkeypatch.setattr(codec, "draw_clip", partial(codec.draw_clip, frames=9))
    torch.manual_seed(0)
    vae = VAE(CODEC)
    clips = [as_clip(codec.draw_clip(0, index).frames(SIZE)) for index in range(3)]
    before = decode_clips(vae, encode_clips(vae, clips[0]))
    normalise_latents(vae, 0, 3)
    latents = torch.cat([encode_clips(vae, clip)[0].flatten(1) for clip in clips], 1)
    torch.testing.assert_close(decode_clips(vae, encode_clips(vae, clips[0])), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(latents.mean(1), torch.zeros(48), atol=2e-3, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(48), atol=2e-3, rtol=0)


def test_round_trips_are_those_of_a_stream():
    torch.manual_seed(0)
    vae = VAE(CODEC)
    still = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    first, second = round_trips(vae, still, 2)
    x = as_clip(np.repeat(still[None], 5, 0))
    with torch.no_grad():
        once = decode_clips(vae, encode_clips(vae, x)).clamp(-1, 1)
        twice = decode_clips(vae, encode_clips(vae, once)).clamp(-1, 1)
    assert first == pytest.approx(-10 * math.log10((once - x).square().mean().item() / 4), abs=0.01)
    assert second == pytest.approx(-10 * math.log10((twice - x).square().mean().item() / 4), abs=0.01)
