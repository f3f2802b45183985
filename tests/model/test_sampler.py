"""Timesteps, counter-based noise and the re-noising loop."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.sampler import TorchNoise, denoise_step, first_latents, normal_noise, philox, timesteps


def test_timesteps_are_even_before_the_shift() -> None:
    assert timesteps(4, 5).tolist() == [1000, 937.5, 833.33331298828125, 625, 0]
    assert timesteps(2, 5)[:2].tolist() == [1000, pytest.approx(5000 / 6)]
    assert timesteps(1, 5).tolist() == [1000, 0]
    assert timesteps(3, 1).tolist() == pytest.approx([1000, 2000 / 3, 1000 / 3, 0], abs=1e-4)


@given(st.integers(1, 50), st.floats(1, 10))
def test_timesteps_decrease_from_1000_to_0(steps: int, shift: float) -> None:
    times = timesteps(steps, shift)
    assert times.dtype == torch.float32
    assert times[0].item() == pytest.approx(1000)
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    level = times / 1000
    assert (level / (shift - (shift - 1) * level)).diff().tolist() == pytest.approx([-1 / steps] * steps, abs=1e-5)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    """The published test vectors of Random123's philox4x32-10."""
    assert tuple(w.item() for w in philox(tuple(torch.tensor([c]) for c in counter), key)) == words


def test_noise_is_standard_normal() -> None:
    x = normal_noise((9, 16, 96, 56), seed=1, chunk=2, step=3, device="cpu").double()
    n = x.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / n)
    # Four neighbours come from one counter and two from one pair, so check that neighbours are uncorrelated.
    flat = x.flatten()
    for lag in (1, 2, 3, 4):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / math.sqrt(n)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 100), st.integers(1, 50))
def test_noise_is_a_function_of_its_position(seed: int, chunk: int, step: int, count: int) -> None:
    """Finite, repeatable, and independent of how many values follow."""
    x = normal_noise((count,), seed, chunk, step, "cpu")
    assert x.isfinite().all()
    assert torch.equal(x, normal_noise((count,), torch.tensor(seed), torch.tensor(chunk), step, "cpu"))
    assert torch.equal(x, normal_noise((count + 7,), seed, chunk, step, "cpu")[:count])
    for other in ((seed ^ 1, chunk, step), (seed, chunk ^ 1, step), (seed, chunk, step + 1)):
        assert not torch.equal(x, normal_noise((count,), *other, "cpu"))


@given(st.integers(1, 6), st.integers(0, 2))
def test_a_perfect_student_recovers_the_data(steps: int, motion_frames: int) -> None:
    """With v = (x - data) / sigma, every step's clean estimate is the data, whatever noise was added."""
    data = torch.randn(3, 16, 4, 4)
    motion = data[:motion_frames]
    times = timesteps(steps, 5)

    drawn = []

    def noise(k: int) -> torch.Tensor:
        drawn.append(k)
        return torch.randn(3, 16, 4, 4)

    x = first_latents(noise, motion)
    for i in range(steps):
        assert torch.equal(x[:motion_frames], motion)
        x = denoise_step(i, x, lambda x: (x - data) / (times[i] / 1000), noise, times, motion)  # noqa: B023
    torch.testing.assert_close(x, data, atol=1e-5, rtol=0)
    assert drawn == list(range(steps))  # none for the last step, where it has no weight


def test_torch_noise_is_what_the_published_loop_draws() -> None:
    """Per chunk one draw in bfloat16 and one per step in float32, channels first, from one generator."""
    shape, steps = (3, 16, 4, 6), 4
    generator = torch.Generator().manual_seed(11)
    wanted = []
    for _ in range(2):
        wanted.append(torch.randn(16, 3, 4, 6, dtype=torch.bfloat16, generator=generator).float())
        wanted += [torch.randn(16, 3, 4, 6, generator=generator) for _ in range(steps)]
    noise = TorchNoise(shape, steps, torch.device("cpu"))
    order = [(chunk, draw) for chunk in range(2) for draw in range(steps)]  # the last step's noise is not asked for
    for chunk, draw in [*order, (0, 2), (1, 0), (0, 4)]:  # also back in time
        got = noise(11, chunk, draw)
        assert got.shape == shape
        assert torch.equal(got.transpose(0, 1), wanted[chunk * (steps + 1) + draw])
    assert not torch.equal(noise(12, 0, 0), noise(11, 0, 0))
