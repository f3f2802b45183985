"""`python -m model.distill COMMAND`: synthetic talking heads, and the small networks that are trained on them."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from model import command
from model.distill import audio, codec, reader, report, student, takes, teacher
from model.distill.clips import draw_clip, write_clip
from model.distill.student_network import load_network
from model.distill.training import Budget
from model.errors import UserError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Draws synthetic talking heads with known truth, and trains small networks on them.",
)

Seed = Annotated[int, typer.Option(min=0, help="Decides every random choice.")]
Out = Annotated[Path, typer.Option(help="Folder for checkpoint, curves and weights.")]
Minutes = Annotated[float | None, typer.Option(help="Wall time of the training.")]
Steps = Annotated[int | None, typer.Option(help="Instead of minutes: a fixed length, the same bits every time.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the training in the folder.")]
Threads = Annotated[
    int, typer.Option(min=1, help="Threads of PyTorch; the machine stays usable with one fewer than cores.")
]
Start = Annotated[Path | None, typer.Option(help="Weights to begin with, such as the shipped ones.")]

THREADS = max(1, (os.cpu_count() or 2) - 1)


@app.command(epilog="Example: python -m model.distill data --clips 8 --out out/clips")
def data(
    clips: Annotated[int, typer.Option(min=1, help="How many.")],
    out: Annotated[Path, typer.Option(help="Folder; each clip gets a folder in it.")],
    seed: Seed = 0,
    frames: Annotated[int, typer.Option(min=5, help="Frames of each clip, at 25 per second.")] = 125,
    size: Annotated[int, typer.Option(min=32, help="Pixels of a side.")] = 256,
    held_out: Annotated[bool, typer.Option("--held-out", help="People and voices that no training sees.")] = False,
) -> None:
    """Writes talking heads with their truth: portrait.png, voice.wav, video.mp4 and truth.npz for each clip."""
    for index in range(clips):
        folder = out / f"{seed:04d}-{index:05d}{'-held-out' if held_out else ''}"
        write_clip(draw_clip(seed, index, frames, held_out), folder, size)
        print(f"{index + 1}/{clips} {folder}")


def _train(
    train: Callable[..., object],
    out: Path,
    seed: int,
    minutes: float | None,
    steps: int | None,
    resume: bool,
    threads: int,
) -> None:
    """Runs a training politely: with few threads and a low priority."""
    budget = Budget(steps, minutes)
    torch.set_num_threads(threads)
    os.nice(5)
    train(out, budget, seed, resume)


@app.command("reader", epilog="Example: python -m model.distill reader --minutes 10 --out out/reader")
def train_reader(
    out: Out,
    seed: Seed = 0,
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    threads: Threads = THREADS,
    start: Start = None,
) -> None:
    """Trains the networks that read mouth, lids and pose from pictures."""
    _train(partial(reader.train, start=start), out, seed, minutes, steps, resume, threads)


@app.command("audio", epilog="Example: python -m model.distill audio --minutes 40 --out out/audio")
def train_audio(
    out: Out,
    seed: Seed = 0,
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    threads: Threads = THREADS,
    start: Start = None,
) -> None:
    """Trains the speech encoder that hears the shape of the mouth."""
    _train(partial(audio.train, start=start), out, seed, minutes, steps, resume, threads)


@app.command("codec", epilog="Example: python -m model.distill codec --minutes 120 --out out/codec")
def train_codec(
    out: Out,
    seed: Seed = 0,
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    threads: Threads = THREADS,
    start: Start = None,
) -> None:
    """Trains the video codec, which starts at the linear codec in closed form."""
    _train(partial(codec.train, start=start), out, seed, minutes, steps, resume, threads)


@app.command("takes", epilog="Example: python -m model.distill takes --count 1000 --out out/takes")
def make_takes(
    count: Annotated[int, typer.Option(min=1, help="How many; those in the folder count.")],
    out: Annotated[Path, typer.Option(help="Folder; a megabyte for each take.")],
    seed: Seed = 0,
    held_out: Annotated[bool, typer.Option("--held-out", help="People and voices that no training sees.")] = False,
    threads: Threads = THREADS,
    codec: Annotated[Path | None, typer.Option(help="Another codec than the shipped one.")] = None,
) -> None:
    """Writes talking heads as latents and heard speech, which the student is trained on."""
    torch.set_num_threads(threads)
    os.nice(5)
    takes.make_takes(out, count, seed, held_out, codec)


@app.command("teacher", epilog="Example: python -m model.distill teacher --takes out/takes --minutes 40 --out out/lips")
def train_teacher(
    out: Out,
    takes: Annotated[Path, typer.Option(help="Folder with takes, held-out ones among them.")],
    stage: Annotated[
        str, typer.Option(help="windows: around the mouth, first. streaming: the whole picture, after it.")
    ] = "windows",
    seed: Seed = 0,
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    threads: Threads = THREADS,
    start: Start = None,
    codec: Annotated[Path | None, typer.Option(help="The codec of the takes, if it is not the shipped one.")] = None,
) -> None:
    """Trains the teacher, which draws talking heads in many steps."""
    if stage not in teacher.STAGES:
        raise UserError(f"--stage {stage}: there are {', '.join(teacher.STAGES)}")
    train = partial(teacher.train, start=start, takes=takes, stage=stage, codec=codec)
    _train(train, out, seed, minutes, steps, resume, threads)


@app.command(
    "student", epilog="Example: python -m model.distill student --takes DIR --teacher FILE --minutes 60 --out DIR"
)
def train_student(
    out: Out,
    takes: Annotated[Path, typer.Option(help="Folder with takes, held-out ones among them.")],
    teacher: Annotated[Path, typer.Option(help="Weights of the teacher.")],
    seed: Seed = 0,
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    threads: Threads = THREADS,
    start: Start = None,
    codec: Annotated[Path | None, typer.Option(help="The codec of the takes, if it is not the shipped one.")] = None,
) -> None:
    """Trains the student, which draws a chunk in four steps, on motion frames of its own."""
    train = partial(student.train, teacher=teacher, takes=takes, start=start, codec=codec)
    _train(train, out, seed, minutes, steps, resume, threads)


@app.command("report", epilog="Example: python -m model.distill report --out docs/talking-heads")
def measure(
    out: Annotated[Path, typer.Option(help="Folder for tables and pictures.")],
    photo: Annotated[
        Path | None, typer.Option(help="A square picture of a real face, to measure the codec on.")
    ] = None,
    clips: Annotated[int, typer.Option(min=2, help="How many held-out clips.")] = 48,
) -> None:
    """Measures the networks that ship with the project, and draws sheets to look at."""
    torch.set_num_threads(THREADS)
    for one in report.write_report(out, photo, clips):
        print(f"{one.part:9} {one.name:50} {one.value:.4g} {one.verdict}")


@app.command(epilog="Example: python -m model.distill smoke --out out/smoke")
def smoke(out: Out, seed: Seed = 0) -> None:
    """Runs every stage with a few steps, in less than two minutes on two cores. What it trains is useless."""
    torch.set_num_threads(THREADS)
    write_clip(draw_clip(seed, 0, 33), out / "clip", 128)
    reader.train(out / "reader", Budget(steps=6), seed, clips=4)
    audio.train(out / "audio", Budget(steps=3), seed, batch=1, pool=2, scale_tracks=2, evaluation_tracks=1)
    codec.train(out / "codec", Budget(steps=2), seed, start_clips=2, evaluation_clips=1)
    takes.make_takes(out / "takes", 1, seed)
    takes.make_takes(out / "takes", 2, seed, held_out=True)
    teacher.train(out / "teacher", Budget(steps=2), seed, takes=out / "takes", stage="streaming")
    weights = out / "teacher" / teacher.WEIGHTS
    student.train(out / "student", Budget(steps=1), seed, teacher=weights, takes=out / "takes")
    codec.load_codec(out / "codec" / codec.WEIGHTS.name)
    reader.load_reader(out / "reader" / reader.WEIGHTS.name)
    load_network(out / "student" / student.WEIGHTS)


if __name__ == "__main__":
    sys.exit(command.run_app(app, "the checkpoint is kept; --resume continues"))
