"""Distribution matching: the losses of student and critic, and the recipes for small and large students.

With x0 the student's clean latents of a chunk, and x_s = (1 - s) x0 + s e for a random noise level s, teacher and
critic predict clean latents from x_s. Their difference

    g = x0_critic - x0_teacher,        w = mean |x0 - x0_teacher|  (of each sample)

points from where the data is to where the student is too likely: score_teacher - score_critic = -(1 - s) / s^2 g. The
student's loss has the gradient g / w with respect to x0. The critic's loss is that of flow matching on the student's
latents.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.config import FLASHTALK_14B, TINY, ChunkConfig
from model.distill.rollout import Conditions, clean
from model.distill.student_network import Context, velocities
from model.distill.teacher import GUIDANCE
from model.dit import DiT
from model.sampler import NUM_TIMESTEPS, shifted, timesteps

LOWEST, HIGHEST = 0.02, 0.98  # noise levels at which teacher and critic are asked


@dataclass(frozen=True)
class Recipe:
    """How a student is distilled.

    The first three say what the ablation compares: whether motion latents are the student's own or true ones, how many
    chunks a stream has, and whether a latent frame of the student sees later ones.
    """

    own_motion: bool = True
    chunks: int = 5
    causal: bool = False
    batch: int = 2
    critic_steps: int = 5  # for each of the student's
    rate: float = 5e-5
    critic_rate: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.95)
    critic_betas: tuple[float, float] = (0.0, 0.95)
    clip: float = 10.0
    audio_guidance: float = GUIDANCE
    text_guidance: float = 1.0
    alignment: float = 0.0  # weight of the loss at motion latents; a teacher whose loss leaves them out is no target
    ema: float = 0.002  # of a step of student or critic
    evaluate_every: int = 250  # steps: 50 updates of the student
    checkpoints: bool = False
    chunk: ChunkConfig = TINY.chunk

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The noise levels of the sampler, from 1 down to 0."""
        return tuple((timesteps(self.chunk.sample_steps, self.chunk.sample_shift) / NUM_TIMESTEPS).tolist())


TINY_RECIPE = Recipe()
RECIPE_14B = Recipe(
    batch=1,  # for each GPU; 32 of them
    rate=2e-6,
    critic_rate=4e-7,
    betas=(0.9, 0.95),
    critic_betas=(0.9, 0.99),
    audio_guidance=4.0,
    text_guidance=3.0,
    alignment=1.0,
    checkpoints=True,
    chunk=FLASHTALK_14B.chunk,
)


@dataclass(frozen=True, eq=False)
class Generated:
    """Chunks of the student, and what they were generated from."""

    given: Conditions
    x0: Tensor  # clean latents at the exit step, [B, F, z, h, w]
    exit_step: int
    weights: Tensor  # of the latents' numbers in both losses, on average 1


def matching_loss(x0: Tensor, real: Tensor, fake: Tensor, weights: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The student's loss, whose gradient with respect to x0 is weights (fake - real) / w / (numbers of x0).

    Args:
        x0: clean latents of the student, [B, ...].
        real: what the teacher makes of them after noise was added.
        fake: what the critic makes of them.
        weights: of the numbers of x0.

    Returns:
        The loss, whose value says nothing, and w = mean |x0 - real| of each sample, [B].
    """
    with torch.no_grad():
        w = (x0 - real).abs().flatten(1).mean(1)
        g = (fake - real) / w.view(-1, *[1] * (x0.ndim - 1))
        target = x0 - g.nan_to_num(0.0, 0.0, 0.0)
    return 0.5 * (weights * (x0 - target).square()).mean(), w


def scoring_levels(exit_step: int, count: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Random noise levels at which a chunk is judged, [count]: those between its exit step's and the next one's."""
    steps = recipe.chunk.sample_steps
    u = (steps - 1 - exit_step + torch.rand(count, generator=generator)) / steps
    return shifted(u, recipe.chunk.sample_shift).clamp(LOWEST, HIGHEST)


def noised(x0: Tensor, given: Conditions, level: Tensor, noise: Tensor) -> Tensor:
    """(1 - s) x0 + s noise, with the motion latents clean. `level` s is [B]."""
    s = level.view(-1, *[1] * (x0.ndim - 1))
    return given.with_motion(x0 + s * (noise - x0))


def teacher_clean(teacher: DiT, noisy: Tensor, given: Conditions, level: Tensor, recipe: Recipe) -> Tensor:
    """The teacher's clean latents, guided by audio and, if there are prompts, by text.

    v(no, audio) + (a - 1) [v(no, audio) - v(no, no)] + t [v(text, audio) - v(no, audio)], with a, t the guidance by
    audio and by text. Without prompts the last term is left out.
    """

    def v(audio: Tensor, context: Context | None) -> Tensor:
        return velocities(teacher, noisy, given.condition, NUM_TIMESTEPS * level, audio, context)

    heard = v(given.audio, given.unprompted)
    guided = heard + (recipe.audio_guidance - 1) * (heard - v(torch.zeros_like(given.audio), given.unprompted))
    if given.context is not None:
        prompted = v(given.audio, given.context)
        guided = guided + recipe.text_guidance * (prompted - heard)
    return clean(noisy, level.view(-1, 1, 1, 1, 1), guided)


def judged(
    made: Generated, teacher: DiT, critic: DiT, recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The clean latents of teacher and critic for a chunk with noise of one random level for each sample."""
    x0, given = made.x0.detach(), made.given
    level = scoring_levels(made.exit_step, len(x0), recipe, generator).to(x0.device)
    noisy = noised(x0, given, level, torch.randn(x0.shape, generator=generator).to(x0.device))
    with torch.no_grad():
        real = teacher_clean(teacher, noisy, given, level, recipe)
        v = velocities(critic, noisy, given.condition, NUM_TIMESTEPS * level, given.audio, given.context)
    return real, clean(noisy, level.view(-1, 1, 1, 1, 1), v)


def student_loss(
    made: Generated, teacher: DiT, critic: DiT, recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The loss of the student's chunks, and mean |g| and w."""
    x0, n = made.x0, made.given.motion.shape[1]
    real, fake = judged(made, teacher, critic, recipe, generator)
    loss, w = matching_loss(x0[:, n:], real[:, n:], fake[:, n:], made.weights[:, n:])
    if recipe.alignment:
        aligned, _ = matching_loss(x0[:, :n], real[:, :n], x0[:, :n].detach(), made.weights[:, :n])
        loss = loss + recipe.alignment * n / (x0.shape[1] - n) * aligned
    return loss, {"g": (fake - real)[:, n:].abs().mean().item(), "w": w.mean().item()}


def critic_loss(made: Generated, critic: DiT, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Half the squared error of the critic's velocities on the student's chunks, each at one random noise level."""
    x0, given, n = made.x0.detach(), made.given, made.given.motion.shape[1]
    level = scoring_levels(made.exit_step, len(x0), recipe, generator).to(x0.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    noisy = noised(x0, given, level, noise)
    v = velocities(
        critic, noisy, given.condition, NUM_TIMESTEPS * level, given.audio, given.context, False, recipe.checkpoints
    )
    return 0.5 * (made.weights * (v - (noise - x0)).square())[:, n:].mean()
