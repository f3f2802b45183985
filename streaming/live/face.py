"""The face: a chunk generator, the sound that it has heard, and the frames that it goes on from, as a value.

A chunk can be cut after any of its frames. The next chunk then begins with motion latents made from the last frames
that are shown, and with the sound up to there. At a chunk's end this gives what the chunk itself hands on, but for the
rounding of frames to bytes.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kernels.lab_transfer import rgb_to_lab
from model.audio import Ring, SpeechEncoder, stream_window
from model.config import ChunkConfig
from streaming.generator import ChunkGenerator, Conditions, Frames, State
from streaming.ranks import LeadingGenerator
from streaming.writer import check_finite

COMPARED = 16  # rows and columns that a picture is averaged to before its colours are compared

Pictures = NDArray[np.uint8]  # [n, height, width, 3]
Samples = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FaceState:
    """Everything that the next chunk goes on from. Immutable."""

    number: int  # of the next chunk; its noise follows from it
    motion: Tensor | None  # motion latents [n, channel, h, w]; None: those of `tail`
    tail: Pictures  # the last motion_frames_num frames
    ring: Ring  # the sound up to there


@dataclass(frozen=True, eq=False)
class Rendered:
    """Frames of a chunk that were decoded together."""

    rgb: Pictures


@dataclass(frozen=True, eq=False)
class Finished:
    """The end of a chunk."""

    state: FaceState
    distance: float  # of its last frame to the portrait, in Lab: mean over a grid of averaged colours


Unit = Rendered | Finished | None  # what a piece of a chunk's work gives; None: a denoising step


@dataclass(frozen=True)
class Quality:
    """What a chunk costs: denoising steps, and pixels of the picture that is generated."""

    steps: int
    width: int
    height: int


class Face(Protocol):
    """What a session shows."""

    @property
    def chunk(self) -> ChunkConfig:
        """Geometry and timing."""
        ...

    @property
    def seed(self) -> int:
        """Of the noise."""
        ...

    @property
    def qualities(self) -> Sequence[Quality]:
        """Ways to generate, from the best on."""
        ...

    def start(self) -> FaceState:
        """The state before the first chunk."""
        ...

    def generate(self, state: FaceState, speech: Samples, quality: int) -> Generator[Unit, None, None]:
        """The work of a chunk that hears `speech` [slice_samples], piece by piece; it may be closed at any of them."""
        ...


@dataclass(frozen=True, eq=False)
class Way:
    """One way to generate: a generator, and the conditions in its picture's size."""

    generator: ChunkGenerator | LeadingGenerator
    conditions: Conditions


class PortraitFace:
    """The face of a portrait."""

    def __init__(self, ways: Sequence[Way], encoder: SpeechEncoder, portrait: Pictures, seed: int) -> None:
        """Brings generators and a portrait together.

        Args:
            ways: from the best on; all frames are shown in the size of the first.
            encoder: hears.
            portrait: uint8 [height, width, 3] in that size.
            seed: of the noise.
        """
        self.chunk = ways[0].generator.config.chunk
        chunks = [way.generator.config.chunk for way in ways]
        self.qualities = [Quality(chunk.sample_steps, chunk.width, chunk.height) for chunk in chunks]
        self.seed, self._ways, self._encoder, self._portrait = seed, ways, encoder, portrait
        self._colours = _averaged_lab(portrait)
        self._ready = ways[0].generator.audio_stream.record_event()

    def start(self) -> FaceState:
        """The state before the first chunk: the portrait has been shown, and nothing was heard."""
        tail = np.stack([self._portrait] * self.chunk.motion_frames_num)
        return FaceState(0, self._ways[0].conditions.motion, tail, Ring.empty(self.chunk))

    def generate(self, state: FaceState, speech: Samples, quality: int) -> Generator[Unit, None, None]:
        """The work of a chunk, piece by piece: None for a denoising step, frames, and at last the next state.

        Raises `UserError` if the networks give NaN or infinity.
        """
        generator, conditions = self._ways[quality].generator, self._ways[quality].conditions
        ring = state.ring.append(speech)
        units = generator.stepwise(conditions, self._begin(state, quality), self._window(generator, ring))
        pacer, last, shown = _Pacer(generator.models.device), [state.tail], 0
        while True:
            try:
                unit = next(units)
            except StopIteration as end:
                tail = np.concatenate(last)[-len(state.tail) :]
                after: State = end.value
                yield Finished(FaceState(after.chunk, after.motion, tail, ring), self._distance(tail[-1]))
                return
            if unit is None:
                pacer.step()
                yield None
            else:
                rgb = self._shown(unit)
                check_finite(bool(unit.finite), shown)
                last, shown = [*last[-1:], rgb], shown + len(rgb)
                yield Rendered(rgb)

    def _begin(self, state: FaceState, quality: int) -> State:
        generator, motion = self._ways[quality].generator, state.motion
        if motion is None or motion.shape[1:] != generator.config.latent_shape[1:]:  # of another picture's size
            chunk = generator.config.chunk
            motion = generator.motion_of(torch.from_numpy(_resized(state.tail, chunk.height, chunk.width)))
        return State(self.seed, state.number, motion)

    def _window(self, generator: ChunkGenerator | LeadingGenerator, ring: Ring) -> Tensor:
        """Speech features, on the stream where the chunk generator makes keys and values of them."""
        stream = generator.audio_stream
        with torch.inference_mode(), stream.fork(self._ready):
            window = stream_window(self._encoder, ring.samples, generator.config.chunk)
        stream.join(window)
        return window

    def _shown(self, frames: Frames) -> Pictures:
        return _resized(frames.rgb.cpu().numpy(), self.chunk.height, self.chunk.width)

    def _distance(self, rgb: NDArray[np.uint8]) -> float:
        return float((_averaged_lab(rgb) - self._colours).norm(dim=0).mean())


def cut(before: FaceState, speech: Samples, kept: int, tail: Pictures) -> FaceState:
    """The state after `kept` frames of the chunk that began at `before` and heard `speech`; `tail` was shown last."""
    chunk = before.ring.chunk
    ring = before.ring.append(speech).without_last((chunk.new_frames - kept) * chunk.frame_samples, before.ring)
    return replace(before, motion=None, tail=tail, ring=ring)


class _Pacer:
    """Keeps a GPU at most one step behind, so that a chunk that is abandoned soon ends."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._last: torch.cuda.Event | None = None

    def step(self) -> None:
        """Waits for the step before the one that was launched last."""
        if not self._cuda:
            return
        if self._last is not None:
            self._last.synchronize()
        self._last = torch.cuda.Event()
        self._last.record()


def _resized(pictures: Pictures, height: int, width: int) -> Pictures:
    """The pictures in another size; themselves if they have it."""
    if pictures.shape[1:3] == (height, width):
        return pictures
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    resized = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True).round().clamp(0, 255)
    return resized.byte().permute(0, 2, 3, 1).contiguous().numpy()


def _averaged_lab(rgb: NDArray[np.uint8]) -> Tensor:
    """The colours of a picture [height, width, 3] averaged to a grid, in Lab [3, COMPARED, COMPARED]."""
    pixels = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    return rgb_to_lab(F.adaptive_avg_pool2d(pixels, COMPARED))[0]
