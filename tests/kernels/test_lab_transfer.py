"""Lab transfer against a float64 evaluation of the published formulas, pixel by pixel."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.lab_transfer import lab_statistics, lab_to_rgb, lab_transfer, reference, rgb_to_lab, to_bytes
from profiling.measure.check import poisoned_memory

module = importlib.import_module("kernels.lab_transfer")  # the module; `kernels.lab_transfer` is its function

WHITE = np.array([0.95047, 1.0, 1.08883])
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab_of(rgb: np.ndarray) -> np.ndarray:
    """One sRGB colour, float64 [3], in Lab."""
    linear = np.array([((u + 0.055) / 1.055) ** 2.4 if u > 0.04045 else u / 12.92 for u in rgb])
    q = np.clip(TO_XYZ @ linear / WHITE, 1e-8, 1)
    f = [v ** (1 / 3) if v > 0.008856 else (903.3 * v + 16) / 116 for v in q]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@given(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3))
def test_rgb_to_lab_and_back(colour: list[float]) -> None:
    rgb = torch.tensor(colour).view(1, 3, 1, 1)
    lab = rgb_to_lab(rgb)
    np.testing.assert_allclose(lab.flatten(), lab_of(np.array(colour)), atol=2e-3)
    torch.testing.assert_close(lab_to_rgb(lab), rgb, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((0.5, 0.5, 0.5), (53.389, 0, 0)),
        ((0.8, 0.3, 0.1), (49.680, 48.418, 52.882)),
        ((0.02, 0.9, 0.5), (80.677, -68.581, 36.937)),
    ],
)
def test_known_colours(rgb: tuple[float, ...], lab: tuple[float, ...]) -> None:
    got = rgb_to_lab(torch.tensor(rgb).view(1, 3, 1, 1)).flatten()
    np.testing.assert_allclose(got, lab, atol=1e-3)


@given(st.integers(1, 5), st.integers(2, 9), st.integers(2, 9), st.integers(0, 2**31))
def test_frames_take_the_reference_statistics(frames: int, height: int, width: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    # Mid-range colours, so that nothing is clamped at either end of the range.
    video = torch.rand(frames, 3, height, width, generator=random) * 0.2 - 0.1
    mean, std = lab_statistics(torch.rand(1, 3, 16, 16, generator=random) * 0.2 - 0.1)
    got_mean, got_std = lab_statistics(lab_transfer(video, mean, std)[0])
    torch.testing.assert_close(got_mean, mean.expand(frames, 3, 1, 1), atol=2e-2, rtol=0)
    torch.testing.assert_close(got_std, std.expand(frames, 3, 1, 1), atol=2e-2, rtol=0)


def test_frames_are_independent_and_own_statistics_change_nothing() -> None:
    video = torch.rand(3, 3, 8, 8) * 2 - 1
    mean, std = lab_statistics(torch.rand(1, 3, 8, 8) * 2 - 1)
    whole, rgb = lab_transfer(video, mean, std)
    part, part_rgb = lab_transfer(video[1:2], mean, std)
    assert torch.equal(whole[1:2], part)
    assert torch.equal(rgb[1:2], part_rgb)
    torch.testing.assert_close(lab_transfer(video[:1], *lab_statistics(video[:1]))[0], video[:1], atol=1e-4, rtol=0)


@given(st.integers(1, 3), st.integers(4, 9), st.integers(4, 9), st.integers(1, 8), st.integers(0, 2**31))
def test_rows_with_the_statistics_of_their_frames_are_the_rows_of_the_whole(frames, height, width, cut, seed):
    random = torch.Generator().manual_seed(seed)
    video = torch.rand(frames, 3, height, width, generator=random) * 2 - 1
    mean, std = lab_statistics(torch.rand(1, 3, 8, 8, generator=random) * 2 - 1)
    statistics = torch.stack(lab_statistics(video), -1)[:, :, 0, 0].contiguous()
    parts = [lab_transfer(x, mean, std, 0.7, statistics) for x in video.split(min(cut, height - 1), 2)]
    pixels, rgb = lab_transfer(video, mean, std, 0.7)
    torch.testing.assert_close(torch.cat([part for part, _ in parts], 2), pixels, atol=1e-4, rtol=0)
    assert (torch.cat([part for _, part in parts], 1).int() - rgb.int()).abs().max() <= 1


def test_one_colour_and_extremes_stay_finite() -> None:
    mean, std = lab_statistics(torch.rand(1, 3, 8, 8) * 2 - 1)
    for value in (-1.0, 0.0, 1.0):
        out, _ = lab_transfer(torch.full((1, 3, 8, 8), value), mean, std)
        assert out.isfinite().all()
        assert out.abs().max() <= 1 + 1e-6


def test_strength() -> None:
    video = torch.rand(2, 3, 8, 8) * 2 - 1
    mean, std = lab_statistics(torch.rand(1, 3, 8, 8) * 2 - 1)
    torch.testing.assert_close(lab_transfer(video, mean, std, 0)[0], video, atol=1e-6, rtol=0)
    half, full = lab_transfer(video, mean, std, 0.5)[0], lab_transfer(video, mean, std)[0]
    torch.testing.assert_close(half, (video + full) / 2)


def test_bytes_are_truncated() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    out = to_bytes(pixels)
    assert out.shape == (1, 1, 6, 3)
    assert out[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


def test_any_memory_format_and_dtype() -> None:
    video, (mean, std) = torch.rand(2, 3, 5, 6) * 2 - 1, lab_statistics(torch.rand(1, 3, 8, 8) * 2 - 1)
    for x in (video.contiguous(memory_format=torch.channels_last), video.bfloat16(), video.half()):
        out, rgb = lab_transfer(x, mean, std)
        assert out.is_contiguous()
        torch.testing.assert_close(out, lab_transfer(x.float().contiguous(), mean, std)[0])
        assert torch.equal(rgb, to_bytes(out))


def test_opcheck_and_compilation() -> None:
    video, (mean, std) = torch.rand(2, 3, 5, 6) * 2 - 1, lab_statistics(torch.rand(1, 3, 8, 8) * 2 - 1)
    torch.library.opcheck(module.lab_transfer_op.library_op, (video, mean, std, 0.5, None))
    for x, y in zip(
        torch.compile(lab_transfer, fullgraph=True, backend="aot_eager")(video, mean, std),
        lab_transfer(video, mean, std),
        strict=True,
    ):
        assert torch.equal(x, y)


STATISTICS = torch.ones(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(1, 3, 4, 4), STATISTICS, STATISTICS, 1.5), "strength: got 1.5, want 0..1"),
        ((torch.zeros(3, 4, 4), STATISTICS, STATISTICS), "pixels: shape [3, 4, 4], wanted [frames, 3, height, width]"),
        ((torch.zeros(1, 4, 4, 4), STATISTICS, STATISTICS), "pixels: shape [1, 4, 4, 4], wanted"),
        ((torch.zeros(1, 3, 4, 4).double(), STATISTICS, STATISTICS), "pixels: torch.float64"),
        ((torch.zeros(1, 3, 4, 8)[..., :4], STATISTICS, STATISTICS), "wanted a frame's rows adjacent in memory"),
        ((torch.zeros(1, 3, 4, 4), STATISTICS[0], STATISTICS), "mean: shape [3, 1, 1], wanted [1, 3, 1, 1]"),
        ((torch.zeros(1, 3, 4, 4), STATISTICS, STATISTICS.double()), "std: torch.float64, wanted torch.float32"),
        ((torch.zeros(1, 3, 4, 4), STATISTICS.to("meta"), STATISTICS), "mean: on meta, wanted cpu"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words follow)
        lab_transfer(*arguments)
    assert words in str(raised.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 5), (97, 131)])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_gpu(dtype: torch.dtype, size: tuple[int, int], strength: float) -> None:
    video = (torch.rand(3, 3, *size, device="cuda") * 2 - 1).to(dtype).contiguous(memory_format=torch.channels_last)
    mean, std = lab_statistics(torch.rand(1, 3, 8, 8, device="cuda") * 2 - 1)
    with poisoned_memory():
        out, rgb = lab_transfer(video, mean, std, strength)
    torch.testing.assert_close(out, reference(video, mean, std, strength), atol=2e-4, rtol=0)
    assert (rgb.int() - to_bytes(out).int()).abs().max() <= 1  # another order of multiplication
