"""Sound of any rate in any pieces, as frames of speech and sound that do not depend on how it was cut.

A resampler that keeps a state of its own could neither be saved nor promise equal bits for other pieces. So each frame
is resampled alone, from its own samples and `CONTEXT` seconds on both sides: it is a function of the samples around it,
and what has to be kept is samples.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import soxr
from numpy.typing import NDArray

from model.config import ChunkConfig
from streaming.decoding import FILE_RATES
from streaming.sources import SOUND_RATE

CONTEXT = 0.02  # seconds; more changes nothing beyond float32's rounding

Samples = NDArray[np.float32]


def mono(pcm: NDArray[np.int16] | NDArray[np.floating]) -> Samples:
    """Samples int16 or floating point, [n], [n, 1] or [n, 2], as float32 [n] in [-1, 1].

    Two channels become their mean. What is beyond full scale, 1 in floating point, is clipped. Raises `ValueError` for
    other arrays, and for samples that are not finite.
    """
    whole = pcm.dtype == np.int16
    one_or_two = pcm.ndim == 1 or (pcm.ndim == 2 and pcm.shape[1] in (1, 2))
    if not one_or_two or not (whole or np.issubdtype(pcm.dtype, np.floating)):
        raise ValueError(
            f"pcm: got {pcm.dtype} {list(pcm.shape)}, wanted int16 or floating-point samples [n], [n, 1] or [n, 2]"
        )
    samples = (pcm if pcm.ndim == 2 else pcm[:, None]).astype(np.float32).mean(1, dtype=np.float32)
    if whole:
        return samples / np.float32(32768)
    if not (finite := np.isfinite(samples)).all():
        raise ValueError(f"pcm: {np.count_nonzero(~finite)} of {len(pcm)} samples are not finite; none were taken")
    return samples.clip(-1, 1)


def check_rate(rate: int) -> None:
    """Raises `ValueError` for a rate that no sound has."""
    if rate not in FILE_RATES:
        raise ValueError(f"rate: got {rate} Hz, wanted {FILE_RATES.start} to {FILE_RATES.stop - 1}")


@dataclass(frozen=True, eq=False)
class Stretch:
    """Sound of one rate, from its first sample on, of which some frames were given. Immutable.

    Frame k of a stretch is samples k * frame_samples and following of it at `chunk.sample_rate`, and the same stretch
    of time at `SOUND_RATE`. It can be given once the samples of the `CONTEXT` behind it are there.
    """

    rate: int  # Hz
    chunk: ChunkConfig
    kept: Samples = field(default_factory=lambda: np.zeros(0, np.float32))  # samples that are still needed
    start: int = 0  # index of the first of them
    given: int = 0  # frames

    @property
    def count(self) -> int:
        """Samples that have come."""
        return self.start + len(self.kept)

    @property
    def speech_samples(self) -> int:
        """Samples at `chunk.sample_rate` that all that has come will make."""
        return (2 * self.count * self.chunk.sample_rate + self.rate) // (2 * self.rate)

    def push(self, samples: Samples) -> tuple["Stretch", list[tuple[Samples, Samples]]]:
        """The stretch with further samples [n], and the frames that can now be given, as (speech, sound)."""
        kept, start, given, frames = np.concatenate((self.kept, samples)), self.start, self.given, []
        while self._end(given) <= start + len(kept):
            frames.append(self._frame(kept, start, given))
            given += 1
            if unneeded := self._begin(given) - start:
                kept, start = kept[unneeded:], start + unneeded
        return replace(self, kept=kept, start=start, given=given), frames

    def rest(self) -> tuple[Samples, Samples]:
        """Speech and sound that were not given yet, of a stretch that has ended: what follows it is silence."""
        missing = self.speech_samples - self.given * self.chunk.frame_samples
        last = self.given - (-missing // self.chunk.frame_samples)
        padded = np.pad(self.kept, (0, max(0, self._end(last) - self.count)))
        speech, sound = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
        for frame in range(self.given, last):
            for parts, part in zip((speech, sound), self._frame(padded, self.start, frame), strict=True):
                parts.append(part)
        factor = SOUND_RATE // self.chunk.sample_rate
        return np.concatenate(speech)[:missing], np.concatenate(sound)[: missing * factor]

    @property
    def _step(self) -> int:
        """Samples after which samples of both outputs fall on a sample of the input again."""
        return self.rate // math.gcd(self.rate, self.chunk.sample_rate)

    def _begin(self, frame: int) -> int:
        """The first sample that a frame is made from."""
        first = frame * self.rate // self.chunk.tgt_fps - math.ceil(CONTEXT * self.rate)
        return max(0, first // self._step * self._step)

    def _end(self, frame: int) -> int:
        """The sample after the last one that a frame is made from."""
        return -(-(frame + 1) * self.rate // self.chunk.tgt_fps) + math.ceil(CONTEXT * self.rate)

    def _frame(self, kept: Samples, start: int, frame: int) -> tuple[Samples, Samples]:
        begin = self._begin(frame)
        around = kept[begin - start : self._end(frame) - start]

        def at(rate: int) -> Samples:
            size = rate // self.chunk.tgt_fps
            first = frame * size - begin * rate // self.rate
            resampled = around if rate == self.rate else soxr.resample(around, self.rate, rate)
            return np.ascontiguousarray(resampled[first : first + size], np.float32)

        return at(self.chunk.sample_rate), at(SOUND_RATE).clip(-1, 1)
