"""What one rank computes and exchanges in a chunk, recorded from the model itself, without weights or a GPU.

`record` runs a chunk of `ChunkGenerator` on meta tensors, alone or as one of several ranks, whose exchanges it notes.
What is recorded, and how, is in recorder.py. The student's blocks are compiled on a GPU, the VAE is not.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from model.block import ContextKV
from model.config import PRECISIONS, TINY, Config
from model.dit import DiT
from model.parallel.ranks import Group, Ranks, sizes, ulysses_degree
from model.parallel.tokens import TokenSplit
from model.vae import Downsample, ResidualBlock, Upsample
from model.weights.checkpoint import Models, random_models
from profiling.analyse.calls import Call
from profiling.analyse.recorder import META, Exchange, Recorded, Recorder, WithoutValues
from profiling.cases.case import PROMPT_TOKENS
from streaming.generator import ChunkGenerator, Conditions
from streaming.timers import StageTimer

AUDIO, STEP, DECODE, COLOR, MOTION = "audio", "denoise/step", "decode", "color", "motion"  # stages, as timed
BETWEEN = ""  # what is called in no stage


@dataclass(frozen=True)
class StageWork:
    """What one call of a stage computes and exchanges, on one rank."""

    stage: str
    calls: Counter[Call]
    beside: bool = False  # whether it runs beside the denoising steps, on a stream of its own
    exchanges: Counter[Exchange] = field(default_factory=Counter)


Recipe = tuple[StageWork, ...]  # of a chunk, in the order in which its stages are called


def meta_models(config: Config, precision: str) -> Models:
    """The networks of `config` without weights; the encoders, which no chunk runs, are those of `tiny`."""
    small = replace(config, text=TINY.text, image=TINY.image, audio=TINY.audio)
    with WithoutValues():
        return replace(random_models(small, META, PRECISIONS[precision], offload_device=META), config=config)


def record(models: Models, rank: int = 0, world: int = 1) -> Recipe:
    """What a rank computes and exchanges in a steady chunk of these networks, which `meta_models` made.

    Raises `UserError` if the picture cannot be split among so many ranks.
    """
    recorder = Recorder()
    ranks = _ranks(models.config, rank, world, recorder) if world > 1 else None
    with torch.inference_mode(), WithoutValues():
        generator = ChunkGenerator(models, RecordingTimer(recorder), ranks=ranks)
        conditions, window = _inputs(models)
        state = replace(generator.start(conditions, seed=0), chunk=1, motion=_motion(models.config))
        with recorder, ExitStack() as repeating:
            repeating.enter_context(recorder.repeating(list(models.dit.blocks), compiled=True))
            for network in (models.dit, models.vae.encoder, models.vae.decoder):
                layers = [m for m in network.modules() if isinstance(m, (ResidualBlock, Upsample, Downsample))]
                repeating.enter_context(recorder.repeating([network, *layers], compiled=False))
            for _ in generator.chunk(conditions, state, window):
                pass
    return _beside(recorder.recorded())


def busiest_rank(config: Config, world: int) -> int:
    """The rank that no other one has more to compute than: most tokens, and neighbours on both sides.

    The first ranks have the motion latents' tokens, of which the last block of one GPU leaves some out. Raises
    `UserError` if there are too few tokens for so many ranks.
    """
    split = TokenSplit.of_grid(_ranks(config, 0, world, Recorder()), config.grid, META)
    counts = sizes(split.borders)
    return max(range(world), key=lambda rank: (counts[rank], 0 < rank < world - 1, rank))


def _ranks(config: Config, rank: int, world: int, recorder: Recorder) -> Ranks:
    degree = ulysses_degree(world, config.dit.num_heads)
    return Ranks(rank, world, degree, RecordingTransport(recorder, rank, world, degree))


def _inputs(models: Models) -> tuple[Conditions, Tensor]:
    """Conditions and window of features of a chunk, with the shapes and dtypes that a session has."""
    config, dit = models.config, models.dit
    frames, channels, rows, columns = config.latent_shape
    dtype = next(models.vae.parameters()).dtype
    condition = torch.empty(frames, config.dit.in_dim - channels, rows, columns, device=META, dtype=dtype)
    statistics = torch.empty(1, 3, 1, 1, device=META)
    conditions = Conditions(_context(dit), condition, (statistics, statistics), condition[:1, :channels])
    window = (config.chunk.frame_num, config.dit.audio_window, config.dit.audio_blocks, config.dit.audio_channels)
    return conditions, torch.empty(window, device=META)


@cache  # which many pictures share
def _context(dit: DiT) -> ContextKV:
    """Keys and values of prompt and portrait."""
    text = torch.empty(PROMPT_TOKENS, dit.config.text_dim, device=META)
    return dit.embed_context(text, torch.empty(dit.config.img_tokens, dit.config.img_dim, device=META))


def _motion(config: Config) -> Tensor:
    """The motion latents that all chunks but the first begin with."""
    count = (config.chunk.motion_frames_num - 1) // config.vae.temporal_stride + 1
    return torch.empty(count, *config.latent_shape[1:], device=META)


def _beside(stages: Sequence[Recorded]) -> Recipe:
    """The stages, where what is called between denoising steps is marked as running beside them."""
    steps = [i for i, recorded in enumerate(stages) if recorded.stage == STEP]
    return tuple(
        StageWork(r.stage, r.calls, r.stage != STEP and steps[0] < i < steps[-1], r.exchanges)
        for i, r in enumerate(stages)
        if r.stage != BETWEEN
    )


class RecordingTimer(StageTimer):
    """A timer that tells the recorder which stage runs."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(META)
        self._recorder = recorder

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Counts what the body calls as one call of the stage `name`."""
        self._recorder.begin(name)
        yield
        self._recorder.begin(BETWEEN)


@dataclass(frozen=True)
class RecordingTransport:
    """Stands in for the collectives of a rank: notes each exchange, and returns tensors like those that would come."""

    recorder: Recorder
    rank: int
    world: int
    ulysses: int

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
        """As in `model.parallel.ranks.Transport`."""
        rows = rows.contiguous()
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        own = Ranks(self.rank, self.world, self.ulysses, self).members(group).index(self.rank)
        size = math.prod(rows.shape[1:]) * rows.itemsize
        count = size * max(sum(counts) - counts[own] for counts in (send, receive))
        if len(send) > 1:
            self.recorder.start_exchange(group, rows, received, float(count))
        return received

    def wait(self, rows: Tensor) -> Tensor:
        """As in `model.parallel.ranks.Transport`."""
        self.recorder.wait_for(rows)
        return rows
