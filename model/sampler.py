"""Few-step sampling with re-noising: timesteps, update rule, counter-based noise.

Sampling starts from noise x at timestep t_0, calls the student at t_0 > t_1 > ... > t_(n-1), and ends at t_n = 0. With
sigma_i = t_i / 1000 and the predicted velocity v (noise minus data), one step is

    clean = x - sigma_i v
    x     = (1 - sigma_(i+1)) clean + sigma_(i+1) noise_(i+1)          with fresh noise

The motion latents at the beginning of a chunk are known. They are written into x, without noise, before the first step
and after every step.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


def timesteps(steps: int, shift: float) -> Tensor:
    """The shifted timesteps t_0 = 1000 .. t_steps = 0, float32 [steps + 1], evenly spread before the shift.

    For 2 and 4 steps these are the timesteps that the student was distilled at. For other numbers the published code
    spreads from 1000 down to 1, where the last step changes next to nothing; here every step counts.
    """
    return shifted(torch.linspace(1, 0, steps + 1), shift) * NUM_TIMESTEPS


def shifted(u: Tensor, shift: float) -> Tensor:
    """The noise levels shift u / (1 + (shift - 1) u) of the levels u in 0..1; above 1, a shift raises them."""
    return shift * u / (1 + (shift - 1) * u)


def first_latents(noise: Callable[[int], Tensor], motion: Tensor) -> Tensor:
    """The latents before the first step, float32 [F, 16, h, w]. The first n frames are `motion` [n, 16, h, w].

    `noise` maps k to standard normal noise [F, 16, h, w]: k = 0 is the noise at the start, k = i + 1 the noise of step
    i.
    """
    return torch.cat((motion.float(), noise(0)[len(motion) :]))


def denoise_step(
    i: int,
    x: Tensor,
    velocity: Callable[[Tensor], Tensor],
    noise: Callable[[int], Tensor],
    times: Tensor,
    motion: Tensor,
) -> Tensor:
    """The latents after step i, float32 [F, 16, h, w].

    Args:
        i: index of the step.
        x: the latents before the step, float32 [F, 16, h, w].
        velocity: the student's prediction at this step, from x to [F, 16, h, w].
        noise: maps k to standard normal noise [F, 16, h, w]; step i uses k = i + 1.
        times: from `timesteps`, on the CPU.
        motion: the motion latents [n, 16, h, w] at the beginning of the chunk.
    """
    sigma, following = (times[i : i + 2] / NUM_TIMESTEPS).tolist()
    x = (1 - following) * (x - sigma * velocity(x))
    if following > 0:  # the last step's noise has weight 0; counter-based noise need not be drawn in turn
        x += following * noise(i + 1)
    x[: len(motion)] = motion
    return x


def normal_noise(
    shape: tuple[int, ...], seed: int | Tensor, chunk: int | Tensor, step: int, device: torch.device | str
) -> Tensor:
    """Standard normal noise, float32: a pure function of seed, chunk, step and the position in `shape`.

    The value at flat position 4 p + lane comes from Philox4x32-10 with the counter (p, step, chunk, 0) and the 64-bit
    key `seed`. So there is no generator state to store, to restore or to split between ranks. Pairs of the 32-bit words
    become normal numbers by the Box-Muller transform in float64: sqrt(-2 ln u) (cos, sin)(2 pi w), u in (0, 1]. `seed`
    and `chunk` may be int64 tensors [] on the device.
    """
    count = math.prod(shape)
    position = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    counter = (position, *(torch.zeros_like(position) + word for word in (step, chunk, 0)))
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    u = torch.stack(words, dim=-1).double().unflatten(-1, (2, 2))  # [counter, pair, (radius, angle)]
    radius = (-2 * ((u[..., 0] + 1) / 2**32).log()).sqrt()
    angle = 2 * math.pi / 2**32 * u[..., 1]
    normals = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return normals.float().flatten()[:count].view(shape)


class TorchNoise:
    """The noise that the published code draws for a seed, by PyTorch's own generator of the device.

    Each chunk draws [16, F, h, w] once in bfloat16 for the start and once in float32 for every step, also for the last
    one, where the noise is not used. The generator is seeded once, so the noise of a chunk follows from all draws
    before it: to go back, they are drawn again. Values differ between kinds of devices.
    """

    def __init__(self, shape: tuple[int, int, int, int], steps: int, device: torch.device) -> None:
        """`shape` is that of the latents, [F, 16, h, w]."""
        frames, channels, *plane = shape
        self._shape, self._draws, self._device = (channels, frames, *plane), steps + 1, device
        self._seed: int | None = None
        self._done = 0  # draws since the generator was seeded

    def __call__(self, seed: int | Tensor, chunk: int | Tensor, draw: int) -> Tensor:
        """Standard normal noise, float32 [F, 16, h, w]: draw 0 is the start, draw i + 1 belongs to step i."""
        seed, wanted = int(seed), int(chunk) * self._draws + draw
        if seed != self._seed or wanted < self._done:
            self._generator = torch.Generator(self._device).manual_seed(seed)
            self._seed, self._done = seed, 0
        while True:
            dtype = torch.float32 if self._done % self._draws else torch.bfloat16
            noise = torch.randn(self._shape, generator=self._generator, dtype=dtype, device=self._device)
            self._done += 1
            if self._done > wanted:
                return noise.float().transpose(0, 1)


def philox(
    counter: tuple[Tensor, ...], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): four 32-bit counter words -> four random words, int64 in 0 .. 2^32 - 1.

    The 64-bit product of two words may overflow int64; its bits, and so its two halves, are still exact.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((high >> 32) & mask) ^ c1 ^ k0, ((low >> 32) & mask) ^ c3 ^ k1
        c1, c3 = high & mask, low & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3
