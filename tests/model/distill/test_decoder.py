"""The decoder's training: windows are the true picture of the cells that are decoded; the student's last steps."""

import numpy as np
import pytest
import torch

from model.config import TINY
from model.distill import decoder
from model.distill.codec import CODEC, WINDOW, codec_loss, load_codec
from model.distill.codec_network import decode_clips
from model.distill.decoder import CELLS, FRAMES, LATENTS, decoder_loss, draw, last_steps
from model.distill.student_network import new_student, save_network
from model.distill.takes import load_takes, make_takes, people_of
from model.distill.teacher import Codec
from model.distill.training import Budget
from tests.model.distill.conditions import needs_espeak, quiet
from tests.model.distill.test_teacher import SMALL, straight_to

pytestmark = needs_espeak


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("takes")
    make_takes(path, 2, report=quiet)
    make_takes(path, 2, held_out=True, report=quiet)
    return path


@pytest.mark.parametrize("seed", range(3))
def test_a_window_is_the_true_picture_of_its_cells(folder, seed):
    batch = draw(load_takes(folder), people_of(folder), np.random.default_rng(seed))
    assert batch.windows.frames.shape == (2, 3, FRAMES, WINDOW, WINDOW)
    decoded = decode_clips(load_codec(), batch.chunks.latents[:, :LATENTS].transpose(1, 2)).detach()
    for i, (column, row) in enumerate(batch.corners):
        x, y = column * CODEC.spatial_stride, row * CODEC.spatial_stride
        part, true = decoded[i, :, :, y : y + WINDOW, x : x + WINDOW], batch.windows.frames[i]
        error = (part - true).square().mean()
        assert error < 0.05 * true.var()  # it is another person's or window's if it is as far as that
        assert error < 0.5 * (part - true.roll(CODEC.spatial_stride, 2)).square().mean()


def test_a_student_that_knows_the_truth_gives_it(folder, monkeypatch):
    chunks = draw(load_takes(folder), people_of(folder), np.random.default_rng(0)).chunks
    monkeypatch.setattr(decoder, "velocities", straight_to(chunks.latents))
    for steps in (1, 2, 4):
        given = last_steps(new_student(SMALL), chunks, Codec.load(), steps)
        torch.testing.assert_close(given, chunks.latents[:, :LATENTS], atol=1e-4, rtol=1e-4)


def test_the_loss_is_that_of_clean_and_of_given_latents(folder, monkeypatch):
    batch, vae, codec = (
        draw(load_takes(folder), people_of(folder), np.random.default_rng(0)),
        load_codec(),
        Codec.load(),
    )
    monkeypatch.setattr(decoder, "last_steps", lambda *_: batch.chunks.latents[:, :LATENTS])
    loss, numbers = decoder_loss(vae, new_student(SMALL), batch, codec)
    clean, of_clean = codec_loss(vae, batch.windows)
    assert 1 < loss.item() / clean.item() < 2.5  # the same picture twice, but its latents see beyond the window
    assert numbers[decoder.GIVEN] == pytest.approx(of_clean["psnr"], abs=1.5)
    assert CELLS * CODEC.spatial_stride == WINDOW


def test_a_training_writes_a_codec_with_the_same_encoder(folder, tmp_path):
    save_network(new_student(TINY.dit), tmp_path / "student.safetensors")
    counters = decoder.train(
        tmp_path / "out", Budget(steps=1), student=tmp_path / "student.safetensors", takes=folder, report=quiet
    )
    assert {"held-out psnr", f"held-out {decoder.GIVEN}"} <= counters.history[-1].keys()
    before, after = load_codec().state_dict(), load_codec(tmp_path / "out" / "codec.safetensors").state_dict()
    same = {name for name, x in before.items() if torch.equal(x, after[name])}
    assert {name for name in before if name.startswith(("encoder.", "conv1."))} <= same
    assert any(name.startswith("decoder.") for name in before.keys() - same)
