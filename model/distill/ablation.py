"""The ablation of self-correction: students that differ in whose motion latents they were trained on, and nothing else.

Each arm begins with the same weights and has the same number of updates, takes and seed. Then it plays long streams
without colour correction, and short ones that are disturbed once. `run` can be stopped and called again: what is there
is not made again. `write` makes tables and pictures of what `run` left.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from model.distill import dmd, sheets
from model.distill.endurance import DISTURBANCES, DISTURBED, Endurance, endure
from model.distill.face import MOUTH
from model.distill.matching import TINY_RECIPE, Recipe
from model.distill.metrics import Interval, drift_ratio, lip_sync, mean_interval
from model.distill.student_network import load_network
from model.distill.takes import load_takes
from model.distill.teacher import Codec
from model.distill.training import CHECKPOINT, Budget
from model.files import replacing
from model.machine import cpu_name, package_version

ARMS: dict[str, Recipe] = {
    "true motion": replace(TINY_RECIPE, own_motion=False),
    "1 chunk": replace(TINY_RECIPE, chunks=1),
    "3 chunks": replace(TINY_RECIPE, chunks=3),
    "5 chunks": TINY_RECIPE,
    "5 chunks, causal": replace(TINY_RECIPE, causal=True),
}
START = "start"  # the students' common start, which is measured as well
RECOVERED = 1.1  # times the undisturbed distance: the disturbance is over
AFTER = 15  # chunks of a disturbed stream after the disturbance
PARTS = 50  # of a long stream, whose means are drawn


@dataclass(frozen=True)
class Lengths:
    """How much is done."""

    steps: int  # of each training; every fifth updates the student
    chunks: int = 1000  # of each stream
    streams: int = 4
    end: int = 100  # chunks at either end of a stream that are compared


def run(
    out: Path,
    takes: Path,
    teacher: Path,
    start: Path,
    lengths: Lengths,
    arms: Sequence[str] = tuple(ARMS),
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> None:
    """Trains and measures the arms in `out`, a folder for each, and their start.

    Raises `UserError` as `model.distill.dmd.train` does.
    """
    for arm in arms:
        folder, recipe = out / arm, ARMS[arm]
        if not (folder / dmd.WEIGHTS).exists():
            resume = (folder / CHECKPOINT).exists()
            dmd.train(folder, Budget(lengths.steps), seed, resume, teacher, start, takes, recipe, report=report)
    held_out, codec = load_takes(takes, held_out=True), Codec.load()
    for arm in (START, *arms):
        folder = out / arm
        folder.mkdir(exist_ok=True)
        student = load_network(start if arm == START else folder / dmd.WEIGHTS)
        for disturbance in ("", *DISTURBANCES):
            path = folder / f"{disturbance or 'undisturbed'}.json"
            if path.exists():
                continue
            report(f"{arm}, {path.stem}")
            chunks = DISTURBED + 1 + AFTER if disturbance else lengths.chunks
            filmed = (0, DISTURBED + 1, DISTURBED + 3) if disturbance else (0, chunks // 10, chunks - 1)
            found, film = endure(
                student,
                held_out,
                codec,
                lengths.streams,
                chunks,
                disturbance,
                arm in ARMS and ARMS[arm].causal,
                filmed,
                seed,
                report,
            )
            pictures = np.concatenate([film[chunk][:2] for chunk in filmed])
            labels = [f"chunk {chunk + 1}" for chunk in filmed for _ in range(2)]
            sheets.save(sheets.sheet(pictures, len(pictures), labels), folder / f"{path.stem}.jpg")
            found.save(path)


@dataclass(frozen=True)
class Row:
    """What is told of an arm."""

    arm: str
    first: Interval  # distance to the portrait in the first chunks, Lab
    last: Interval
    drift: Interval
    sharpness: tuple[float, float]  # first and last chunks
    lips: tuple[Interval, Interval]  # r of the opening, first and last chunks
    recovery: Mapping[str, int | None]  # chunks until a disturbance is over; None: it stays


def row(out: Path, arm: str, end: int) -> Row:
    """Reads an arm's measurements."""
    whole = Endurance.load(out / arm / "undisturbed.json")
    distance = [np.array(stream) for stream in whole.identity]
    sharp = np.array(whole.sharpness)
    lips = [_lips(whole, part) for part in (slice(end), slice(-end, None))]
    return Row(
        arm,
        mean_interval([stream[:end] for stream in distance]),
        mean_interval([stream[-end:] for stream in distance]),
        drift_ratio(distance, end),
        (float(sharp[:, :end].mean()), float(sharp[:, -end:].mean())),
        (lips[0], lips[1]),
        {name: recovery(whole, Endurance.load(out / arm / f"{name}.json")) for name in DISTURBANCES},
    )


