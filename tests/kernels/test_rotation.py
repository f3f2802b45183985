"""The Hadamard rotation of blocks of columns, compared with the matrix by its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.rotation import MAX_BLOCK, rotate, rotation_block
from tests.tensors import draw, error


def hadamard(size: int) -> torch.Tensor:
    """H[i, j] = (-1)^popcount(i & j), divided by the root of its size, in float64."""
    return (
        torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]).double() / size**0.5
    )


@pytest.mark.parametrize(
    ("columns", "block"), [(1, 1), (3, 1), (16, 16), (96, 32), (128, 128), (320, 64), (5120, 128), (13824, 128)]
)
def test_blocks_divide_the_columns(columns: int, block: int) -> None:
    assert rotation_block(columns) == block <= MAX_BLOCK


@pytest.mark.parametrize("columns", [1, 3, 16, 96, 256, 640])
def test_equals_the_matrix(columns: int) -> None:
    (x,) = draw((5, columns), seed=columns)
    size = rotation_block(columns)
    expected = (x.double().unflatten(1, (-1, size)) @ hadamard(size)).flatten(1)
    assert error(rotate(x), expected) < 1e-6
    assert rotate(x.double()).dtype == torch.float64


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 200), st.integers(1, 6), st.integers(0, 99))
def test_products_do_not_change(m: int, k: int, n: int, seed: int) -> None:
    x, w = (t.double() for t in draw((m, k), (n, k), seed=seed))
    torch.testing.assert_close(rotate(x) @ rotate(w).T, x @ w.T)
    torch.testing.assert_close(rotate(rotate(x)), x)


def test_an_outlier_is_shared_by_its_block() -> None:
    x = torch.zeros(1, 256)
    x[0, 130] = 8.0
    rotated = rotate(x)
    assert (rotated[:, :128] == 0).all()
    torch.testing.assert_close(rotated[:, 128:].abs(), torch.full((1, 128), 8.0 / 128**0.5))


def test_the_largest_numbers_do_not_overflow() -> None:
    x = torch.full((1, 128), torch.finfo(torch.float32).max / 16)
    assert rotate(x).isfinite().all()
