"""The VAE through the Triton kernels of its norms: within the pass marks of the golden cases."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model.vae
from kernels.rms_norm_silu import launch_rms_norm_silu
from tests.parity.cases import Case, frames_first
from tests.parity.test_golden import pass_mark

conv = importlib.import_module("kernels.causal_conv3d")  # the module; `kernels.causal_conv3d` is its function

GOLDEN = Path(__file__).parents[2] / "golden"
STEPS = 3  # the first, the second and a later one; the 5 of a whole case do no more
Convolutions = set[tuple[tuple[int, ...], int, bool]]  # kernel, past frames, whether there is a residual


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> tuple[Convolutions, list[bool]]:
    """Replaces the norm by its kernel, and records the convolutions, and of each norm whether SiLU follows.

    The library computes the convolutions. The norm is launched as a few large
    programs, because the interpreter's time grows with their number.
    """
    convolved: Convolutions = set()
    normed: list[bool] = []
    library = conv.launch_library

    def convolve(x: Tensor, weight: Tensor, bias: Any, past: Tensor, residual: Any, *more: Any) -> Tensor:
        convolved.add((tuple(weight.shape[2:]), len(past), residual is not None))
        return library(x, weight, bias, past, residual, *more)

    def norm(x: Tensor, gamma: Tensor, silu: bool = True, *more: Any) -> Tensor:
        normed.append(silu)
        return launch_rms_norm_silu(x, gamma, silu, *more, config={"PIXELS": 4096})

    monkeypatch.setattr(conv, "launch_library", convolve)  # which causal_conv3d_norm calls
    monkeypatch.setattr(conv.causal_conv3d_op, "library_op", convolve)
    monkeypatch.setattr(model.vae, "rms_norm_silu", norm)
    monkeypatch.setattr(conv, "rms_norm_silu_reference", norm)
    return convolved, normed


def assert_within_mark(case: Case, name: str, got: Tensor) -> None:
    """Compares the frames that the steps made."""
    difference = (got - frames_first(case[name])[: len(got)]).abs().max().item()
    mark = pass_mark(case.meta["suggested_max_abs_difference"], name)
    print(f"{name}: max |difference| {difference:.2e}, pass mark {mark:.0e}")
    assert difference <= mark


@torch.inference_mode()
def test_golden_decoding(kernels: tuple[Convolutions, list[bool]]) -> None:
    case = Case(GOLDEN / "vae_decode.json")
    video = torch.cat(list(case.vae().decode(frames_first(case["in.latent"])[:STEPS])))
    assert len(video) == 1 + 4 * (STEPS - 1)
    assert_within_mark(case, "out.video", video)
    assert_within_mark(case, "out.video_single_frame", video[:1])
    convolved, normed = kernels
    blocks = {((3, 3, 3), past_frames, added) for past_frames in (0, 2) for added in (False, True)}
    assert convolved == blocks | {((1, 1, 1), 0, False), ((3, 1, 1), 2, False)}
    assert set(normed) == {False, True}  # attention's is without SiLU


@torch.inference_mode()
def test_golden_encoding(kernels: tuple[Convolutions, list[bool]]) -> None:
    case = Case(GOLDEN / "vae_encode.json")
    latents = torch.cat(list(case.vae().encode(frames_first(case["in.video"])[: 1 + 4 * (STEPS - 1)])))
    assert len(latents) == STEPS
    assert_within_mark(case, "out.latent", latents)
    assert_within_mark(case, "out.latent_single_frame", latents[:1])
    convolved, normed = kernels
    blocks = {((3, 3, 3), past_frames, added) for past_frames in (0, 2) for added in (False, True)}
    assert convolved == blocks | {((1, 1, 1), 0, False)}
    assert set(normed) == {False, True}
