"""Distillation by distribution matching: it resumes to the same bits, its arms differ, and replicas stay equal."""

import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from model.distill import dmd, instruments
from model.distill.matching import TINY_RECIPE, Recipe
from model.distill.student_network import load_network, new_student, save_network
from model.distill.takes import load_takes
from model.distill.teacher import Codec
from model.distill.training import Budget
from model.distill.training import train as run_training
from model.parallel.ranks import Ranks
from tests.model.distill.conditions import quiet, random_take
from tests.model.distill.test_teacher import SMALL
from tests.model.distill.test_training import line_task
from tests.ranks import RankPool, rank_pool

RECIPE = dataclasses.replace(TINY_RECIPE, batch=1, critic_steps=2, evaluate_every=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes of noise and a teacher of noise."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dmd")
    for name, seed in (("0000-00000", 0), ("0000-00001", 1), ("0000-00000-held-out", 2)):
        np.savez(path / f"{name}.npz", **vars(random_take(seed)))
    save_network(new_student(SMALL), path / "teacher.safetensors")
    return path


@pytest.fixture(scope="module")
def pool(python) -> Iterator[RankPool]:
    with rank_pool(python) as processes:
        yield processes


class Blind:
    """Instruments that measure nothing, as that takes longer than the training here."""

    def __init__(self, *_: object) -> None:
        pass

    def measure(self, *_: object) -> dict[str, float]:
        return {}


def train(folder: Path, out: Path, steps: int, recipe: Recipe = RECIPE, resume: bool = False) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmd, "Instruments", Blind)
        teacher = folder / "teacher.safetensors"
        counters = dmd.train(out, Budget(steps=steps), 3, resume, teacher, takes=folder, recipe=recipe, report=quiet)
    return counters.history[-1]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An undisturbed distillation."""
    train(folder, folder / "whole", 5)
    return folder / "whole"


def differ(one: Path, other: Path) -> bool:
    first, second = (load_network(path).state_dict() for path in (one, other))
    return any(not torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_resumed_distillation_ends_with_the_same_bits(folder, whole, tmp_path, monkeypatch):
    genuine, calls = dmd.critic_loss, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:  # in mid-stream, between two updates of the student
            signal.raise_signal(signal.SIGTERM)
        return genuine(*args)

    with monkeypatch.context() as patch:
        patch.setattr(dmd, "critic_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(folder, tmp_path, 5)
    train(folder, tmp_path, 5, resume=True)
    assert not differ(whole / dmd.WEIGHTS, tmp_path / dmd.WEIGHTS)
    assert differ(whole / dmd.WEIGHTS, folder / "teacher.safetensors")


@pytest.mark.parametrize("arm", [{"own_motion": False}, {"chunks": 1}, {"causal": True}], ids=str)
def test_the_arms_of_the_ablation_differ(folder, whole, tmp_path, arm):
    train(folder, tmp_path, 5, dataclasses.replace(RECIPE, **arm))
    assert differ(whole / dmd.WEIGHTS, tmp_path / dmd.WEIGHTS)


def _replica(_: Ranks, folder: Path, out: Path) -> float:
    """The last loss. Runs in a rank's process."""
    return train(folder, out, 1)["loss"]


def test_replicas_stay_equal_and_see_more_than_one_does(folder, tmp_path, pool: RankPool):
    losses = pool.run(4, 1, _replica, folder, tmp_path / "replicas")
    assert len(set(losses)) == 1
    assert train(folder, tmp_path / "alone", 1)["loss"] != losses[0]
    assert load_network(tmp_path / "replicas" / dmd.WEIGHTS).config == SMALL


def _write_line(ranks: Ranks, folder: Path) -> None:
    """A training that leaves a file of this rank's. Runs in a rank's process."""
    task = dataclasses.replace(line_task(), write=lambda _: (folder / f"written by {ranks.rank}").touch())
    run_training(task, folder, Budget(steps=2), report=quiet)


def test_only_the_first_replica_writes_the_result(tmp_path, pool: RankPool):
    pool.run(4, 1, _write_line, tmp_path)
    assert [path.name for path in tmp_path.glob("written by *")] == ["written by 0"]


def test_instruments_measure_the_same_twice(folder):
    takes = load_takes(folder, held_out=True)
    network = load_network(folder / "teacher.safetensors")
    tool = instruments.Instruments(takes, Codec.load(), RECIPE)
    first, second = (tool.measure(network, network, network) for _ in range(2))
    assert first == second
    assert {"r open", "closed lids", "sway", "sharpness", "seam", "cosine of g at 1", "critic at 0.4"} <= first.keys()
