"""Distribution matching: gradients are the formula's and stay where they belong, and a toy is solved by it."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from model.config import FLASHTALK_14B
from model.distill import matching
from model.distill.matching import (
    RECIPE_14B,
    TINY_RECIPE,
    Generated,
    critic_loss,
    matching_loss,
    scoring_levels,
    student_loss,
)
from model.distill.rollout import Conditions, sampled
from model.distill.student_network import Context
from model.dit import DiT
from model.sampler import NUM_TIMESTEPS, timesteps
from tests.model.distill.test_student_network import CONFIG, randomised

FRAMES = 3


def conditions(batch: int, n: int = 2) -> Conditions:
    z = CONFIG.out_dim
    audio = torch.randn(batch, 9, 5, 1, 6)
    return Conditions(torch.randn(batch, n, z, 4, 4), torch.randn(batch, FRAMES, CONFIG.in_dim - z, 4, 4), audio)


def generated(student: DiT, exit_step: int = 2, seed: int = 0) -> Generated:
    generator = torch.Generator().manual_seed(seed)
    given = conditions(2)
    _, x0 = sampled(student, given, generator, TINY_RECIPE.levels, exit_step)
    assert x0 is not None
    return Generated(given, x0, exit_step, torch.ones_like(x0))


def gradients(network: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def test_the_gradient_of_the_student_s_loss_is_the_formula_s():
    torch.manual_seed(0)
    x0 = torch.randn(3, 4, 5, requires_grad=True)
    real, fake, weights = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.rand(3, 4, 5)
    loss, w = matching_loss(x0, real, fake, weights)
    loss.backward()
    expected_w = (x0.detach() - real).abs().mean((1, 2))
    torch.testing.assert_close(w, expected_w)
    torch.testing.assert_close(x0.grad, weights * (fake - real) / expected_w.view(3, 1, 1) / x0.numel())


def test_what_is_not_finite_has_no_gradient():
    x0 = torch.zeros(2, 3, requires_grad=True)
    real, fake = torch.zeros(2, 3), torch.ones(2, 3)
    real[1], fake[1, 0] = 1.0, math.nan
    loss, _ = matching_loss(x0, real, fake)  # w of the first sample is 0
    loss.backward()
    assert x0.grad is not None
    assert torch.equal(x0.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("exit_step", range(4))
def test_a_chunk_is_judged_at_the_levels_that_its_exit_step_covers(exit_step):
    levels = scoring_levels(exit_step, 1000, TINY_RECIPE, torch.Generator().manual_seed(0))
    reached = (timesteps(4, TINY_RECIPE.chunk.sample_shift) / NUM_TIMESTEPS).tolist()
    high, low = min(reached[exit_step], 0.98), max(reached[exit_step + 1], 0.02)
    assert low - 1e-6 <= levels.min() < low + 0.01
    assert high - 0.01 < levels.max() <= high + 1e-6


def test_a_critic_that_equals_an_unguided_teacher_gives_nothing():
    torch.manual_seed(1)
    teacher = randomised()
    recipe = dataclasses.replace(TINY_RECIPE, audio_guidance=1.0)
    made = generated(randomised())
    loss, numbers = student_loss(made, teacher, teacher, recipe, torch.Generator().manual_seed(0))
    assert loss.item() == numbers["g"] == 0
    assert numbers["w"] > 0


def test_gradients_stay_where_they_belong():
    torch.manual_seed(2)
    student, teacher, critic = (randomised() for _ in range(3))
    made, generator = generated(student), torch.Generator().manual_seed(0)
    made.x0.retain_grad()
    student_loss(made, teacher, critic, TINY_RECIPE, generator)[0].backward()
    assert made.x0.grad is not None
    assert not made.x0.grad[:, :2].any()  # motion latents
    assert made.x0.grad[:, 2:].all()
    assert not gradients(teacher)
    assert not gradients(critic)
    assert any(x.any() for x in gradients(student))
    student.zero_grad()
    critic_loss(made, critic, TINY_RECIPE, generator).backward()
    assert not gradients(teacher)
    assert not gradients(student)
    assert any(x.any() for x in gradients(critic))


def test_alignment_pulls_motion_latents_to_the_teacher_s():
    torch.manual_seed(3)
    student, teacher, critic = (randomised() for _ in range(3))
    made, generator = generated(student), torch.Generator().manual_seed(0)
    made.x0.retain_grad()
    recipe = dataclasses.replace(TINY_RECIPE, alignment=1.0)
    student_loss(made, teacher, critic, recipe, generator)[0].backward()
    real, _ = matching.judged(made, teacher, critic, recipe, torch.Generator().manual_seed(0))
    away = made.x0.detach()[:, :2] - real[:, :2]
    w = away.abs().flatten(1).mean(1).view(2, 1, 1, 1, 1)
    assert made.x0.grad is not None
    torch.testing.assert_close(made.x0.grad[:, :2], 2 / (FRAMES - 2) * away / w / away.numel())


def test_the_gradient_agrees_with_finite_differences():
    """At the first step: what the later ones start from depends on the weights as well, but must have no gradient."""
    torch.manual_seed(4)
    student, given = randomised(), conditions(1)
    direction = torch.randn(1, FRAMES, CONFIG.out_dim, 4, 4)

    def along_direction() -> Tensor:
        _, x0 = sampled(student, given, torch.Generator().manual_seed(5), TINY_RECIPE.levels, 0)
        assert x0 is not None
        return (x0 * direction).sum()

    along_direction().backward()
    for name in ("head.head.weight", "blocks.0.self_attn.qkv.weight", "audio_proj.proj1_vf.weight"):
        parameter = student.get_parameter(name)
        assert parameter.grad is not None
        slope = parameter.grad.norm()
        step = 1e-2 * parameter.grad / slope
        changes = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter += sign * step
            changes.append(along_direction().item())
        with torch.no_grad():
            parameter += step
        assert (changes[0] - changes[1]) / 2e-2 == pytest.approx(slope.item(), rel=0.02), name


@pytest.mark.parametrize("exit_step", range(4))
def test_one_step_of_the_sampler_is_in_the_graph(exit_step, monkeypatch):
    torch.manual_seed(5)
    student, recorded = randomised(), []
    genuine = matching.velocities

    def watched(*args, **more):
        recorded.append(torch.is_grad_enabled())
        return genuine(*args, **more)

    monkeypatch.setattr("model.distill.rollout.velocities", watched)
    latents, x0 = sampled(student, conditions(1), torch.Generator(), TINY_RECIPE.levels, exit_step)
    assert recorded == [step == exit_step for step in range(4)]
    assert x0 is not None
    assert x0.requires_grad
    assert not latents.requires_grad


def test_a_causal_student_sees_no_later_frame():
    torch.manual_seed(6)
    student, given = randomised(), conditions(1, n=1)
    later = dataclasses.replace(given, condition=given.condition.clone())
    later.condition[:, 2] += 1
    for causal in (True, False):
        first, second = (
            sampled(student, one, torch.Generator().manual_seed(0), (1.0, 0.0), causal=causal)[0]
            for one in (given, later)
        )
        assert torch.equal(first[:, :2], second[:, :2]) == causal
        assert not torch.equal(first[:, 2], second[:, 2])


def test_the_large_student_runs_its_first_step_on_meta():
    """Both losses of the 14B form, two of its 40 blocks, with prompts, portraits and three guided calls."""
    config = dataclasses.replace(FLASHTALK_14B.dit, num_layers=2)
    with torch.device("meta"):
        student, critic, teacher = (DiT(config) for _ in range(3))
        teacher.requires_grad_(False)
        batch, frames, rows, columns = 1, 9, 32, 56
        text = torch.empty(batch, config.text_len, config.text_dim)
        context = Context(text, torch.empty(batch, config.img_tokens, config.img_dim))
        audio = torch.empty(batch, 33, 5, config.audio_blocks, config.audio_channels)
        condition = torch.empty(batch, frames, config.in_dim - config.out_dim, rows, columns)
        given = Conditions(torch.empty(batch, 2, config.out_dim, rows, columns), condition, audio, context, context)
    latents, x0 = sampled(student, given, torch.Generator(), RECIPE_14B.levels, 1, checkpoints=True)
    assert x0 is not None
    assert latents.shape == x0.shape == (batch, frames, 16, rows, columns)
    made = Generated(given, x0, 1, torch.ones_like(x0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "item", lambda _: 0.0)  # meta tensors have no numbers
        loss, _ = student_loss(made, teacher, critic, RECIPE_14B, torch.Generator())
    (loss + critic_loss(made, critic, RECIPE_14B, torch.Generator())).backward()
    for network in (student, critic):
        assert all(parameter.grad is not None for parameter in network.parameters())
    assert not gradients(teacher)


def test_eight_gaussians_are_all_recovered():
    """A student of two dimensions finds every mode. What the teacher makes of noisy data is known in closed form."""
    torch.manual_seed(0)
    angles = torch.arange(8) * math.pi / 4
    centres, deviation = 2 * torch.stack((angles.cos(), angles.sin()), 1), 0.2

    def mean_of_data(x: Tensor, s: Tensor) -> Tensor:
        """E[x0 | x_s = x] of the mixture."""
        variance = ((1 - s) * deviation) ** 2 + s**2
        from_centres = x[:, None] - (1 - s)[:, None] * centres
        share = (from_centres.square().sum(2) / -2 / variance).softmax(1)
        means = centres + ((1 - s) * deviation**2 / variance)[:, None] * from_centres
        return (share[..., None] * means).sum(1)

    def network(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))

    student, critic = network(2), network(3)
    of_student, of_critic = (torch.optim.Adam(x.parameters(), 2e-3, betas=(0.0, 0.95)) for x in (student, critic))
    for step in range(3000):
        x0, s, noise = 2 * student(torch.randn(256, 2)), 0.02 + 0.96 * torch.rand(256, 1), torch.randn(256, 2)
        noisy = (x0 + s * (noise - x0)).detach()
        of_critic.zero_grad()
        (critic(torch.cat((noisy, s), 1)) - (noise - x0.detach())).square().mean().backward()
        of_critic.step()
        if step % 3 == 0:
            fake = (noisy - s * critic(torch.cat((noisy, s), 1))).detach()
            of_student.zero_grad()
            matching_loss(x0, mean_of_data(noisy, s), fake)[0].backward()
            of_student.step()
    with torch.no_grad():
        distance, nearest = torch.cdist(2 * student(torch.randn(4000, 2)), centres).min(1)
    shares = torch.bincount(nearest, minlength=8) / len(nearest)
    assert shares.min() > 0.08, shares  # seen: 0.117 of 0.125
    assert (distance < 0.5).float().mean() > 0.65  # seen: 0.78; modes are 1.5 apart
