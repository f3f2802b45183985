"""How many sessions a GPU bears, by picture and steps, for docs/cluster.md: projected from the fastest chunk."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.config import PRESETS
from model.errors import UserError
from profiling.analyse.project import PRESET, Projector
from profiling.report.markdown import head, line
from profiling.results import Run
from profiling.tables import duration

LINK, WORLDS = "H100", (1, 2, 4, 8)
SIZES, STEPS = ((256, 448), (320, 640), (448, 768), (720, 1280)), (4, 2)
_HEADS = ("picture", "steps", "a chunk on one GPU", "frames a second", "sessions a GPU", "GPUs a session")


def sizing_table(runs: Sequence[tuple[str, Run]]) -> str:
    """A row for each picture and number of steps."""
    try:
        projector = Projector(runs)
    except UserError as error:
        return f"Nothing can be projected: {error}"
    measured = Path(projector.measured.file).name
    rate = PRESETS[PRESET].chunk.tgt_fps
    lines = [*head(*_HEADS), *_rows(projector, rate)]
    return "\n".join(
        [
            f"Projected for {PRESET} in `{projector.precision}` from the chunk of the {projector.measured.device} in",
            f"[{measured}](../profiling/results/{measured}), by what [Performance](performance.md) assumes:",
            "",
            *lines,
        ]
    )


def _rows(projector: Projector, rate: int) -> Iterator[str]:
    for size in SIZES:
        for steps in STEPS:
            of_worlds = (projector.project(projector.setting(world, LINK, size, steps)) for world in WORLDS)
            alone = next(of_worlds)
            sessions = math.floor(alone.fps / rate)
            enough = next((p for p in itertools.chain([alone], of_worlds) if p.fps >= rate), None)
            yield line(
                f"{size[0]} x {size[1]}", str(steps), duration(alone.chunk), f"{alone.fps:.1f}",
                str(sessions or "less than 1"), str(enough.setting.world) if enough else f"more than {WORLDS[-1]}",
            )  # fmt: skip
