"""The teacher: its conditions are the product's, its loss and its sampler are their formulas."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import PRECISIONS, TINY
from model.distill import student, teacher
from model.distill.codec import SIZE
from model.distill.face import MOTION, draw_identity, render
from model.distill.student_network import load_network, new_student
from model.distill.takes import Batch, make_takes
from model.distill.teacher import STAGES, Codec, conditions, flow_loss, mouth_cells, sample, windows_of
from model.distill.training import Budget
from model.errors import UserError
from model.image import to_pixels
from model.sampler import timesteps
from model.weights.checkpoint import preset_models
from streaming.generator import ChunkGenerator
from streaming.timers import StageTimer
from tests.model.distill.conditions import needs_espeak, quiet

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
    one, stage = batch(8), dataclasses.replace(STAGES["streaming"], mouth_weight=1, channel_power=0, fault=0)
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


def test_streams_hear_both_chunks_of_a_take_and_resume():
    class Numbered:
        def __init__(self, number: int) -> None:
            self.number = number

        def chunk(self, start: int) -> Batch:
            return Batch(*(torch.full((1, 2, 2), 100.0 * self.number + start) for _ in Batch._fields))

    def play(streams: student.Streams, renews: str) -> list[tuple[float, float]]:
        heard = []
        for step, renew in enumerate(renews, 1):
            chunk = streams.next(student.Draw(renew == "y", (step, step)))
            streams.move_on(chunk.motion)
            heard.append((chunk.portraits[0, 0, 0].item(), chunk.audio[0, 0, 0].item()))
        return heard

    takes = [Numbered(i) for i in range(9)]
    first, second = student.Streams(takes), student.Streams(takes)  # type: ignore[arg-type]
    assert play(first, "nnnny") == [(100, 100), (100, 107), (100, 300), (100, 307), (500, 500)]
    second.load_state_dict(first.state_dict())
    assert play(second, "nn") == [(500, 507), (500, 200)]


def straight_to(end: Tensor):
    """Velocities of a network that always points to `end`."""
    return lambda _, x, __, times, ___: (
        (x - end[: len(x)].repeat(len(x) // len(end) or 1, 1, 1, 1, 1)) / (times.view(-1, 1, 1, 1, 1) / 1000)
    )


def test_samplers_end_where_velocities_point(codec, monkeypatch):
    torch.manual_seed(0)
    one, end, generator = batch(2, 4), torch.randn(2, 9, 48, 4, 4), torch.Generator()
    for module in (teacher, student):
        monkeypatch.setattr(module, "velocities", straight_to(end))
    dit, condition = new_student(SMALL), conditions(one.portraits, codec.grey, 9)
    found = sample(dit, one, codec, steps=5, guidance=2.0)
    torch.testing.assert_close(found[:, 2:], end[:, 2:], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[:, :2], one.latents[:, :2])
    motion = one.latents[:, :1]
    found = student.generate(dit, motion, condition, one.audio, generator)
    torch.testing.assert_close(found[:, 1:], end[:, 1:], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[:, :1], motion)
    passed, found = student.trajectory(dit, motion, condition, one.audio, generator)
    torch.testing.assert_close(found[:, 1:], end[:, 1:], atol=1e-4, rtol=1e-4)
    # A straight trajectory: what is passed is on the line from the noise, which comes first, to the end.
    levels = timesteps(4, TINY.chunk.sample_shift)[:-1] / 1000
    for level, x in zip(levels, passed, strict=True):
        torch.testing.assert_close(x[:, 1:], (end + level * (passed[0] - end))[:, 1:], atol=1e-4, rtol=1e-4)


@needs_espeak
def test_every_stage_trains_and_is_loaded_again(tmp_path):
    make_takes(tmp_path / "takes", 1, report=quiet)
    make_takes(tmp_path / "takes", 2, held_out=True, report=quiet)
    more = {"takes": tmp_path / "takes", "report": quiet}
    teacher.train(tmp_path / "lips", Budget(steps=1), stage="windows", config=SMALL, **more)
    weights = tmp_path / "lips" / teacher.WEIGHTS
    counters = teacher.train(
        tmp_path / "teacher", Budget(steps=1), stage="streaming", config=SMALL, start=weights, **more
    )
    assert {"r open", "gain at 0.97", "mouth psnr"} <= counters.history[-1].keys()
    counters = student.train(
        tmp_path / "student", Budget(steps=1), teacher=tmp_path / "teacher" / teacher.WEIGHTS, **more
    )
    assert {"loss at 1", "loss at 0.4", "r open"} <= counters.history[-1].keys()
    found = load_network(tmp_path / "student" / student.WEIGHTS)
    assert found.config == SMALL
    (tmp_path / "damaged").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a trained network"):
        load_network(tmp_path / "damaged")
