"""The teacher: its conditions are the product's, its loss and its sampler are their formulas."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import PRECISIONS, TINY
from model.distill import teacher
from model.distill.codec import SIZE
from model.distill.face import MOTION, draw_identity, render
from model.distill.student_network import new_student
from model.distill.takes import Batch
from model.distill.teacher import STAGES, Codec, conditions, flow_loss, mouth_cells, windows_of
from model.image import to_pixels
from model.weights.checkpoint import preset_models
from streaming.generator import ChunkGenerator
from streaming.timers import StageTimer

SMALL = dataclasses.replace(TINY.dit, dim=192, ffn_dim=64, num_layers=1, intermediate_dim=16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load()


def batch(count: int, cells: int = 16) -> Batch:
    z = TINY.vae.z_dim
    centres = 64 + 20 * torch.rand(count, 33, 2)
    latents, portraits = torch.randn(count, 9, z, cells, cells), torch.randn(count, z, cells, cells)
    return Batch(latents, portraits, torch.randn(count, 33, 5, 1, 6), centres, torch.rand(count, 33, 6))


def test_conditions_are_those_of_the_product(codec):
    motion = np.zeros((1, len(MOTION)), np.float32)
    picture = torch.from_numpy(render(draw_identity(np.random.default_rng(5)), motion, SIZE)[0]).permute(2, 0, 1)
    generator = ChunkGenerator(preset_models(TINY, CPU, PRECISIONS["fp32"]), StageTimer(CPU))
    prepared = generator.prepare(picture, torch.tensor([1, 2, 3]))
    with torch.inference_mode():
        (portrait,) = codec.vae.encode(to_pixels(picture)[None])
        found = conditions(portrait, codec.grey, 9)[0]
    torch.testing.assert_close(found, prepared.condition, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(portrait, prepared.motion, atol=1e-4, rtol=1e-4)


def test_a_window_contains_the_mouth():
    torch.manual_seed(0)
    whole = batch(20)
    found = windows_of(whole, 6)
    assert found.latents.shape == (20, 9, 48, 6, 6)
    for i in range(20):
        column, row = ((whole.centres[i, 0] - found.centres[i, 0]) / 8).long().tolist()
        assert row % 2 == column % 2 == 0
        assert torch.equal(found.latents[i], whole.latents[i, ..., row : row + 6, column : column + 6])
        assert torch.equal(found.portraits[i], whole.portraits[i, ..., row : row + 6, column : column + 6])
        assert ((found.centres[i].mean(0) - 24).abs() <= 8.01).all()
    assert windows_of(whole, 16) is whole


def test_cells_of_the_mouth_follow_it():
    centres = torch.tensor([64.0, 80.0]).expand(1, 33, 2).clone()
    centres[0, 1:5, 0] += torch.tensor([4.0, 6.0, 10.0, 12.0])  # frames of the second latent: 8 on average
    cells = mouth_cells(centres, 16)[0, :, 0]
    assert cells.shape == (9, 16, 16)
    # Centres of cells are at 4, 12, ...: less than 20 from 64 are 52, 60, 68, 76, less than 18 from 80 are 68 to 92.
    assert cells[0].nonzero().tolist() == [[row, column] for row in range(8, 12) for column in range(6, 10)]
    assert cells[1].nonzero().tolist() == [[row, column] for row in range(8, 12) for column in range(7, 11)]


def test_the_loss_is_its_formula(codec, monkeypatch):
    torch.manual_seed(0)
    seen: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(teacher, "velocities", lambda _, *inputs: seen.append(inputs) or torch.zeros_like(inputs[0]))
    one, stage = batch(8), dataclasses.replace(STAGES["streaming"], face_weight=1, channel_power=0, fault=0)
    loss, numbers = flow_loss(new_student(SMALL), one, codec, stage)
    ((noisy, condition, times, audio),) = seen
    level = (times / 1000).view(-1, 1, 1, 1, 1)
    u = level / (teacher.SHIFT - (teacher.SHIFT - 1) * level)  # as before the shift
    assert sorted(int(8 * x) for x in u.flatten()) == list(range(8))
    velocity = (noisy - one.latents) / level  # noise - latents; 0 where the latents are clean
    clean = (velocity.abs().amax((2, 3, 4)) == 0).sum(1)
    assert set(clean.tolist()) <= {1, 2}
    for i in range(8):
        portrait = one.portraits[i] if clean[i] == 2 else one.latents[i, 0]
        assert torch.equal(condition[i, 0, 4:], portrait)
        assert torch.equal(audio[i], one.audio[i]) or not audio[i].any()
    expected = velocity.square().sum() / ((9 * 8 - clean.sum()) * velocity[0, 0].numel())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert numbers["velocity"] == pytest.approx(expected.item(), rel=1e-3)


def test_faults_scale_and_shift_channels_and_add_noise():
    torch.manual_seed(0)
    latents = torch.randn(2, 3, 48, 16, 16)
    found = teacher.with_faults(latents, torch.tensor([0.0, 0.4]).view(2, 1, 1, 1, 1))
    assert torch.equal(found[0], latents[0])
    for channel in range(48):
        x, y = latents[1, :, channel], found[1, :, channel]
        scale = ((x - x.mean()) * (y - y.mean())).mean() / x.var()
        assert 0.55 < scale < 1.05  # 0.6 to 1, read from 768 numbers with noise
        assert (y - scale * x).std().item() == pytest.approx(0.2, rel=0.15)
