"""Random tensors, and how far a result is from the expected one."""

import torch
from torch import Tensor


def draw(
    *shapes: tuple[int, ...], seed: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """A normally distributed tensor of each shape: the same ones for the same seed."""
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def error(x: Tensor, expected: Tensor) -> float:
    """The relative Frobenius error, computed in float64: zero where both are zero."""
    x, expected = x.double(), expected.double()
    return ((x - expected).norm() / expected.norm().clamp_min(1e-30)).item()
