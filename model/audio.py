"""From audio samples to the speech features of a chunk: loudness, speech encoder, windows.

Samples are mono float32 in numpy arrays until they enter the speech encoder. There are two modes:

*once*: The whole track is available. It is brought to -23 LUFS and encoded in one pass, and the windows of chunks are
cut from the embedding. The official loop gives frames 28 c .. 28 c + 32 of the audio to chunk c and shows all of its
video frames but the first five, so the lips are five frames ahead of the sound; it also drops a partial last chunk.
`once_window` starts five frames earlier, so that shown frame m gets audio frame m, and it accepts a partial last chunk.

*stream*: The encoder gets the last eight seconds, which move by one slice (the duration of a chunk's new frames) per
chunk. The official loop measures and normalises the loudness of these eight seconds anew for each chunk, so the gain of
one sample changes from chunk to chunk; it also drops a partial last slice. `Ring` fixes the gain of a sample when it
arrives, and pads a partial slice with silence.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.config import AudioConfig, ChunkConfig
from model.errors import UserError
from model.offload import pin_memory_for
from model.param_map import ParamMapping

TARGET_LUFS = -23.0  # loudness of the speech encoder's input
GATING_BLOCK = 0.4  # seconds per gating block of ITU-R BS.1770
MAX_GAIN = 30.0  # dB, up or down, in a `Ring`
MAX_GAIN_RATE = 6.0  # dB per second in a `Ring`: slower than syllables, fast enough to correct a wrong first estimate


def _loudness(wave: NDArray[np.floating], sample_rate: int, block: float) -> float | None:
    """Integrated loudness in LUFS by ITU-R BS.1770, or None where it cannot be measured, as in silence."""
    import pyloudnorm  # imported here because machines that only generate do not need it

    loudness = float(pyloudnorm.Meter(sample_rate, block_size=block).integrated_loudness(wave))
    return loudness if abs(loudness) <= 100 else None


def normalize_loudness(
    wave: NDArray[np.floating], sample_rate: int, target: float = TARGET_LUFS
) -> NDArray[np.floating]:
    """Scales `wave` to the integrated loudness `target` in LUFS: wave * 10^((target - loudness) / 20).

    The loudness is measured by ITU-R BS.1770 (gated, mono). `wave` is float32 or float64 [N]; the result has the same
    dtype and shape and is not clipped. Where the loudness cannot be measured, as in silence, `wave` is returned
    unchanged. Raises `ValueError` if `wave` is shorter than a gating block, 0.4 s.
    """
    if wave.ndim != 1 or len(wave) < GATING_BLOCK * sample_rate:
        raise ValueError(f"wave: got {wave.shape}, wanted [N] of at least {GATING_BLOCK} s at {sample_rate} Hz")
    loudness = _loudness(wave, sample_rate, GATING_BLOCK)
    return wave if loudness is None else wave * 10 ** ((target - loudness) / 20)


@dataclass(frozen=True, eq=False)
class Ring:
    """The last seconds of an audio stream at a steady loudness. Immutable: `append` returns a new ring.

    `append` measures the loudness of the last `cached_samples` samples before any gain, and moves the gain towards -23
    LUFS by at most `MAX_GAIN_RATE`. The gain is interpolated linearly in dB over the new slice, so it has no steps, and
    a sample keeps the gain that it got. The first slice that can be measured gets its gain immediately. Silence does
    not change the gain. The gain is limited to +-`MAX_GAIN`.
    """

    chunk: ChunkConfig
    samples: NDArray[np.float32]  # [cached_samples] with gain applied, the newest last, zeros before the first slice
    raw: NDArray[np.float32]  # [<= cached_samples] without gain, empty before the first slice
    gain: float | None  # of the newest sample in dB; None until a loudness could be measured

    @classmethod
    def empty(cls, chunk: ChunkConfig) -> "Ring":
        """The ring before the first slice."""
        return cls(chunk, np.zeros(chunk.cached_samples, np.float32), np.zeros(0, np.float32), None)

    def append(self, samples: NDArray[np.float32]) -> "Ring":
        """The ring after the next slice, float32 [<= slice_samples], which is padded with silence to slice_samples."""
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

    def without_last(self, count: int, before: "Ring") -> "Ring":
        """This ring without its last `count` samples, at most slice_samples; `before` is the ring that it came from.

        The samples before them keep their gain.
        """
        size = self.chunk.slice_samples
        if not 0 <= count <= size:
            raise ValueError(f"count: got {count}, wanted 0 to {size}")
        whole = np.concatenate((before.samples[:size], self.samples))
        came = np.concatenate((before.raw, self.raw[len(self.raw) - size :]))
        gain = self.gain
        if gain is not None and before.gain is not None:
            gain += (before.gain - gain) * count / size
        end = len(whole) - count
        return Ring(
            self.chunk,
            whole[end - self.chunk.cached_samples : end],
            came[: len(came) - count][-self.chunk.cached_samples :],
            gain,
        )

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
    """The official name of a speech checkpoint's tensor, or None for tensors of pre-training heads, which are not used.

    Older files call the parameters of the weight norm `weight_g` and `weight_v`; pre-training checkpoints prepend
    `wav2vec2.`.
    """
    if key.startswith(("quantizer.", "project_q.", "project_hid.")):
        return None
    name = key.removeprefix("wav2vec2.")
    name = name.replace("conv.weight_g", "conv.parametrizations.weight.original0")
    return name.replace("conv.weight_v", "conv.parametrizations.weight.original1")


class SpeechEncoder(nn.Module):
    """wav2vec 2.0 with its transformer at the video's frame rate; returns the hidden states after each layer.

    With `mouth_outputs` it returns instead what a linear layer makes of the last state: numbers of the mouth, each with
    zero mean and unit variance over the speech that it was trained on. Official checkpoints have no such layer.
    """

    def __init__(self, config: AudioConfig) -> None:
        from transformers import Wav2Vec2Config, Wav2Vec2Model  # which takes seconds

        super().__init__()
        if config.do_stable_layer_norm:
            raise UserError("do_stable_layer_norm = True is not supported: use a speech encoder such as wav2vec2-base")
        self.config = config
        ours = ("do_normalize", "mouth_outputs")
        settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ours}
        self.model = Wav2Vec2Model(Wav2Vec2Config(**settings))
        self.head = nn.Linear(config.hidden_size, config.mouth_outputs) if config.mouth_outputs else None
        self.eval()

    def param_map(self) -> dict[str, ParamMapping]:
        """The map of a speech checkpoint's tensors to the parameters of this module.

        Names are the official ones; `head.weight` and `head.bias` are there only with `mouth_outputs`.
        """
        tensors = self.state_dict().items()
        return {name.removeprefix("model."): ParamMapping(tuple(tensor.shape), (name,)) for name, tensor in tensors}

    def forward(self, wave: Tensor, sample_rate: int, fps: int) -> Tensor:
        """Speech features of each video frame: wave float32 [N] -> float32 [frames, layers, channels].

        The number of frames is trunc(N / sample_rate * fps) in double precision, which rounding makes one too small for
        some N. The features of the convolutions are interpolated linearly to the frames, with the first and last ones
        aligned, before they enter the transformer. The normalisation, the group norm of the first convolution and the
        attention span the whole wave. The state before the first layer is left out. With `mouth_outputs`, the result is
        [frames, 1, mouth_outputs].
        """
        if wave.ndim != 1 or wave.dtype != torch.float32:
            raise ValueError(f"wave: got {wave.dtype} {tuple(wave.shape)}, wanted float32 [N]")
        frames = math.trunc(len(wave) / sample_rate * fps)
        if frames < 1:
            raise ValueError(f"wave: got {len(wave)} samples, wanted enough for one frame at {fps} frames per second")
        return self.encode(wave[None], frames)[0]

    def encode(self, waves: Tensor, frames: int) -> Tensor:
        """`forward` for several waves of one length: float32 [B, N] -> float32 [B, frames, layers, channels]."""
        if self.config.do_normalize:
            variance, mean = torch.var_mean(waves, -1, correction=0, keepdim=True)
            waves = (waves - mean) / torch.sqrt(variance + 1e-7)
        features = self.model.feature_extractor(waves)  # [B, C, T]
        features = F.interpolate(features, size=frames, mode="linear", align_corners=True)
        x, _ = self.model.feature_projection(features.transpose(1, 2))  # [B, frames, D]
        encoder = self.model.encoder
        x = encoder.layer_norm(x + encoder.pos_conv_embed(x))
        states = []
        for layer in encoder.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x  # transformers before version 5 returns a tuple
            states.append(x)
        return self.head(x)[:, :, None] if self.head is not None else torch.stack(states, dim=2)


def windows(embedding: Tensor, start: int, end: int, width: int = 5) -> Tensor:
    """Each of the frames start .. end - 1 with its neighbours, embedding [n, L, C] -> [end - start, width, L, C].

    out[j, w] = embedding[clamp(start + j + w - width // 2, 0, n - 1)]. So the first and the last frame repeat beyond
    the ends of the embedding.
    """
    frame = torch.arange(start, end, device=embedding.device)[:, None]
    neighbour = torch.arange(width, device=embedding.device) - width // 2
    return embedding[(frame + neighbour).clamp(0, len(embedding) - 1)]


def once_window(embedding: Tensor, index: int, chunk: ChunkConfig) -> Tensor:
    """The window of chunk `index` of a track that is encoded at once, embedding [n, L, C] -> [frame_num, 5, L, C].

    The motion frames come first, then the new frames new_frames * index .. new_frames * (index + 1) - 1. The first and
    the last frame of the track repeat beyond its ends.
    """
    start = index * chunk.new_frames - chunk.motion_frames_num
    return windows(embedding, start, start + chunk.frame_num)


def official_once_chunks(frames: int, chunk: ChunkConfig) -> int:
    """Number of chunks in the official loop, floor((frames - frame_num) / new_frames)."""
    return max(0, (frames - chunk.frame_num) // chunk.new_frames)


def stream_window(encoder: SpeechEncoder, samples: NDArray[np.float32] | Tensor, chunk: ChunkConfig) -> Tensor:
    """The window of the chunk that ends with `samples`, float32 [cached_samples] -> [frame_num, 5, L, C].

    The samples are encoded on the encoder's device, without further normalisation of loudness. There is no look-ahead:
    the last frame repeats beyond the end. Before the chunk, the true neighbours are used.
    """
    if tuple(samples.shape) != (chunk.cached_samples,):
        raise ValueError(f"samples: got {tuple(samples.shape)}, wanted [{chunk.cached_samples}]")
    device = next(encoder.parameters()).device
    wave = pin_memory_for(torch.as_tensor(samples), device).to(device, non_blocking=True)
    embedding = encoder(wave, chunk.sample_rate, chunk.tgt_fps)  # [cached_frames, L, C]
    return windows(embedding, chunk.cached_frames - chunk.frame_num, chunk.cached_frames)
