"""When a chunk's audio projections are absorbed once: by count of bytes, on a GPU and on a CPU."""

from dataclasses import replace

import pytest
import torch

from model.config import FLASHTALK_14B, PRECISIONS, TINY, TINY_RANDOM
from model.weights.checkpoint import Models, random_models
from profiling.analyse.recipe import meta_models
from streaming import absorption
from streaming.absorption import absorbs_once, fits, visitor_bytes, work_bytes

GB, GIB = 10**9, 2**30
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def large() -> Models:
    """The 14B student without weights, with the small encoders."""
    return meta_models(FLASHTALK_14B, "fp8")


def test_bytes_of_14b(large: Models) -> None:
    """G and U of 40 blocks, 9 frames and 40 x 32 keys in bfloat16; a shorter share of the frames takes less."""
    frames = FLASHTALK_14B.grid[0]
    assert large.dit.absorbed_bytes(frames, 1344) == 40 * 9 * 1280 * (2 * 5120 * 2 + 4)
    assert round(large.dit.absorbed_bytes(frames, 1344) / GB, 1) == 9.4
    assert large.dit.absorbed_bytes(3, 1344) * 3 == large.dit.absorbed_bytes(frames, 1344)
    assert round(work_bytes(FLASHTALK_14B.chunk) / GIB, 1) == 4.2
    assert round(visitor_bytes(large) / GIB, 1) == 10.6


@pytest.mark.parametrize(
    ("card", "used", "once"),
    [(24, 15.2, False), (32, 15.2, False), (48, 15.2, False), (80, 15.2, True), (80, 28, True), (80, 60, False)],
)
def test_cards(large: Models, card: int, used: float, once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many GiB, of which weights, keys and values take some."""
    monkeypatch.setattr(absorption, "free_bytes", lambda _: int((0.95 * card - used) * GIB))
    models = replace(large, device=torch.device("cuda"))
    assert absorbs_once(models, FLASHTALK_14B.grid[0]) is once


def test_the_count() -> None:
    assert fits(absorbed=10, work=5, visitor=3, free=28)
    assert not fits(absorbed=10, work=5, visitor=3, free=27)


def test_on_a_cpu_only_what_is_small(large: Models) -> None:
    assert absorbs_once(random_models(TINY_RANDOM, CPU, PRECISIONS["fp32"]), TINY_RANDOM.grid[0])
    assert absorbs_once(random_models(TINY, CPU, PRECISIONS["fp32"]), TINY.grid[0])
    assert not absorbs_once(replace(large, device=CPU), FLASHTALK_14B.grid[0])
    assert not absorbs_once(large, FLASHTALK_14B.grid[0])  # on no device


@pytest.mark.gpu
def test_gpu_memory_that_is_held_is_free() -> None:
    device = torch.device("cuda", 0)
    before = absorption.free_bytes(device)
    x = torch.empty(GB, dtype=torch.uint8, device=device)
    assert before - absorption.free_bytes(device) >= 0.9 * GB
    del x
    assert absorption.free_bytes(device) >= before - 0.1 * GB
