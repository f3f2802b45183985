"""What ranks do in the tests of streaming/ranks.py."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model.errors import UserError
from model.parallel.ranks import Ranks
from streaming.generator import ChunkGenerator, Frames
from streaming.ranks import FollowingGenerator, LeadingGenerator, RankGroup
from streaming.timers import StageTimer
from tests.model.parallel.jobs import CONFIGS, CPU, models

IDS = torch.tensor([5, 6, 7])


@functools.cache
def portrait(name: str) -> Tensor:
    chunk = CONFIGS[name].chunk
    return torch.randint(256, (3, chunk.height, chunk.width), generator=torch.Generator().manual_seed(3)).byte()


def windows(name: str, count: int) -> Iterator[Tensor]:
    dit, random = CONFIGS[name].dit, torch.Generator().manual_seed(4)
    for _ in range(count):
        shape = CONFIGS[name].chunk.frame_num, dit.audio_window, dit.audio_blocks, dit.audio_channels
        yield torch.randn(shape, generator=random)


def new_generator(ranks: Ranks | None, name: str) -> ChunkGenerator:
    return ChunkGenerator(models(name), StageTimer(CPU), ranks=ranks)


def chunks(ranks: Ranks | None, name: str, count: int) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The bytes of some chunks' frames, and the shapes of the float frames that this rank had."""
    generator = new_generator(ranks, name)
    conditions = generator.prepare(portrait(name), IDS)
    state, rgb, shapes = generator.start(conditions, 7), [], []
    for window in windows(name, count):
        frames = generator.chunk(conditions, state, window)
        while True:
            try:
                group: Frames = next(frames)
            except StopIteration as end:
                state = end.value
                break
            assert bool(group.finite)
            rgb.append(group.rgb.clone())
            shapes.append(tuple(group.pixels.shape))
    return torch.cat(rgb), shapes


def led(ranks: Ranks, name: str) -> tuple[Tensor, Tensor] | None:
    """On rank 0: motion latents of the portrait, and the frames of two chunks.

    Before them a chunk is given up between two steps, after them another one is, without being closed.
    """
    group, generator = RankGroup(ranks.rank, ranks.world), new_generator(ranks, name)
    if not group.leads:
        following = FollowingGenerator(generator, group)
        while (message := group.receive())[0] != "end":
            method, _, *arguments = message
            following.repeat(method, *arguments)
        return None
    leading, rgb = LeadingGenerator(generator, group, "the only one"), []
    conditions = leading.prepare(portrait(name), IDS)
    state = leading.start(conditions, 7)
    given_up = leading.stepwise(conditions, state, next(windows(name, 1)))
    assert next(given_up) is None
    given_up.close()
    motion = leading.motion_of(still(name))
    for window in windows(name, 2):
        frames = leading.chunk(conditions, state, window)
        while True:
            try:
                rgb.append(next(frames).rgb.clone())
            except StopIteration as end:
                state = end.value
                break
    open_at_the_end = leading.chunk(conditions, state, next(windows(name, 1)))
    next(open_at_the_end)
    group.call(("end",))
    return motion, torch.cat(rgb)


def still(name: str) -> Tensor:
    """The portrait as the frames that motion latents are made from."""
    count = CONFIGS[name].chunk.motion_frames_num
    return portrait(name).permute(1, 2, 0).expand(count, -1, -1, -1).contiguous()


def refused(ranks: Ranks, facts: list[dict[str, Any]]) -> str:
    """What a rank hears where each has been given its own facts."""
    try:
        RankGroup(ranks.rank, ranks.world).agree(facts[ranks.rank])
    except UserError as error:
        return str(error)
    return ""


def failed(ranks: Ranks, who: int) -> str:
    """What a rank hears where one, or with -1 each, makes a user's mistake."""
    try:
        with RankGroup(ranks.rank, ranks.world).together():
            if who in (ranks.rank, -1):
                raise UserError("there is no such file")
    except UserError as error:
        return str(error)
    return ""
