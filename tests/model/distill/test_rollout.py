"""Streams of a training: who hears what, on whose motion latents, and how chunks are sampled."""

from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from model.distill import rollout, student, teacher
from model.distill.rollout import Conditions, Draw, Streams, TrueMotion, sampled
from model.distill.student_network import new_student
from model.distill.takes import Batch, Take
from model.distill.teacher import Codec, conditions, sample
from model.sampler import timesteps
from tests.model.distill.conditions import random_take
from tests.model.distill.test_teacher import SMALL, batch


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load()


class Numbered:
    """A take whose every number says which take it is and where the chunk begins."""

    def __init__(self, number: int) -> None:
        self.number = number

    def chunk(self, start: int) -> Batch:
        return Batch(*(torch.full((1, 2, 2), 100.0 * self.number + start) for _ in Batch._fields))


def play(streams: Streams, steps: range) -> list[tuple[float, float, float]]:
    """The portrait, the sound and the motion latents of a stream at each step, which ends with the step's number."""
    heard = []
    for step in steps:
        chunk = streams.next(Draw((step, step), (0, 0), False))
        streams.move_on(torch.full_like(chunk.motion, step))
        heard.append(tuple(part.flatten()[0].item() for part in (chunk.portraits, chunk.audio, chunk.motion)))
    return heard


def test_streams_hear_both_chunks_of_a_take_and_resume():
    takes = cast(list[Take], [Numbered(i) for i in range(9)])
    first, second = (Streams(takes, 2, 5) for _ in range(2))
    assert play(first, range(1, 7)) == [
        *((100, 100, 100), (100, 107, 1), (100, 300, 2), (100, 307, 3), (100, 500, 4)),
        (600, 600, 600),  # a new stream, which begins with its portrait
    ]
    second.load_state_dict(first.state_dict())
    assert play(second, range(7, 9)) == [(600, 607, 6), (600, 800, 7)]


def test_true_motion_is_that_of_the_take():
    takes = [random_take(i) for i in range(3)]
    source = TrueMotion(takes, 2)
    chunk = source.next(Draw((2, 0), (3, 7), False))
    expected = takes[2].chunk(3)
    assert torch.equal(chunk.motion[0], expected.latents[0, :2])
    assert torch.equal(chunk.portraits[0], expected.portraits[0])
    assert torch.equal(chunk.audio[0], expected.audio[0])
    chunk = source.next(Draw((2, 0), (3, 7), True))
    assert torch.equal(chunk.motion, chunk.portraits[:, None])
    assert torch.equal(chunk.motion[1], takes[0].chunk(7).latents[0, :1])
    drawn = [source.draw(np.random.default_rng(i)) for i in range(300)]
    assert {start for draw in drawn for start in draw.starts} == set(range(rollout.STARTS))
    assert 0.05 < np.mean([draw.beginning for draw in drawn]) < 0.3  # 0.15 of fixed seeds


def straight_to(end: Tensor):
    """Velocities of a network that always points to `end`."""
    return lambda _, x, __, times, *___: (
        (x - end[: len(x)].repeat(len(x) // len(end) or 1, 1, 1, 1, 1)) / (times.view(-1, 1, 1, 1, 1) / 1000)
    )


def test_samplers_end_where_velocities_point(codec, monkeypatch):
    torch.manual_seed(0)
    one, end, generator = batch(2, 4), torch.randn(2, 9, 48, 4, 4), torch.Generator()
    for module in (teacher, student, rollout):
        monkeypatch.setattr(module, "velocities", straight_to(end))
    dit = new_student(SMALL)
    given = Conditions(one.latents[:, :1], conditions(one.portraits, codec.grey, 9), one.audio)
    found = sample(dit, one, codec, steps=5, guidance=2.0)
    torch.testing.assert_close(found[:, 2:], end[:, 2:], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[:, :2], one.latents[:, :2])
    found, kept = sampled(dit, given, generator)
    assert kept is None
    torch.testing.assert_close(found[:, 1:], end[:, 1:], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[:, :1], given.motion)
    passed, found = student.trajectory(dit, given, generator)
    torch.testing.assert_close(found[:, 1:], end[:, 1:], atol=1e-4, rtol=1e-4)
    # A straight trajectory: what is passed is on the line from the noise, which comes first, to the end.
    levels = timesteps(rollout.STEPS, rollout.SHIFT)[:-1] / 1000
    for level, x in zip(levels, passed, strict=True):
        torch.testing.assert_close(x[:, 1:], (end + level * (passed[0] - end))[:, 1:], atol=1e-4, rtol=1e-4)


def test_the_sampler_adds_noise_again_and_writes_motion_in(codec, monkeypatch):
    """Each step sees (1 - s) x0 + s e of a new e, and clean motion latents."""
    torch.manual_seed(1)
    one, end, seen = batch(1, 4), torch.randn(1, 9, 48, 4, 4), []

    def watched(_, x: Tensor, *more: Tensor) -> Tensor:
        seen.append(x)
        return straight_to(end)(None, x, *more)

    monkeypatch.setattr(rollout, "velocities", watched)
    given = Conditions(one.latents[:, :2], conditions(one.portraits, codec.grey, 9), one.audio)
    levels = (1.0, 0.75, 0.25, 0.0)
    _, kept = sampled(new_student(SMALL), given, torch.Generator().manual_seed(3), levels, exit_step=1)
    assert kept is not None
    torch.testing.assert_close(kept, end, atol=1e-4, rtol=1e-4)
    noises = [(x - (1 - s) * end)[:, 2:] / s for x, s in zip(seen, levels, strict=False)]
    for noise, x in zip(noises, seen, strict=True):
        assert torch.equal(x[:, :2], given.motion)
        assert noise.mean().item() == pytest.approx(0, abs=0.1)
        assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert not any(torch.allclose(a, b, atol=0.1) for a, b in pairwise(noises))
