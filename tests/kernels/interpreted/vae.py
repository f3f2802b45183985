"""The VAE through the Triton kernels of its norms: within the pass marks of the golden cases."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import causal_conv3d as conv
from kernels import rms_norm_silu
from profiling.measure.check import poisoned_memory
from tests.parity.cases import Case, frames_first
from tests.parity.test_golden import pass_mark

GOLDEN = Path(__file__).parents[2] / "golden"
STEPS = 3  # the first, the second and a later one; the 5 of a whole case do no more
Seen = set[tuple[tuple[int, ...], int, bool]]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Seen, list[bool]]]:
    """Replaces the norm by its kernel and records what operations are given; what is not written is NaN.

    Of convolutions, which the library computes: kernel, frames before, whether there is a residual. Of norms: whether
    with SiLU. The norm's programs are few and large: the interpreter's time goes by their number.
    """
    convolved: Seen = set()
    normed: list[bool] = []
    library = conv.launch_library

    def convolve(x: Tensor, past: Tensor, weight: Tensor, bias: Any, residual: Any, *more: Any) -> Tensor:
        convolved.add((tuple(weight.shape[2:]), len(past), residual is not None))
        return library(x, past, weight, bias, residual, *more)

    def norm(x: Tensor, gamma: Tensor, silu: bool, *more: Any) -> Tensor:
        normed.append(silu)
        return rms_norm_silu.launch_rms_norm_silu(x, gamma, silu, *more, config={"PIXELS": 4096})

    monkeypatch.setattr(conv, "launch_library", convolve)
    monkeypatch.setattr(rms_norm_silu, "rms_norm_silu_op", norm)
    monkeypatch.setattr(conv, "pixel_norm_reference", norm)
    with poisoned_memory():
        yield convolved, normed


def assert_within_mark(case: Case, name: str, got: Tensor) -> None:
    """As far as the steps go."""
    difference = (got - frames_first(case[name])[: len(got)]).abs().max().item()
    mark = pass_mark(case.meta["suggested_max_abs_difference"], name)
    print(f"{name}: max |difference| {difference:.2e}, pass mark {mark:.0e}")
    assert difference <= mark


@torch.inference_mode()
def test_golden_decoding(kernels: tuple[Seen, list[bool]]) -> None:
    case = Case(GOLDEN / "vae_decode.json")
    video = torch.cat(list(case.vae().decode(frames_first(case["in.latent"])[:STEPS])))
    assert len(video) == 1 + 4 * (STEPS - 1)
    assert_within_mark(case, "out.video", video)
    assert_within_mark(case, "out.video_single_frame", video[:1])
    convolved, normed = kernels
    blocks = {((3, 3, 3), before, added) for before in (0, 2) for added in (False, True)}
    assert convolved == blocks | {((1, 1, 1), 0, False), ((3, 1, 1), 2, False)}
    assert set(normed) == {False, True}  # attention's is without SiLU


@torch.inference_mode()
def test_golden_encoding(kernels: tuple[Seen, list[bool]]) -> None:
    case = Case(GOLDEN / "vae_encode.json")
    latents = torch.cat(list(case.vae().encode(frames_first(case["in.video"])[: 1 + 4 * (STEPS - 1)])))
    assert len(latents) == STEPS
    assert_within_mark(case, "out.latent", latents)
    assert_within_mark(case, "out.latent_single_frame", latents[:1])
    convolved, normed = kernels
    blocks = {((3, 3, 3), before, added) for before in (0, 2) for added in (False, True)}
    assert convolved == blocks | {((1, 1, 1), 0, False)}
    assert set(normed) == {False, True}
