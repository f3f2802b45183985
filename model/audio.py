"""From samples to the audio windows of a chunk: loudness, the speech encoder, windowing.

Samples are mono float32 in numpy arrays until they enter the speech encoder. A track is heard in one of two ways:

*once*: the whole track is at hand; it is brought to -23 LUFS, encoded in one pass, and chunks are cut from the
embedding. The official loop lets chunk c use frames 28 c .. 28 c + 32 and shows all but the first five, so lips lead
the sound by five frames, and it drops a last chunk. `once_window` begins five frames earlier, so that shown frame m
carries audio frame m, and can be asked for a last chunk that the track fills only in part.

*stream*: the encoder hears the last eight seconds, a slice (what one chunk shows) longer each time. The official loop
measures and normalises those eight seconds anew for each chunk, so that the gain of one and the same sample jumps from
chunk to chunk, and it drops a partial last slice. `Ring` fixes a sample's gain once, and fills up a partial slice with
silence.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2Model

from model.config import AudioConfig, ChunkConfig
from model.errors import UserError
from model.weights.mapping import ParamMapping
from model.weights.offload import pin_memory_for

TARGET_LUFS = -23.0  # LUFS that the speech encoder is given
GATING_BLOCK = 0.4  # seconds of a gating block of ITU-R BS.1770
MAX_GAIN = 30.0  # dB either way, in a `Ring`
MAX_GAIN_RATE = 6.0  # dB a second, in a `Ring`: slow beside syllables, quick enough to mend a first guess


def _loudness(wave: NDArray[np.floating], sample_rate: int, block: float) -> float | None:
    """Integrated loudness by ITU-R BS.1770 in LUFS; None where it cannot be measured, as in silence."""
    import pyloudnorm  # here, for machines that only generate and do without it

    loudness = float(pyloudnorm.Meter(sample_rate, block_size=block).integrated_loudness(wave))
    return loudness if abs(loudness) <= 100 else None


def normalize_loudness(
    wave: NDArray[np.floating], sample_rate: int, target: float = TARGET_LUFS
) -> NDArray[np.floating]:
    """`wave` times 10^((target - loudness) / 20), its integrated loudness by ITU-R BS.1770 (gated, mono) in LUFS.

    Float32 or float64 [N] -> the same dtype and shape; not clipped. Where the loudness cannot be measured, as in
    silence, the wave comes back unchanged. Raises `ValueError` below 0.4 s, the length of a gating block.
    """
    if wave.ndim != 1 or len(wave) < GATING_BLOCK * sample_rate:
        raise ValueError(f"wave: got {wave.shape}, wanted [N] of at least {GATING_BLOCK} s at {sample_rate} Hz")
    loudness = _loudness(wave, sample_rate, GATING_BLOCK)
    return wave if loudness is None else wave * 10 ** ((target - loudness) / 20)


@dataclass(frozen=True, eq=False)
class Ring:
    """The last seconds of a stream at one steady loudness, as a value.

    `append` measures the loudness of what was heard, at most `cached_samples`, before any gain, and moves the gain
    towards -23 LUFS by at most `MAX_GAIN_RATE`, along a ramp that is linear in dB over the new slice: no step anywhere,
    and a sample keeps the gain it entered with. The first slice that can be measured has its gain at once; silence
    leaves the gain alone; the gain stays within +-`MAX_GAIN`.
    """

    chunk: ChunkConfig
    samples: NDArray[np.float32]  # [cached_samples], gained, the newest last, zeros before the first slice
    raw: NDArray[np.float32]  # [<= cached_samples], the same as heard, nothing before the first slice
    gain: float | None  # dB of the newest sample; None until something could be measured

    @classmethod
    def empty(cls, chunk: ChunkConfig) -> "Ring":
        """A ring that has heard nothing."""
        return cls(chunk, np.zeros(chunk.cached_samples, np.float32), np.zeros(0, np.float32), None)

    def append(self, samples: NDArray[np.float32]) -> "Ring":
        """The ring one slice later: float32 [<= slice_samples], filled up with silence to slice_samples."""
        size = self.chunk.slice_samples
        if samples.ndim != 1 or samples.dtype != np.float32 or len(samples) > size:
            raise ValueError(f"samples: got {samples.dtype} {samples.shape}, wanted float32 [<= {size}]")
        if not np.isfinite(samples).all():
            raise ValueError("samples: got values that are not finite")
        piece = np.pad(samples, (0, size - len(samples)))
        raw = np.concatenate((self.raw, piece))[-self.chunk.cached_samples :]
        gain = self._next_gain(raw)
        first = gain if self.gain is None else self.gain
        ramp = np.linspace(first or 0.0, gain or 0.0, size + 1)[1:]  # [slice_samples] dB
        gained = (piece * 10 ** (ramp / 20)).astype(np.float32)
        return Ring(self.chunk, np.concatenate((self.samples[size:], gained)), raw, gain)

    def _next_gain(self, raw: NDArray[np.float32]) -> float | None:
        rate = self.chunk.sample_rate
        loudness = _loudness(raw.astype(np.float64), rate, min(GATING_BLOCK, len(raw) / rate))
        if loudness is None:
            return self.gain
        wanted = min(max(TARGET_LUFS - loudness, -MAX_GAIN), MAX_GAIN)
        if self.gain is None:
            return wanted
        max_change = MAX_GAIN_RATE * self.chunk.slice_samples / rate
        return min(max(wanted, self.gain - max_change), self.gain + max_change)


def official_name(key: str) -> str | None:
    """The official name of a speech checkpoint's tensor; None for one of a pre-training head, which nothing needs.

    Older files spell the weight norm `weight_g`, `weight_v`; pre-training checkpoints put `wav2vec2.` in front.
    """
    if key.startswith(("quantizer.", "project_q.", "project_hid.")):
        return None
    name = key.removeprefix("wav2vec2.")
    name = name.replace("conv.weight_g", "conv.parametrizations.weight.original0")
    return name.replace("conv.weight_v", "conv.parametrizations.weight.original1")


class SpeechEncoder(nn.Module):
    """wav2vec 2.0 whose transformer runs at the video's frame rate; the states after each of its layers."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        if config.do_stable_layer_norm:
            raise UserError("do_stable_layer_norm = True is not supported: use a speech encoder such as wav2vec2-base")
        self.config = config
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "do_normalize"}
        self.model = Wav2Vec2Model(Wav2Vec2Config(**settings))
        self.eval()

    def param_map(self) -> dict[str, ParamMapping]:
        """Where the tensors of the official speech checkpoint go."""
        return {name: ParamMapping(tuple(t.shape), (f"model.{name}",)) for name, t in self.model.state_dict().items()}

    def forward(self, wave: Tensor, sample_rate: int, fps: int) -> Tensor:
        """Speech features of each video frame, float32 [N] samples -> float32 [frames, layers, channels].

        frames = trunc(N / sample_rate * fps) in double precision, which for some whole numbers comes out one short.
        The convolution features are interpolated linearly to the frames, first on first and last on last, before the
        transformer. Normalisation, the first convolution's group norm and attention span the whole wave. The state
        before the first layer is left out.
        """
        if wave.ndim != 1 or wave.dtype != torch.float32:
            raise ValueError(f"wave: got {wave.dtype} {tuple(wave.shape)}, wanted float32 [N]")
        frames = math.trunc(len(wave) / sample_rate * fps)
        if frames < 1:
            raise ValueError(f"wave: got {len(wave)} samples, wanted at least one frame of {fps} a second")
        if self.config.do_normalize:
            wave = (wave - wave.mean()) / torch.sqrt(wave.var(correction=0) + 1e-7)
        features = self.model.feature_extractor(wave[None])  # [1, C, T]
        features = F.interpolate(features, size=frames, mode="linear", align_corners=True)
        x, _ = self.model.feature_projection(features.transpose(1, 2))  # [1, frames, D]
        encoder = self.model.encoder
        x = encoder.layer_norm(x + encoder.pos_conv_embed(x))
        states = []
        for layer in encoder.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x  # a tuple before transformers 5
            states.append(x[0])
        return torch.stack(states, dim=1)


def windows(embedding: Tensor, start: int, end: int, width: int = 5) -> Tensor:
    """Each of the frames start .. end - 1 with its neighbours, [n, L, C] -> [end - start, width, L, C].

    out[j, w] = embedding[clamp(start + j + w - width // 2, 0, n - 1)]: the first and the last frame repeat, for
    neighbours as for frames that lie outside themselves.
    """
    frame = torch.arange(start, end, device=embedding.device)[:, None]
    neighbour = torch.arange(width, device=embedding.device) - width // 2
    return embedding[(frame + neighbour).clamp(0, len(embedding) - 1)]


def once_window(embedding: Tensor, index: int, chunk: ChunkConfig) -> Tensor:
    """The window of chunk `index` of a track encoded at once, [n, L, C] -> [frame_num, 5, L, C].

    The frames shown are new_frames index .. + new_frames - 1, behind the motion frames; what lies before the track
    or after it repeats its first or last frame.
    """
    start = index * chunk.new_frames - chunk.motion_frames_num
    return windows(embedding, start, start + chunk.frame_num)


def official_once_chunks(frames: int, chunk: ChunkConfig) -> int:
    """Chunks of the official loop, floor((frames - frame_num) / new_frames); chunk c begins at frame new_frames c."""
    return max(0, (frames - chunk.frame_num) // chunk.new_frames)


def stream_window(encoder: SpeechEncoder, samples: NDArray[np.float32] | Tensor, chunk: ChunkConfig) -> Tensor:
    """The window of the chunk whose sound ends with `samples`, float32 [cached_samples] -> [frame_num, 5, L, C].

    The samples are encoded as they are, on the encoder's device. There is no look-ahead: beyond the last frame it
    repeats, while before the chunk the real frames are at hand.
    """
    if tuple(samples.shape) != (chunk.cached_samples,):
        raise ValueError(f"samples: got {tuple(samples.shape)}, wanted [{chunk.cached_samples}]")
    device = next(encoder.parameters()).device
    wave = pin_memory_for(torch.as_tensor(samples), device).to(device, non_blocking=True)
    embedding = encoder(wave, chunk.sample_rate, chunk.tgt_fps)  # [cached_frames, L, C]
    return windows(embedding, chunk.cached_frames - chunk.frame_num, chunk.cached_frames)
