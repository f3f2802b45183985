"""Long streams: they follow what was generated, disturbances come once, and the ablation compares rightly."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from model.distill import ablation, endurance
from model.distill.ablation import ARMS, Lengths
from model.distill.codec import as_bytes
from model.distill.codec_network import decode_clips
from model.distill.endurance import DISTURBANCES, DISTURBED, Endurance, endure
from model.distill.rollout import Conditions
from model.distill.student_network import new_student, save_network
from model.distill.teacher import Codec
from model.errors import UserError
from tests.model.distill.conditions import quiet, random_take
from tests.model.distill.test_teacher import SMALL


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load()


def holding(_: object, given: Conditions, *__: object, **___: object) -> tuple[Tensor, None]:
    """A student that keeps the last of its motion latents."""
    return given.motion[:, -1:].expand(-1, 9, -1, -1, -1).clone(), None


def test_a_disturbance_comes_once_and_stays_in_a_student_that_holds(codec, monkeypatch):
    monkeypatch.setattr(endurance, "sampled", holding)
    monkeypatch.setattr(endurance, "DISTURBED", 2)
    takes, dit, chunks = [random_take(i) for i in range(3)], new_student(SMALL), 5
    calm, film = endure(dit, takes, codec, 2, chunks, filmed=(0, chunks - 1), report=quiet)
    red, red_film = endure(dit, takes, codec, 2, chunks, "red", filmed=(chunks - 1,), report=quiet)
    for stream in range(2):
        assert calm.identity[stream][:3] == red.identity[stream][:3]
        assert red.identity[stream][-1] > calm.identity[stream][-1] + 2
        # What is heard goes on, from one take to the next: of each the first chunk, then the second.
        for chunk in (0, 1, 2, 4):
            said = takes[(stream + chunk // 2) % 3].chunk(7 * (chunk % 2)).mouths[0, -17:, 0]
            np.testing.assert_allclose(calm.truth[stream][chunk], said)
    assert film.keys() == {0, chunks - 1}
    assert film[0].shape == (2, 128, 128, 3)
    more_red = red_film[chunks - 1].astype(int) - film[chunks - 1]
    assert more_red[..., 0].mean() > 10
    portrait = as_bytes(decode_clips(codec.vae, takes[0].chunk(0).portraits[:, :, None]))[0]
    assert np.abs(film[0][0].astype(int) - portrait).mean() < 25  # it began with the portrait


@pytest.mark.parametrize("name", DISTURBANCES)
def test_disturbances_are_what_they_say(name):
    frames = torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    found = DISTURBANCES[name](frames)
    assert found.shape == frames.shape
    if name == "red":
        torch.testing.assert_close(found[:, 0], frames[:, 0] + 0.2)
        assert torch.equal(found[:, 1:], frames[:, 1:])
    elif name == "blur":
        torch.testing.assert_close(found[0, 1, 2, 10, 10], frames[0, 1, 2, 8:13, 8:13].mean())
    else:
        assert (found - frames).std().item() == pytest.approx(0.3, rel=0.05)
        assert torch.equal(found, DISTURBANCES[name](frames))


def streams(first: float, last: float, chunks: int = 40) -> list[list[float]]:
    return [np.linspace(first, last * (1 + i / 100), chunks).tolist() for i in range(3)]


def seen(first: float, last: float, chunks: int = 40) -> Endurance:
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=(3, chunks, 17))
    opening = truth + rng.normal(size=truth.shape) * 0.1
    return Endurance(streams(first, last, chunks), streams(0.9, 0.8, chunks), opening.tolist(), truth.tolist())


def test_recovery_counts_chunks_until_the_distance_is_as_without_the_disturbance():
    whole = seen(2.0, 2.0)
    for late, expected in ((0, 0), (1, 1), (4, 4), (15, None)):
        identity = np.array(whole.identity)[:, : DISTURBED + 16]
        identity[:, DISTURBED + 1 : DISTURBED + 1 + late] *= 1.2
        assert ablation.recovery(whole, Endurance(identity.tolist(), [], [], [])) == expected


def test_what_was_measured_is_written_to_the_documents(tmp_path):
    for arm, last in (("start", 4.0), ("true motion", 8.0), ("5 chunks", 2.2)):
        (tmp_path / arm).mkdir()
        seen(2.0, last).save(tmp_path / arm / "undisturbed.json")
        for name in DISTURBANCES:
            seen(2.0, last, 26).save(tmp_path / arm / f"{name}.json")
    ablation.write(tmp_path, tmp_path / "docs", Lengths(steps=100, chunks=40, streams=3, end=10))
    rows = {row["arm"]: row for row in json.loads((tmp_path / "docs" / "ablation.json").read_text())}
    assert list(rows) == ["start", "true motion", "5 chunks"]
    value, low, high = rows["true motion"]["drift"]
    assert 2 < low <= value <= high < 4
    assert rows["5 chunks"]["drift"][0] == pytest.approx(1.1, abs=0.05)
    assert rows["5 chunks"]["lips"][0][0] == pytest.approx(0.94, abs=0.03)
    table = (tmp_path / "docs" / "ablation.md").read_text()
    assert table.count("\n| ") == 4
    assert "20 updates" in table
    assert (tmp_path / "docs" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "start" / "red.json").write_text("[]")
    with pytest.raises(UserError, match=r"red\.json: not what `endurance` writes"):
        ablation.row(tmp_path, "start", 10)


def test_the_ablation_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    calls: list[str] = []
    takes = tmp_path / "takes"
    takes.mkdir()
    np.savez(takes / "0-held-out.npz", **vars(random_take(0)))
    start = tmp_path / "start.safetensors"
    save_network(new_student(SMALL), start)

    def train(folder, budget, seed, resume, teacher, begin, takes, recipe, report):
        calls.append(folder.name)
        assert recipe == ARMS[folder.name]
        folder.mkdir(parents=True)
        save_network(new_student(SMALL), folder / "student.safetensors")

    def play(student, takes, codec, streams, chunks, disturbance, causal, filmed, *_):
        calls.append(f"{disturbance} {chunks} {causal}")
        return seen(1, 1, chunks), {chunk: np.zeros((2, 128, 128, 3), np.uint8) for chunk in filmed}

    monkeypatch.setattr(ablation.dmd, "train", train)
    monkeypatch.setattr(ablation, "endure", play)
    arguments = (tmp_path / "out", takes, tmp_path / "teacher.safetensors", start, Lengths(steps=5, chunks=40, end=10))
    ablation.run(*arguments, arms=("true motion", "5 chunks, causal"), report=quiet)
    assert calls[:3] == ["true motion", "5 chunks, causal", " 40 False"]
    assert calls[-4:] == [" 40 True", "red 26 True", "blur 26 True", "noise 26 True"]
    assert len(calls) == 2 + 3 * 4
    (tmp_path / "out" / "true motion" / "blur.json").unlink()
    calls.clear()
    ablation.run(*arguments, arms=("true motion", "5 chunks, causal"), report=quiet)
    assert calls == ["blur 26 False"]