def _lips(seen: Endurance, part: slice) -> Interval:
    """r of the opening over some chunks."""
    read, truth = (
        [np.concatenate(stream[part])[:, None] for stream in streams] for streams in (seen.opening, seen.truth)
    )
    return lip_sync(read, truth, MOUTH[:1])[MOUTH[0]].r


def recovery(whole: Endurance, disturbed: Endurance) -> int | None:
    """After how many chunks the distance is at most RECOVERED times the undisturbed one for good, or None."""
    ratio = relative_distance(whole, disturbed)[DISTURBED + 1 :]
    above = np.flatnonzero(ratio > RECOVERED)
    after = int(above[-1]) + 1 if len(above) else 0
    return after if after < len(ratio) else None


def relative_distance(whole: Endurance, disturbed: Endurance) -> NDArray[np.float64]:
    """The mean distance of each chunk over the undisturbed one, as both streams have the same noise and sound."""
    length = len(disturbed.identity[0])
    undisturbed = np.array([stream[:length] for stream in whole.identity])
    return np.array(disturbed.identity).mean(0) / undisturbed.mean(0)


def write(out: Path, docs: Path, lengths: Lengths) -> None:
    """Writes `ablation.md`, `ablation.json` and the plots to `docs`, of the arms that are there."""
    arms = [arm for arm in (START, *ARMS) if (out / arm / "undisturbed.json").exists()]
    rows = [row(out, arm, lengths.end) for arm in arms]
    docs.mkdir(parents=True, exist_ok=True)
    with replacing(docs / "ablation.json") as temporary:
        temporary.write_text(json.dumps([_plain(one) for one in rows], indent=1) + "\n")
    with replacing(docs / "ablation.md") as temporary:
        temporary.write_text(_table(rows, lengths))
    _plot(out, arms, docs / "ablation.png")


def _plain(one: Row) -> dict[str, object]:
    numbers = {name: list(vars(value).values()) for name, value in vars(one).items() if isinstance(value, Interval)}
    lips = [list(vars(interval).values()) for interval in one.lips]
    return {"arm": one.arm, **numbers, "sharpness": one.sharpness, "lips": lips, "recovery": dict(one.recovery)}


def _table(rows: Sequence[Row], lengths: Lengths) -> str:
    machine = f"{cpu_name()}, PyTorch {package_version('torch')}"
    names = "".join(f" {name} |" for name in DISTURBANCES)
    lines = [
        f"{lengths.streams} streams of {lengths.chunks:,} chunks, of which the first and the last {lengths.end} are",
        f"compared. Each student had {lengths.steps // TINY_RECIPE.critic_steps:,} updates ({machine}).",
        "In brackets are 95 % intervals over streams. The last columns have the chunks until a disturbance is over.",
        "",
        f"| arm | distance, first | last | last over first | sharpness | r of the opening, first | last |{names}",
        f"|---|---|---|---|---|---|---|{'---|' * len(DISTURBANCES)}",
    ]
    for one in rows:
        cells = [
            one.arm,
            *(_interval(x) for x in (one.first, one.last, one.drift)),
            f"{one.sharpness[0]:.2f}, {one.sharpness[1]:.2f}",
            *(_interval(x) for x in one.lips),
            *("stays" if chunks is None else str(chunks) for chunks in one.recovery.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _interval(x: Interval) -> str:
    return f"{x.value:.3g} ({x.low:.3g} to {x.high:.3g})"


def _plot(out: Path, arms: Sequence[str], path: Path) -> None:
    """Distance and sharpness over long streams, and the distance after each disturbance."""
    from matplotlib.figure import Figure  # imported here because only this draws

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    upper, lower = (figure.add_subfigure(cell) for cell in figure.add_gridspec(2, 1))
    long = upper.subplots(1, 2)
    short = cast(NDArray[np.object_], lower.subplots(1, len(DISTURBANCES), sharey=True))
    for arm in arms:
        whole = Endurance.load(out / arm / "undisturbed.json")
        for axes, values, name in zip(
            long, (whole.identity, whole.sharpness), ("distance to the portrait, Lab", "sharpness"), strict=True
        ):
            parts = np.array_split(np.mean(values, 0), min(PARTS, len(values[0])))
            places = np.cumsum([len(part) for part in parts]) - len(parts[0]) / 2
            axes.plot(places, [part.mean() for part in parts], label=arm)
            axes.set(title=name, xlabel="chunk")
        for axes, name in zip(short, DISTURBANCES, strict=True):
            ratio = relative_distance(whole, Endurance.load(out / arm / f"{name}.json"))
            axes.plot(np.arange(len(ratio)) - DISTURBED, ratio, label=arm)
            axes.set(title=f"after: {name}", xlabel="chunks after it", xlim=(-2, AFTER))
    short[0].set_ylabel("distance, of the undisturbed")
    long[0].legend(fontsize="small")
    for axes in (*long, *short):
        axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
