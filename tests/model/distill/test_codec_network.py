"""The VAE on whole clips: equal to the product's steps, and with right gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import VAEConfig
from model.distill.codec_network import decode_clips, encode_clips
from model.vae import VAE


def random_vae(seed: int, patch: int, phases: bool, temporal: tuple[bool, bool]) -> VAE:
    torch.manual_seed(seed)
    mean, deviation = tuple(torch.randn(3).tolist()), tuple((torch.rand(3) + 0.5).tolist())
    config = VAEConfig(4, 3, (1, 2, 3), 1, temporal, patch, phases, mean, deviation)
    vae = VAE(config).double()
    for name, parameter in vae.named_parameters():
        if name.endswith(("gamma", "bias")):
            parameter.uniform_(0.5, 1.5)
    return vae


@settings(max_examples=12)
@given(
    st.integers(0, 2**31),
    st.integers(1, 2),
    st.booleans(),
    st.sampled_from([(True, True), (False, True), (True, False), (False, False)]),
    st.integers(0, 2),
    st.integers(1, 2),
    st.integers(1, 2),
)
def test_clips_equal_the_products_steps(seed, patch, phases, temporal, groups, rows, columns):
    vae = random_vae(seed, patch, phases, temporal)
    stride, time = vae.config.spatial_stride, vae.config.temporal_stride
    frames = torch.rand(2, 3, 1 + time * groups, stride * rows, stride * columns).double() * 2 - 1
    latents = encode_clips(vae, frames)
    decoded = decode_clips(vae, latents).clamp(-1, 1)
    for i in range(2):
        steps = torch.cat(list(vae.encode(frames[i].transpose(0, 1))))
        torch.testing.assert_close(latents[i].transpose(0, 1), steps, rtol=1e-6, atol=1e-6)
        pixels = torch.cat(list(vae.decode(steps)))
        torch.testing.assert_close(decoded[i].transpose(0, 1), pixels, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    vae = random_vae(0, 2, True, (True, True)).requires_grad_(True)
    frames = torch.rand(1, 3, 5, 16, 16).double()

    def loss() -> torch.Tensor:
        return decode_clips(vae, encode_clips(vae, frames)).square().mean()

    loss().backward()
    directions = {name: torch.randn_like(p) for name, p in vae.named_parameters()}
    slope = sum(float((directions[name] * p.grad).sum()) for name, p in vae.named_parameters() if p.grad is not None)
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for name, parameter in vae.named_parameters():
                parameter += step * directions[name]
            ends.append(loss())
    assert float(ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_every_parameter_gets_a_gradient():
    vae = random_vae(1, 2, True, (True, True)).requires_grad_(True)
    decode_clips(vae, encode_clips(vae, torch.rand(1, 3, 5, 16, 16).double())).square().mean().backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []
