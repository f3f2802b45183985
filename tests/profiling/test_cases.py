"""The registry: its counts against a counter of another make and the published figures, its names, its selection."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import FLASHTALK_14B
from model.errors import UserError
from profiling.cases import Case, registry, select
from profiling.cases.shapes import tile_grid

CASES = registry()
TINY = [case for case in CASES.values() if "tiny-w1" in case.name]
# In norm_attention an exchange comes in between; the whole VAE is one GPU's; its tiles attend to themselves; a rank
# absorbs audio projections for all frames that it has tokens of.
UNSHARED = ("norm_attention", "vae_", "chunk_attention", "absorb_audio_projections")
COUNTED = ("chunk_attention", "text_image_attention", "linear", "norm_linear", "linear_residual", "causal_conv3d")


def test_both_presets_at_every_world_size() -> None:
    worlds = {(case.shape.name.split("-")[0], case.shape.world) for case in CASES.values()}
    assert worlds == {("tiny", 1), ("tiny", 2), ("14b", 1), ("14b", 2), ("14b", 4), ("14b", 8)}


@pytest.mark.parametrize(
    "case",
    [c for c in TINY if c.operation.name in COUNTED and c.dtype == "fp32" and "-prompt" not in c.name],
    ids=lambda c: c.name,
)
def test_flops_are_those_that_torch_counts(case: Case) -> None:
    inputs = case.inputs(torch.device("cpu"), torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        case.operation.reference(*inputs)
    assert counter.get_total_flops() == case.flops


def test_flops_are_the_published_ones() -> None:
    published = {  # GFLOP of one layer, at 768 x 448 and 33 frames
        "chunk_attention/14b-w1/bf16": 2996.5,
        "text_image_attention/14b-w1/bf16": 126.8 + 63.7,
        "frame_attention/14b-w1/bf16": 7.9,
        "linear/14b-w1-out/bf16": 634.2,
        "linear/14b-w1-qkv/fp8": 3 * 634.2,
        "linear/14b-w1-up/bf16": 1712.3,
        "linear/14b-w1-down/bf16": 1712.3,
        "vae_decode/14b-w1/bf16": 3742.5 + 2 * 11666.7,  # of the first latent and two others, 97,076 with eight
        "vae_encode/14b-w1/bf16": 9264.4,
    }
    for name, want in published.items():
        assert CASES[name].flops / 1e9 == pytest.approx(want, rel=5e-3), name


def test_a_chunk_of_calls_makes_up_the_published_total() -> None:
    """1,991 TFLOP without the constant context projections (13.6) and what is saved: by the up-sampling (4.5), and by
    taking the padding of a prompt of 20 tokens for one key (19.5)."""
    total = sum(c.flops * c.shape.calls for c in CASES.values() if "14b-w1" in c.name and c.dtype in ("bf16", "fp32"))
    assert total / 1e12 == pytest.approx(1991.2 - 13.6 - 4.5 - 19.5, rel=0.005)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_work_of_one_gpu(world: int) -> None:
    for case in CASES.values():
        if "14b-w1" in case.name and not case.operation.name.startswith(UNSHARED):
            name = case.name.replace("w1", f"w{world}")
            rank = CASES[name]
            assert rank.flops * world == pytest.approx(case.flops, rel=1e-9), name
            assert rank.shape.calls == case.shape.calls


def test_bytes_by_hand() -> None:
    rows, inputs, outputs = 12096, 5120, 13824
    assert CASES["linear/14b-w1-up/bf16"].bytes == 2 * (rows * inputs + inputs * outputs + rows * outputs)
    assert CASES["linear/14b-w1-up/fp8"].bytes == rows * inputs + inputs * outputs + 2 * rows * outputs
    assert CASES["chunk_attention/14b-w1/bf16"].bytes == 2 * 4 * rows * inputs
    assert CASES["causal_conv3d/14b-w1-level3/bf16"].bytes == 2 * (768 * 448 * 96 * (6 + 4) + 27 * 96 * 96)
    latents, frames = 96 * 56 * 16, 768 * 448 * 3
    assert CASES["vae_decode/14b-w1/bf16"].bytes == 2 * (73295603 + 3 * latents + 9 * frames)
    assert CASES["vae_encode/14b-w1/bf16"].bytes == 2 * (53596928 + 2 * latents + 5 * frames)


@pytest.mark.parametrize(("world", "grid"), [(1, (1, 1)), (2, (2, 1)), (4, (2, 2)), (8, (4, 2)), (7, (1, 7))])
def test_tiles_are_as_square_as_can_be(world: int, grid: tuple[int, int]) -> None:
    assert tile_grid(world, 96, 56) == grid


def test_tiles_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="5 GPUs cannot split 96 x 56"):
        tile_grid(5, 96, 56)


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_inputs_are_random_finite_and_repeatable(case: Case) -> None:
    def draw(seed: int) -> list[torch.Tensor]:
        inputs = case.inputs(torch.device("cpu"), torch.Generator().manual_seed(seed))
        return [x for x in inputs if isinstance(x, torch.Tensor)]

    one, same, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(x.isfinite().all() and (x == 0).float().mean() < 0.01 for x in one)


def test_selection_by_pattern_and_part() -> None:
    names = [case.name for case in select(CASES, ["chunk_attention/14b-w[18]/bf16", "rms_norm_rope/tiny-w1"])]
    assert names == ["chunk_attention/14b-w1/bf16", "chunk_attention/14b-w8/bf16", "rms_norm_rope/tiny-w1/fp32"]


def test_a_part_of_a_name_means_the_devices_cases_and_a_whole_name_itself() -> None:
    def named(pattern: str) -> set[str]:
        return {case.name for case in select(CASES, [pattern], ["*/tiny-w1*"])}

    assert named("frame_attention") == {"frame_attention/tiny-w1/fp32"}
    assert named("frame_attention/14b-w8/bf16") == {"frame_attention/14b-w8/bf16"}
    assert named("14b-w8-ring") == {"chunk_attention/14b-w8-ring/bf16", "chunk_attention/14b-w8-ring/fp8"}
    assert len(named("frame_attention/*")) == 6


def test_an_unknown_case_is_met_with_near_ones() -> None:
    with pytest.raises(UserError, match=r"chunk_atention.*nearest: chunk_attention"):
        select(CASES, ["chunk_atention/14b-w1/bf16"])


@pytest.mark.parametrize("text", ["CASES = [", "x = 1", "raise SystemError('no')"])
def test_a_cases_file_that_gives_none_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError, match=r"mine\.py gives no CASES"):
        registry(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("CASES = [toy.CASES[0], toy.CASES[0]]", "two cases are called toy_good/toy/fp32"),
        ("CASES = [toy.case('t', toy.PEER, toy.PEER)]", "t/toy/fp32 has two back-ends called peer"),
        ("CASES = ['toy']", "CASES holds 'toy', wanted profiling.cases.Case"),
        ("from profiling.cases import registry; CASES = list(registry().values())[:1]", "the registry has a "),
    ],
)
def test_names_that_come_twice_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"from tests.profiling import toy\n{text}")
    with pytest.raises(UserError, match=words):
        registry(file)


def test_shapes_come_from_the_configuration() -> None:
    tokens = math.prod(FLASHTALK_14B.grid)
    assert CASES["chunk_attention/14b-w8/bf16"].shape.dims["keys"] == tokens
    assert CASES["chunk_attention/14b-w8-ring/bf16"].shape.dims["queries"] == tokens // 8
    assert CASES["frame_attention/14b-w8/bf16"].shape.dims["queries"] == 1512


def test_what_a_back_end_lacks() -> None:
    """Gluon is for Hopper, our FP8 for GPUs with e4m3; peers find out for themselves."""
    eight, sixteen = registry()["linear/14b-w1-out/fp8"], registry()["linear/14b-w1-out/bf16"]
    of = {(case.dtype, b.name): (case, b) for case in (eight, sixteen) for b in case.backends}

    def lacks(dtype: str, name: str, kind: str, capability: str | None) -> str:
        case, backend = of[dtype, name]
        return case.lacks(backend, kind, capability)

    assert lacks("bf16", "triton", "cuda", "8.0") == lacks("bf16", "gluon", "cuda", "9.0") == ""
    assert lacks("bf16", "gluon", "cuda", "8.9") == "not for compute capability 8.9"
    assert lacks("bf16", "gluon", "cuda", "10.0") == "not for compute capability 10.0"
    assert lacks("fp8", "triton", "cuda", "8.6") == "not for compute capability 8.6"
    assert lacks("fp8", "triton", "cuda", "8.9") == lacks("fp8", "scaled-mm-row", "cuda", "8.0") == ""
    assert lacks("fp8", "triton", "cpu", None) == "not for cpu"
