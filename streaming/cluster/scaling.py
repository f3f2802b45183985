"""How many replicas there are, and how many are wanted.

Ray Serve copies this file to where it decides, so it imports nothing of this project. It keeps the bounds itself, and
waits before it acts.
"""

import math
from dataclasses import dataclass
from typing import Any

SPARE = 1  # sessions for which there is room beside those that are open, so that nobody waits for networks to load


@dataclass(frozen=True)
class Size:
    """How large a cluster is.

    Attributes:
        replicas, most: replicas at least and at most.
        sessions: of each, which has as many copies of the networks.
        ranks: processes of each that generate its one session together, each with a GPU.
        gpus, cpus: of each, in Ray's count; gpus None: one for each rank where there are any.
        idle: seconds for which fewer replicas would do before one ends.
    """

    replicas: int
    most: int
    sessions: int
    ranks: int
    gpus: float | None
    cpus: float
    idle: float = 600.0


def wanted(sessions: float, places: float, replicas: int) -> int:
    """Replicas for so many sessions, if `replicas` of them have so many places."""
    if not replicas or places <= 0:
        return replicas
    return math.ceil((sessions + SPARE) / (places / replicas) - 1e-6)


def by_sessions(context: Any) -> tuple[int, dict[str, Any]]:
    """The policy that Ray Serve calls with an `AutoscalingContext`."""
    metrics = context.aggregated_metrics or {}
    sessions, places = (metrics.get(name) or {} for name in ("sessions", "places"))
    if not places:
        return context.target_num_replicas, {}
    return wanted(sum(sessions.values()), sum(places.values()), len(places)), {}
