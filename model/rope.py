"""Rotary position embedding: tables of cosines and sines, and their application to queries and keys."""

import torch
from torch import Tensor


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Cosines and sines of the rotary angles of every token, float32 [S, head_dim / 2, 2], from float64 angles.

    `grid` is (latent frames, rows, columns) of tokens. Of the c = head_dim / 2 channel pairs, c - 2 (c // 3) rotate by
    the latent frame, c // 3 by the row and c // 3 by the column of a token. Pair j of an axis with n pairs rotates by
    the angle position x 10000^(-j / n). Positions start at 0 in every chunk.
    """
    third = head_dim // 2 // 3
    axes = []
    for length, pairs in zip(grid, (head_dim // 2 - 2 * third, third, third), strict=True):
        frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
        axes.append(torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequencies))
    frames, rows, columns = axes
    angles = torch.cat(
        [
            frames[:, None, None].expand(*grid, -1),
            rows[None, :, None].expand(*grid, -1),
            columns[None, None, :].expand(*grid, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of adjacent channel pairs: (a, b) -> (a cos - b sin, a sin + b cos), in float32.

    x [..., token, head, head_dim], table [token, head_dim / 2, 2]; the result has x's shape and dtype.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[:, None].unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def audio_rope(positions: Tensor, head_dim: int) -> Tensor:
    """Rotary table float32 [n, head_dim / 2, 2] of real-valued positions [n]."""
    frequencies = 1 / 10000.0 ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = torch.outer(positions.float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)
