"""Chooses how good a picture a machine has time for."""

from collections.abc import Sequence
from statistics import median

from model.config import ChunkConfig
from streaming.live.face import Quality
from streaming.live.pace import Durations

MEASURED = 5  # chunks before a choice
FITS = 0.9  # share of a chunk's length that generating it may take
BETTER = 0.75  # the same for a quality above the present one, so that the choice does not swing


class QualityChoice:
    """The best of some qualities that keeps up, by measured times.

    Attributes:
        index: of the quality that is chosen.
    """

    def __init__(self, qualities: Sequence[Quality], chunk: ChunkConfig) -> None:
        self.index = 0
        self._qualities, self._lasts = qualities, chunk.new_frames / chunk.tgt_fps

    def choose(self, durations: Durations) -> bool:
        """Chooses anew from the times of chunks of the present quality; returns whether another one was chosen."""
        if len(durations.whole) < MEASURED:
            return False
        last = len(self._qualities) - 1
        before, self.index = self.index, next((i for i in range(last) if self._fits(i, durations)), last)
        return before != self.index

    def _fits(self, index: int, durations: Durations) -> bool:
        share = BETTER if index < self.index else FITS
        return self._predicted(index, durations) <= share * self._lasts

    def _predicted(self, index: int, durations: Durations) -> float:
        """Seconds of a chunk: a step's time each for the steps, the rest is the same, and all grows with the pixels."""
        now, then = self._qualities[self.index], self._qualities[index]
        step = median(durations.step) if durations.step else 0.0
        rest = max(0.0, median(durations.whole) - now.steps * step)
        return (rest + then.steps * step) * (then.width * then.height) / (now.width * now.height)
