"""Speech features of each chunk: from the sound up to now, as a live session must, or from the whole track."""

import math
from collections.abc import Callable

import numpy as np
import pyloudnorm  # noqa: F401  (model.audio imports it when first used: that must not be part of a startup)
import torch
from torch import Tensor

from model.audio import Ring, SpeechEncoder, normalize_loudness, once_window, stream_window
from model.config import ChunkConfig
from streaming.sources import Slice
from streaming.streams import SideStream

# Takes the next slice of sound and gives its chunk's window of features [frame_num, window, layer, channel].
AudioFeaturizer = Callable[[Slice], Tensor]


def stream_featurizer(encoder: SpeechEncoder, chunk: ChunkConfig, loudness: str = "steady") -> AudioFeaturizer:
    """Encodes each slice with the seconds of sound before it, and nothing of what comes after.

    With `loudness` "steady", a sample keeps the gain that it entered with (`Ring`). With "published", the seconds that
    the encoder sees are brought to -23 LUFS anew for every chunk, as the published code does.
    """
    ring = Ring.empty(chunk)

    def steady(item: Slice) -> Tensor:
        nonlocal ring
        ring = ring.append(item.speech)
        return stream_window(encoder, ring.samples, chunk)

    samples = np.zeros(chunk.cached_samples, np.float32)

    def published(item: Slice) -> Tensor:
        nonlocal samples
        piece = np.pad(item.speech, (0, chunk.slice_samples - len(item.speech)))
        samples = np.concatenate((samples[chunk.slice_samples :], piece))
        wave = normalize_loudness(samples.astype(np.float64), chunk.sample_rate).astype(np.float32)
        return stream_window(encoder, wave, chunk)

    return {"steady": steady, "published": published}[loudness]


def once_featurizer(encoder: SpeechEncoder, chunk: ChunkConfig, slices: list[Slice]) -> AudioFeaturizer:
    """Encodes the whole track at once, so that lips can prepare for the sound to come."""
    speech = np.concatenate([item.speech for item in slices])
    # Loudness needs 0.4 s. The encoder makes one frame too few of some lengths, which would stretch the others.
    frames = max(-(-len(speech) // chunk.frame_samples), chunk.tgt_fps // 2)
    while math.trunc(frames * chunk.frame_samples / chunk.sample_rate * chunk.tgt_fps) < frames:
        frames += 1
    speech = np.pad(speech, (0, frames * chunk.frame_samples - len(speech)))
    wave = torch.from_numpy(normalize_loudness(speech, chunk.sample_rate)).float()
    embedding = encoder(wave.to(next(encoder.parameters()).device), chunk.sample_rate, chunk.tgt_fps)
    windows = (once_window(embedding, c, chunk) for c in range(len(slices)))
    return lambda _: next(windows)


def on_stream(featurizer: AudioFeaturizer, stream: SideStream) -> AudioFeaturizer:
    """The featurizer on a stream of its own: a GPU encodes the next slice while it works on the last chunk."""
    ready = stream.record_event()  # after what the featurizer has encoded beforehand

    def featurize(item: Slice) -> Tensor:
        with stream.fork(ready):
            window = featurizer(item)
        stream.join(window)
        return window

    return featurize
