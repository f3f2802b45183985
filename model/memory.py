"""What a system needs of a GPU's memory, by count, and what of it fits on a card: decided before anything is loaded.

    weights       the networks that stay: the student without what is offloaded, the VAE, the speech encoder
    keys, values  of prompt, portrait and sound, for all blocks of the student
    chunk         what a chunk computes with: activations of the student and the VAE, and the VAE's caches
    visits        what is there only while a session is prepared: an encoder, or the portrait's clip in the VAE

Parameters are those of the networks themselves, built on the meta device. Activations are added up as `Block` and `VAE`
make them, without a compiler that would merge some of them. Allocators and libraries take more than tensors:
`GRAPHS_FACTOR` is what one H100 took for a chunk over that count, and tests/model/test_memory.py holds the sum to its
peak. Nothing else has been measured; `LAUNCHED_FACTOR` is an assumption.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from kernels.tuning import GPU, assume_gpu
from model.audio import SpeechEncoder
from model.config import (
    FP8_CAPABILITY,
    PRECISIONS,
    AudioConfig,
    Config,
    DiTConfig,
    ImageConfig,
    Precision,
    TextConfig,
    VAEConfig,
)
from model.dit import DiT
from model.errors import UserError
from model.image import ImageEncoder
from model.text import TextEncoder
from model.vae import VAE, writes_past_frames

GIB = 2**30
GRAPHS_FACTOR = 1.5  # of a chunk in CUDA graphs: memory of their pools and workspaces of libraries, over its tensors
SPARE_BYTES = 128 * 2**20  # what may be taken for speed alone where there is no plan, as on a CPU
LAUNCHED_FACTOR = 1.25  # the same without graphs: the allocator returns unused blocks when memory runs short


@dataclass(frozen=True)
class Card:
    """The properties of a GPU that decide what it can run."""

    name: str
    capability: tuple[int, int]
    free: int  # bytes that a process can still have

    @property
    def has_fp8(self) -> bool:
        """Whether its tensor cores multiply e4m3, and Triton compiles it."""
        return self.capability >= FP8_CAPABILITY

    def __str__(self) -> str:
        return f"{self.name} (compute capability {'.'.join(map(str, self.capability))})"


def card_of(device: torch.device) -> Card:
    """The card of a CUDA device. What this process has reserved and does not use counts as free."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Card(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), free + unused)


def require_fp8(precision: str, card: Card) -> None:
    """Raises `UserError` if the precision is e4m3 in parts and the card has none."""
    if PRECISIONS[precision].needs_fp8 and not card.has_fp8:
        least = ".".join(map(str, FP8_CAPABILITY))
        raise UserError(f"precision {precision}: {card} has no FP8, which begins with {least}; use bf16 or int8")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of GPU memory by purpose, as the module says."""

    weights: int
    keys_values: int
    chunk: int
    text: int  # the visit of the text encoder, if it does not run on the CPU
    image: int  # that of the image encoder
    portrait: int  # that of the portrait's clip, in the VAE's encoder
    loading: int  # what loading takes for a moment, if that is more than what stays
    graphs: bool  # whether stages are CUDA graphs, whose memory no visit can use

    @property
    def running(self) -> int:
        """What generating takes, once a session is prepared."""
        return self.weights + self.keys_values + self.chunk

    def peak(self, text_on_card: bool) -> int:
        """The most that is needed at once, for any number of sessions after each other."""
        visit = max(self.image, self.portrait, self.text if text_on_card else 0)
        rest = self.chunk + visit if self.graphs else max(self.chunk, visit)
        return max(self.loading, self.weights + self.keys_values + rest)


def pairs_caches(config: Config, precision: Precision, card: Card) -> bool:
    """Whether the VAE's caches are in pairs on a card, by what was measured on it or one like it."""
    with assume_gpu(GPU(card.name, ".".join(map(str, card.capability)), multiprocessors=0)):
        return writes_past_frames(config, precision.vae, torch.device("cuda"))


