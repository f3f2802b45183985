"""All trainings one after another, from random weights to a student that ships.

A stage whose weights are there is not trained again, and one that has a checkpoint is continued. So a training that was
stopped goes on where it was.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model.distill import audio, codec, dmd, reader, student, takes, teacher
from model.distill.training import CHECKPOINT, Budget


@dataclass(frozen=True)
class Effort:
    """How long each stage is trained, and on how many takes. `options` has further arguments of a stage's `train`."""

    reader: Budget
    audio: Budget
    codec: Budget
    lips: Budget  # the teacher on windows around the mouth
    teacher: Budget  # then on whole pictures
    student: Budget
    dmd: Budget
    takes: int
    held_out_takes: int
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


FULL = Effort(
    reader=Budget(minutes=40),
    audio=Budget(minutes=60),
    codec=Budget(minutes=70),
    lips=Budget(minutes=60),
    teacher=Budget(minutes=90),
    student=Budget(minutes=15),
    dmd=Budget(minutes=60),
    takes=1600,
    held_out_takes=48,
)
SMOKE = Effort(
    reader=Budget(steps=6),
    audio=Budget(steps=3),
    codec=Budget(steps=2),
    lips=Budget(steps=2),
    teacher=Budget(steps=1),
    student=Budget(steps=1),
    dmd=Budget(steps=2),
    takes=1,
    held_out_takes=2,
    options={
        **{stage: {"config": replace(teacher.CONFIG, num_layers=1)} for stage in ("lips", "teacher")},
        "reader": {"clips": 4},
        "audio": {"batch": 1, "pool": 2, "scale_tracks": 2, "evaluation_tracks": 1},
        "codec": {"start_clips": 2, "evaluation_clips": 1},
    },
)


def train_all(out: Path, effort: Effort, seed: int = 0, report: Callable[[str], None] = print) -> None:
    """Trains every network in a folder of its own in `out`.

    Takes are heard by the shipped speech encoder, and progress is measured by the shipped reader. Those that are
    trained here take their places once they are copied to the package. The codec is that of `out`.

    Raises `UserError` as the stages do.
    """

    def stage(name: str, weights: str, train: Callable[..., object], budget: Budget, **more: Any) -> Path:
        folder = out / name
        if not (folder / weights).exists():
            report(f"{name}: begins")
            resume = (folder / CHECKPOINT).exists()
            train(folder, budget, seed, resume, report=report, **more, **effort.options.get(name, {}))
        return folder / weights

    stage("reader", reader.WEIGHTS.name, reader.train, effort.reader)
    stage("audio", audio.WEIGHTS.name, audio.train, effort.audio)
    own_codec = stage("codec", codec.WEIGHTS.name, codec.train, effort.codec)
    takes.make_takes(out / "takes", effort.takes, seed, False, own_codec, report)
    takes.make_takes(out / "takes", effort.held_out_takes, seed, True, own_codec, report)
    data = {"takes": out / "takes", "codec": own_codec}
    lips = stage("lips", teacher.WEIGHTS, teacher.train, effort.lips, stage="windows", **data)
    wise = stage("teacher", teacher.WEIGHTS, teacher.train, effort.teacher, stage="streaming", start=lips, **data)
    start = stage("student", student.WEIGHTS, student.train, effort.student, teacher=wise, **data)
    stage("dmd", dmd.WEIGHTS, dmd.train, effort.dmd, teacher=wise, start=start, **data)
