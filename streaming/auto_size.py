"""Finds the largest picture that a machine plays in real time, by timing chunks of some sizes."""

import math
from collections.abc import Callable

TRIALS = 6
SHARE = 0.9  # of the time that a chunk lasts: the rest is for encoding, and for the machine's other work
GROWTH = 1.15  # a chunk's time grows with about this power of the area

Size = tuple[int, int]  # width and height in pixels


def sizes_like(width: int, height: int, stride: int, largest: int) -> list[Size]:
    """Sizes of about the same format, of multiples of `stride` up to `largest`, by area."""
    shorter = min(width, height)
    sizes = set()
    for side in range(4 * stride, largest + 1, stride):
        wide, high = (max(1, round(x * side / shorter / stride)) * stride for x in (width, height))
        if max(wide, high) <= largest:
            sizes.add((wide, high))
    return sorted(sizes, key=math.prod)


def largest_in_time(
    measure: Callable[[Size], float], sizes: list[Size], start: Size, duration: float
) -> tuple[Size, float]:
    """The largest of `sizes`, sorted by area, whose chunk takes at most `SHARE` of its `duration`, and what it takes.

    Args:
        measure: gives the seconds that a chunk of this size takes; infinity if it needs too much memory.
        sizes: what to choose from.
        start: the size to measure first, or about that.
        duration: seconds that a chunk lasts.

    At most `TRIALS` sizes are measured, and the answer is one of these. If none is fast enough, it is the smallest one
    that was measured.
    """
    limit, seconds = SHARE * duration, {}
    low, high = -1, len(sizes)  # sizes up to `low` are fast enough, those from `high` on are not
    index = max((i for i, size in enumerate(sizes) if math.prod(size) <= math.prod(start)), default=0)
    for _ in range(TRIALS):
        taken = seconds[index] = measure(sizes[index])
        low, high = (index, high) if taken <= limit else (low, index)
        if high - low <= 1:
            break
        area = math.prod(sizes[index]) * (limit / taken) ** (1 / GROWTH)
        index = max((i for i, size in enumerate(sizes) if math.prod(size) <= area), default=0)
        index = min(max(index, low + 1), high - 1)
    best = low if low in seconds else min(seconds)
    return sizes[best], seconds[best]