def memory_plan(
    config: Config, precision: Precision, graphs: bool, random_weights: bool = False, paired: bool = False
) -> MemoryPlan:
    """What a system of these dimensions needs in a precision.

    Args:
        config: all dimensions, in the picture's size.
        precision: dtypes of the networks.
        graphs: whether stages are captured as CUDA graphs. Student and VAE then have memory of their own each.
        random_weights: whether the weights are drawn: on the card, the whole student before it is quantised.
        paired: whether the caches of the VAE's decoder are in pairs.
    """
    frames, dit = config.latent_shape[0], config.dit
    keys = 2 * (dit.text_len + dit.img_tokens + frames * dit.context_tokens)
    state, decode = _coder_bytes(config, precision, decoder=True, paired=paired)
    encode = sum(_coder_bytes(config, precision, decoder=False))
    pictures = config.chunk.frame_num * 3 * config.chunk.height * config.chunk.width
    coder = max(state + decode, state + encode) if graphs else state + decode
    chunk = _block_bytes(config, precision) + coder + pictures * (precision.vae.itemsize + 4 + 1)
    return MemoryPlan(
        _student_bytes(dit, precision) + _vae_bytes(config.vae, precision.vae) + _speech_bytes(config.audio, precision),
        keys * dit.num_layers * dit.dim * precision.dit.itemsize,
        round((GRAPHS_FACTOR if graphs else LAUNCHED_FACTOR) * chunk),
        _text_bytes(config.text, precision.text),
        _image_bytes(config.image, precision.image),
        round(LAUNCHED_FACTOR * (encode + pictures * precision.vae.itemsize)),
        _whole_bytes(dit, precision.dit) if random_weights else 0,
        graphs,
    )


# --- What fits ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A way to run a system on a card."""

    precision: str
    graphs: bool
    text_on_card: bool  # else the text encoder runs on the CPU
    plan: MemoryPlan
    spare: int  # bytes of the card beside the plan's peak


def fit_precision(
    config: Config,
    precision: str,
    graphs: Sequence[bool],
    free: int,
    random_weights: bool = False,
    paired: bool = False,
) -> Fit | None:
    """How a system runs in a precision in `free` bytes: with the first of `graphs` that fits; None if nothing does.

    The text encoder is on the card if it fits beside everything else, so that a new prompt never wants memory.
    `random_weights` and `paired` are as in `memory_plan`.
    """
    for graphed in graphs:
        plan = memory_plan(config, PRECISIONS[precision], graphed, random_weights, paired)
        for on_card in (True, False):
            spare = free - plan.peak(on_card)
            if spare >= 0:
                return Fit(precision, graphed, on_card, plan, spare)
    return None


def all_fits(
    config: Config, card: Card, graphs: Sequence[bool] = (True, False), random_weights: bool = False
) -> Iterator[Fit]:
    """How a system runs on a card, in every precision that the card can multiply in and has the memory for."""
    for name, precision in PRECISIONS.items():
        if card.has_fp8 or not precision.needs_fp8:
            paired = pairs_caches(config, precision, card)
            found = fit_precision(config, name, graphs, card.free, random_weights, paired)
            if found is not None:
                yield found


# --- Counts ---------------------------------------------------------------------------------------------------------


def _block_bytes(config: Config, precision: Precision) -> int:
    """The most that tensors of a block take at once, its input among them, which the caller holds.

    The largest of three moments: at the end of self-attention, of audio attention, and of the feed-forward. A value of
    the residual stream has `e` bytes, one in 8 bits 1.
    """
    dit, frames, tokens = config.dit, config.latent_shape[0], math.prod(config.grid)
    e, eight = precision.dit.itemsize, int(precision.eight_bits is not None)
    normed, copy = (1, 1) if eight else (e, 0)  # the input of a linear layer; what it makes of an attention's output
    gated = 0 if eight else 3 * 4  # a gated residual in float32, unless a kernel's epilogue adds it
    plain = 3 * e + 2 * e + e + copy + e + gated  # q and k beside q, k and v, of which v is still needed
    attention = max(3 * e + 3, 3 + e + copy + e) if precision.fp8_attention else plain
    wide = dit.ffn_dim / dit.dim
    hidden = {"fp8": 1, "int8": e + 1}.get(precision.eight_bits.format) if precision.eight_bits else 2 * e
    assert hidden is not None
    feed_forward = e + normed + hidden * wide + e + gated
    columns = dit.num_heads * dit.context_tokens
    absorbed = 2 * frames * columns * dit.dim * e + tokens * columns * e
    audio = e + e + 3 * e
    values = tokens * dit.dim
    return round(max((e + normed + attention) * values, (e + feed_forward) * values, (e + audio) * values + absorbed))


