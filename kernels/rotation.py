"""Hadamard rotation of blocks of columns, which spreads outliers before values are rounded to int8.

    rotate(x)[:, b] = x[:, b] H / sqrt(B)         for every block b of B adjacent columns

H [B, B] has entries 1 and -1, H[i, j] = (-1)^popcount(i & j), and H / sqrt(B) is orthogonal and symmetric. So
rotate(rotate(x)) = x, and a product does not change when both operands are rotated along the axis that it sums over:

    x w^T = rotate(x) rotate(w)^T

A channel that is far larger than the others sets the scale of its row, and leaves few of int8's 256 levels to the rest.
Rotated, its magnitude is shared among B columns. Weights are rotated once; rows are rotated in the registers of the
kernel that quantises them, in kernels/layer_norm.py.

Source: QuaRot (arXiv 2404.00456).
"""

# Shapes are constants to Triton.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 128


def rotation_block(columns: int) -> int:
    """Columns that are rotated together: the largest power of two that divides `columns`, at most 128."""
    return min(columns & -columns, MAX_BLOCK)


def rotate(x: Tensor) -> Tensor:
    """x [rows, columns] with every block of `rotation_block(columns)` columns rotated, in float32 or wider."""
    block = rotation_block(x.shape[1])
    x = x.to(torch.promote_types(x.dtype, torch.float32)) / block  # first, so that no sum overflows
    width = 1
    while width < block:
        a, b = x.unflatten(1, (-1, 2, width)).unbind(2)
        x = torch.stack((a + b, a - b), dim=2).flatten(1)
        width *= 2
    return x * block**0.5


@triton.jit
def butterfly(y, WIDTH: tl.constexpr):
    """Replaces every two values (a, b) of y that are WIDTH apart, within groups of 2 WIDTH, by (a + b, a - b)."""
    LENGTH: tl.constexpr = y.shape[0]
    pairs = tl.reshape(y, [LENGTH // (2 * WIDTH), 2, WIDTH])
    a, b = tl.split(tl.permute(pairs, [0, 2, 1]))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [LENGTH])


@triton.jit
def rotate_row(y, BLOCK: tl.constexpr):
    """The values y of a row with every BLOCK of them, a power of two, rotated and divided by sqrt(BLOCK)."""
    y *= 1.0 / BLOCK  # first, so that no sum overflows
    for exponent in tl.static_range(BLOCK.bit_length() - 1):
        y = butterfly(y, 2**exponent)
    return y * BLOCK**0.5
