"""The linear codec inside the VAE: it is good, linear, orderly, and the product's steps see the same."""

import math

import pytest
import torch
from scipy.ndimage import gaussian_filter

from model.config import VAEConfig
from model.distill.codec_network import decode_clips, encode_clips
from model.distill.codec_start import DIFFERENCE_GAIN, Sample, start_at_linear_codec
from model.vae import VAE

CONFIG = VAEConfig(24, 48, (1, 2, 3), 1, (True, True), 2, True, (0.0,) * 48, (1.0,) * 48)


def smooth_clip(seed: int) -> torch.Tensor:
    """Random coloured clouds that move: [1, 3, 9, 48, 48] in [-1, 1]."""
    noise = torch.randn(3, 21, 72, 72, generator=torch.Generator().manual_seed(seed)).numpy()
    smooth = gaussian_filter(noise, (0, 3, 5, 5))[:, 6:15, 12:60, 12:60]
    return (torch.from_numpy(smooth)[None] / smooth.std() * 0.4).clamp(-1, 1)


def decibels(x: torch.Tensor, y: torch.Tensor) -> float:
    return 10 * math.log10(4 / float((x - y).square().mean()))


@pytest.fixture(scope="module")
def fitted() -> tuple[VAE, torch.Tensor]:
    torch.manual_seed(0)
    vae = VAE(CONFIG)
    samples = [Sample(smooth_clip(i), torch.ones(9, 48, 48)) for i in range(6)]
    return vae, start_at_linear_codec(vae, samples)


def test_unseen_smooth_clips_survive(fitted):
    vae, _ = fitted
    for seed in (100, 101):
        frames = smooth_clip(seed)
        decoded = decode_clips(vae, encode_clips(vae, frames))
        assert decibels(decoded, frames) > 36
        assert decibels(decoded[:, :, :1], frames[:, :, :1]) > 36  # the first frame has a latent of its own


def test_it_is_linear_but_for_a_constant(fitted):
    vae, _ = fitted

    def both(x: torch.Tensor) -> torch.Tensor:
        return decode_clips(vae, encode_clips(vae, x))

    x, y = smooth_clip(7) * 0.5, smooth_clip(8) * 0.5
    zero = both(torch.zeros_like(x))
    assert decibels(both(x + y) - zero, both(x) + both(y) - 2 * zero) > 45


def test_latents_are_centred_and_ordered_by_strength(fitted):
    vae, deviation = fitted
    latents = torch.cat([encode_clips(vae, smooth_clip(i))[0].flatten(1) for i in range(6)], 1)
    assert latents.std(1) == pytest.approx(deviation, rel=0.02)
    assert (latents.mean(1).abs() < 0.1 * deviation).all()
    assert deviation[0] > 3 * deviation[8] > 3 * deviation[47] > 0


def test_the_products_steps_give_the_same_picture(fitted):
    vae, _ = fitted
    frames = smooth_clip(9)
    latents = torch.cat(list(vae.encode(frames[0].transpose(0, 1))))
    pixels = torch.cat(list(vae.decode(latents))).transpose(0, 1)[None]
    assert decibels(pixels, decode_clips(vae, encode_clips(vae, frames)).clamp(-1, 1)) > 80


def test_half_precision_keeps_the_picture(fitted):
    vae, _ = fitted
    frames = smooth_clip(10)
    exact = decode_clips(vae, encode_clips(vae, frames))
    rounded = VAE(CONFIG)
    rounded.load_state_dict({name: x.half().float() for name, x in vae.state_dict().items()})
    assert decibels(decode_clips(rounded, encode_clips(rounded, frames)), exact) > 50


def test_more_channels_than_the_video_needs_are_filled_by_time(fitted):
    """At the second level 48 of 96 components of two frames are kept, half differences among them."""
    vae, _ = fitted
    taps = vae.encoder.downsamples[-2].time_conv.weight[..., 0, 0]
    differences = [channel for channel in range(48) if taps[channel].min() < 0]
    assert 0 < len(differences) < 48
    for channel in differences:
        half = 0.5 * DIFFERENCE_GAIN
        assert sorted(taps[channel][taps[channel] != 0].tolist()) == [-half, half]


def test_latents_survive_a_round_trip(fitted):
    """The decoder undoes the gain of differences."""
    vae, deviation = fitted
    latents = encode_clips(vae, smooth_clip(11))
    moved = encode_clips(vae, decode_clips(vae, latents)) - latents
    assert moved.square().mean().sqrt() < 0.01 * deviation[0]


def test_branches_see_numbers_of_ordinary_size(fitted):
    """Adam moves every weight alike, so that a branch with large inputs would break the start in a few steps."""
    vae, _ = fitted
    sizes = {}

    def hook(name: str):
        return lambda _, inputs: sizes.update({name: float(inputs[0].square().mean().sqrt())})

    handles = []
    for name, module in vae.named_modules():
        if ".residual." in name and name.endswith((".2", ".6")):
            handles.append(module.register_forward_pre_hook(hook(name)))
    # The clips' form calls functions, not modules, so the product's steps show the inputs.
    list(vae.decode(torch.cat(list(vae.encode(smooth_clip(3)[0].transpose(0, 1))))))
    for handle in handles:
        handle.remove()
    assert len(sizes) == len(handles) // 2  # the first convolution of a block is called by another name
    assert all(size < 4 for size in sizes.values()), sizes