def _coder_bytes(config: Config, precision: Precision, decoder: bool, paired: bool = False) -> tuple[int, int]:
    """Bytes of the caches of the VAE's decoder or encoder, and of the activations of one step.

    A cache is two input frames of a convolution in time, or two times two where caches are in pairs, but of those that
    double or halve frames. Activations are largest in the last level, or the encoder's
    first, which works on the frames of one latent: a residual block holds its input and three more tensors. The decoder
    also has the result of the levels before, for two latents, which is as large as one of these.
    """
    vae, e, (_, _, rows, columns) = config.vae, precision.vae.itemsize, config.latent_shape
    widths, blocks = [vae.dim * mult for mult in vae.dim_mult], vae.num_res_blocks + decoder
    cached, area, in_time = 4 * widths[-1] * rows * columns, rows * columns, 0  # of the two blocks in the middle
    for level in reversed(range(len(widths))):
        area = rows * columns * 4 ** (len(widths) - 1 - level)
        before = widths[min(level + 1, len(widths) - 1)] // (2 if level + 1 < len(widths) else 1)
        first = before if decoder else widths[max(level - 1, 0)]
        cached += (first + (2 * blocks - 1) * widths[level]) * area
        if level and vae.temperal_downsample[level - 1]:
            in_time += widths[level] * area  # of the convolution that doubles or halves frames
    cached += widths[0] * area  # of the last convolution, or the first
    held = 5 if decoder else 4
    return 2 * e * ((2 if paired else 1) * cached + in_time), held * vae.temporal_stride * widths[0] * area * e


@cache
def _student_bytes(config: DiTConfig, precision: Precision) -> int:
    """Bytes of the student's parameters that stay on the card."""

    def count(layers: int) -> int:
        student = _meta_student(replace(config, num_layers=layers), precision)
        return _bytes(student) - _bytes(*student.offloadable_modules().values())

    return _by_layers(count, config.num_layers)


def _meta_student(config: DiTConfig, precision: Precision) -> DiT:
    with torch.device("meta"):
        student = DiT(config).to(precision.dit)
        if precision.eight_bits is not None:
            student.quantize(precision.eight_bits)
    return student


@cache
def _whole_bytes(config: DiTConfig, dtype: torch.dtype) -> int:
    """Bytes of the whole student, before anything is quantised or offloaded."""
    with torch.device("meta"):
        return _by_layers(lambda n: _bytes(DiT(replace(config, num_layers=n)).to(dtype)), config.num_layers)


@cache
def _vae_bytes(config: VAEConfig, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        return _bytes(VAE(config).to(dtype))


@cache
def _speech_bytes(config: AudioConfig, precision: Precision) -> int:
    with torch.device("meta"):
        return _bytes(SpeechEncoder(config).to(precision.audio))


@cache
def _text_bytes(config: TextConfig, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        return _by_layers(lambda n: _bytes(TextEncoder(replace(config, num_layers=n)).to(dtype)), config.num_layers)


@cache
def _image_bytes(config: ImageConfig, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        return _by_layers(
            lambda n: _bytes(ImageEncoder(replace(config, vision_layers=n + 1)).to(dtype)), config.vision_layers - 1
        )


def _by_layers(count: Callable[[int], int], layers: int) -> int:
    """`count(layers)`, of networks whose layers are alike, from those with one and two."""
    one, two = count(1), count(2)
    return one + (layers - 1) * (two - one)


def _bytes(*modules: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for module in modules for x in module.parameters())
