"""The batched student: the product's velocities, gradients everywhere, and a start that copies the noise."""

import dataclasses

import pytest
import torch
from torch import Tensor

from model.config import DiTConfig
from model.distill.student_network import UNUSED, Context, load_network, new_student, velocities
from model.dit import DiT
from model.errors import UserError
from model.rope import rope_table

CONFIG = DiTConfig(
    in_dim=20, out_dim=8, dim=48, ffn_dim=64, num_layers=2, num_heads=2, text_dim=16, text_len=8, img_dim=16,
    img_tokens=5, audio_blocks=1, audio_channels=6, intermediate_dim=24, output_dim=16, context_tokens=4,
)  # fmt: skip


def inputs(batch: int, config: DiTConfig = CONFIG) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = config.out_dim
    condition = torch.randn(batch, 3, config.in_dim - z, 4, 6)
    times = torch.rand(batch) * 1000
    return torch.randn(batch, 3, z, 4, 6), condition, times, torch.randn(batch, 9, 5, 1, 6)


def randomised(config: DiTConfig = CONFIG) -> DiT:
    """A student with random weights where training puts some."""
    dit = new_student(config)
    with torch.no_grad():
        for parameter in dit.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return dit


def test_the_velocities_are_those_of_the_product():
    torch.manual_seed(1)
    dit = randomised()
    latents, condition, times, audio = inputs(3)
    found = velocities(dit, latents, condition, times, audio)
    with torch.inference_mode():
        context = dit.embed_context(torch.randn(3, CONFIG.text_dim), torch.randn(CONFIG.img_tokens, CONFIG.img_dim))
        rope = rope_table((3, 2, 3), CONFIG.head_dim)
        for i in range(3):
            modulation, heard = dit.modulate(float(times[i])), dit.embed_audio(audio[i : i + 1])
            expected = dit(latents[i], condition[i], modulation, rope, context, heard)
            torch.testing.assert_close(found[i], expected, atol=2e-4, rtol=1e-4)


def test_prompts_and_portraits_count_where_they_are_given():
    torch.manual_seed(4)
    dit = DiT(CONFIG)  # every parameter random
    latents, condition, times, audio = inputs(2)
    text, image = torch.randn(2, CONFIG.text_len, CONFIG.text_dim), torch.randn(2, CONFIG.img_tokens, CONFIG.img_dim)
    found = velocities(dit, latents, condition, times, audio, Context(text, image))
    with torch.inference_mode():
        rope = rope_table((3, 2, 3), CONFIG.head_dim)
        for i in range(2):
            modulation, heard = dit.modulate(float(times[i])), dit.embed_audio(audio[i : i + 1])
            expected = dit(latents[i], condition[i], modulation, rope, dit.embed_context(text[i], image[i]), heard)
            torch.testing.assert_close(found[i], expected, atol=2e-4, rtol=1e-4)


def test_checkpoints_change_no_gradient():
    torch.manual_seed(5)
    dit, given = randomised(), inputs(2)
    gradients = []
    for checkpoints in (False, True):
        dit.zero_grad()
        velocities(dit, *given, checkpoints=checkpoints).square().mean().backward()
        gradients.append([x.grad.clone() for x in dit.parameters() if x.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_every_trained_parameter_has_a_gradient():
    torch.manual_seed(2)
    dit = randomised()
    velocities(dit, *inputs(2)).square().mean().backward()
    for name, parameter in dit.named_parameters():
        if any(part in name for part in UNUSED):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_it_begins_by_copying_noise():
    torch.manual_seed(3)
    noise, condition, _, audio = inputs(2)
    copied = velocities(new_student(CONFIG), noise, condition * 0, torch.full((2,), 1000.0), audio)
    assert torch.nn.functional.mse_loss(copied, noise) < 0.3  # zeros would have 1


def test_patches_must_fit():
    with pytest.raises(ValueError, match="64 numbers of a patch do not fit into 48 channels"):
        new_student(dataclasses.replace(CONFIG, out_dim=16, in_dim=36))


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "damaged").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a trained network"):
        load_network(tmp_path / "damaged")
