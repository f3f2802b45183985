"""Several ranks compute what one computes: the student, the VAE, and the bytes that they exchange."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.errors import UserError
from model.parallel.ranks import Ranks, even_borders, sizes
from model.parallel.rows import RowSplit
from model.parallel.tokens import TokenSplit
from tests.model.parallel import jobs
from tests.processes import Interpreter
from tests.ranks import LAYOUTS, RankPool, rank_pool
from tests.tensors import error

EXACT = 1e-5  # relative, float32: what the order of sums changes
WORLDS = (2, 3, 4)


@pytest.fixture(scope="module")
def pool(python: Interpreter):
    with rank_pool(python) as pool:
        yield pool


@functools.cache
def of_one_rank(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(None, *args)


@pytest.mark.parametrize(("world", "ulysses"), LAYOUTS)
@pytest.mark.parametrize("tokens", [64, 77, 200])
def test_attention_by_ulysses_ring_and_both(pool: RankPool, world: int, ulysses: int, tokens: int) -> None:
    parts = pool.run(world, ulysses, jobs.attention, tokens, 4 if 4 % ulysses == 0 else 3)
    whole = jobs.attention(None, tokens, 4 if 4 % ulysses == 0 else 3)
    assert error(torch.cat(parts), whole) < EXACT


@pytest.mark.parametrize(("world", "ulysses"), LAYOUTS)
def test_operands_of_fp8_attention_are_those_of_one_rank(pool: RankPool, world: int, ulysses: int) -> None:
    heads = 4 if 4 % ulysses == 0 else 3
    operands, attended = jobs.attention_fp8(None, 203, heads)
    parts = pool.run(world, ulysses, jobs.attention_fp8, 203, heads)
    q, q_scale, k, k_scale, v, v_scale, mean_key = zip(*(part for part, _ in parts), strict=True)
    joined = torch.cat(q), torch.cat(q_scale), torch.cat(k), k_scale[0], torch.cat(v, 2), v_scale[0], mean_key[0]
    assert all(torch.equal(x, y) for x, y in zip(joined, operands, strict=True))
    result = torch.cat([part for _, part in parts])
    if ulysses == world:
        assert torch.equal(result, attended)
    else:  # each block's output is rounded to bf16 before it is merged
        assert error(result, attended) < 1e-2


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("speakers", [1, 2])
@pytest.mark.parametrize("name", jobs.CONFIGS)
def test_student(pool: RankPool, world: int, speakers: int, name: str) -> None:
    whole = of_one_rank(jobs.velocity, name, speakers)
    for result in pool.run(world, jobs.degree(name, world), jobs.velocity, name, speakers):
        assert error(result, whole) < EXACT


@pytest.mark.parametrize("speakers", [1, 2])
def test_student_in_8_bits(pool: RankPool, speakers: int) -> None:
    """Its operands are those of one rank, but sums of other shapes are rounded to bf16 elsewhere."""
    whole = jobs.velocity(None, "odd", speakers, "fp8-attn")
    for result in pool.run(3, 3, jobs.velocity, "odd", speakers, "fp8-attn"):
        assert error(result, whole) < 1e-2


@pytest.mark.parametrize(("world", "precision"), [(3, "fp32"), (4, "fp32"), (3, "fp8-attn")])
def test_compiled_student(pool: RankPool, world: int, precision: str) -> None:
    """Exchanges are inside the compiled code, and what they carry is awaited there."""
    whole = jobs.velocity(None, "odd", 1, precision)
    for result in pool.run(world, jobs.degree("odd", world), jobs.compiled_velocity, "odd", precision):
        assert error(result, whole) < (EXACT if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", jobs.CONFIGS)
def test_decoder_and_encoder(pool: RankPool, world: int, name: str) -> None:
    layout = world, jobs.degree(name, world)
    frames = torch.cat(pool.run(*layout, jobs.decoded, name), dim=2)
    assert error(frames, of_one_rank(jobs.decoded, name)) < EXACT
    for latents in pool.run(*layout, jobs.encoded, name):
        assert error(latents, of_one_rank(jobs.encoded, name)) < EXACT


@pytest.mark.parametrize("world", WORLDS)
def test_past_frames_that_norms_write_are_right_at_the_edges_too(pool: RankPool, world: int) -> None:
    """Bit for bit as they are copied, on every rank; and with the bytes that are sent for that."""
    layout = world, jobs.degree("odd", world)
    written, copied = (pool.run(*layout, jobs.counted, jobs.decoded, "odd", paired) for paired in (True, False))
    for (frames, sent), (as_copied, as_sent) in zip(written, copied, strict=True):
        assert torch.equal(frames, as_copied)
        assert sent == as_sent


@pytest.mark.parametrize(("world", "ulysses"), [(2, 2), (3, 1), (4, 2)])
def test_bytes_of_attention(pool: RankPool, world: int, ulysses: int) -> None:
    """q, k, v go out and the output comes back: (U - 1) / U of them; keys and values go round the ring."""
    tokens, heads, head_dim = 192, 4, 16
    row = heads * head_dim * 4  # bytes of a token, float32
    for rank, (_, sent) in enumerate(pool.run(world, ulysses, jobs.counted, jobs.attention, tokens, heads)):
        borders = even_borders(tokens, world, 16)
        own = sizes(borders)[rank]
        others = [n for i, n in enumerate(sizes(borders)) if i // ulysses == rank // ulysses and i != rank]
        exchanged = (3 * own * (ulysses - 1) + sum(others)) * row // ulysses
        in_group = own + sum(others)
        groups = sizes(borders[::ulysses])
        position = rank // ulysses
        coming = sum(groups[(position - i) % len(groups)] for i in range(len(groups) - 1))
        assert in_group == groups[position]
        assert sent == {"ulysses": exchanged} | ({"ring": 2 * coming * row // ulysses} if len(groups) > 1 else {})


def test_bytes_of_fp8_attention_are_half_of_those_of_bf16(pool: RankPool) -> None:
    tokens, heads, head_dim, world = 192, 4, 64, 4
    for _, sent in pool.run(world, world, jobs.counted, jobs.attention_fp8, tokens, heads):
        own = tokens // world * heads * head_dim * (world - 1) // world  # numbers of q, k, v and o that leave the rank
        scales = tokens // world * heads * 4 * (world - 1) // world
        assert sent["ulysses"] == 3 * own + scales + 2 * own
        sampled = 2 * heads * head_dim * 4 + head_dim * 4  # bytes of a token of the sample: k, v and its angles
        assert sent["all"] % (sampled * (world - 1)) == 0
        assert sent["all"] <= 128 * sampled * (world - 1)


def test_bytes_and_rows_of_the_decoder(pool: RankPool) -> None:
    """A rank sends a row to each neighbour before a convolution, and keys and values of its pixels to all others.

    No rank decodes more than its rows.
    """
    world, config = 4, jobs.CONFIGS["odd"]
    frames, _, rows, columns = config.latent_shape
    parts, found = zip(*pool.run(world, 1, jobs.counted, jobs.decoded, "odd"), strict=True)
    assert [len(part[0, 0]) for part in parts] == [8 * n for n in sizes(even_borders(rows, world))]
    sent = [by_group["vae"] for by_group in found]
    width = config.vae.dim * config.vae.dim_mult[-1]  # channels at the size of the latents
    keys_values = [4 * 2 * width * frames * columns * own * (world - 1) for own in sizes(even_borders(rows, world))]
    halos = [whole - attention for whole, attention in zip(sent, keys_values, strict=True)]
    row = halos[0]  # of all convolutions, to one neighbour
    assert halos == [row, 2 * row, 2 * row, row]
    first = 4 * columns * frames * config.vae.z_dim  # the first convolution's input
    blocks = 4 * columns * frames * width * 4  # two blocks of two convolutions at the size of the latents
    assert row > first + blocks


@pytest.mark.parametrize("count", [1, 5, 16, 77, 12096])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_borders_are_even(count: int, parts: int) -> None:
    for unit in (1, 16):
        if math.ceil(count / unit) < parts:
            with pytest.raises(ValueError, match=r"^count: "):
                even_borders(count, parts, unit)
            continue
        borders = even_borders(count, parts, unit)
        assert borders[0] == 0
        assert borders[-1] == count
        assert all(border % unit == 0 for border in borders[:-1])
        assert max(sizes(borders)) - min(sizes(borders)) < 2 * unit


def test_too_many_ranks_are_refused_in_one_line() -> None:
    ranks = Ranks(0, 8, 8, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"^8 GPUs: a chunk has 96 tokens, too few"):
        TokenSplit.of_grid(ranks, (6, 4, 4), jobs.CPU)
    with pytest.raises(UserError, match=r"^8 GPUs: the picture has 7 rows of latents"):
        RowSplit.of_rows(ranks, 7)
