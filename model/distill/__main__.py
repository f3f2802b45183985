"""`python -m model.distill COMMAND`: synthetic talking heads, and the small networks that are trained on them."""

import os
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from model import command
from model.distill import ablation, audio, codec, dmd, reader, report, stages, student, takes, teacher
from model.distill.clips import draw_clip, write_clip
from model.distill.matching import TINY_RECIPE
from model.distill.replicas import torchrun_replicas
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


class Motion(StrEnum):
    """Whose motion latents the chunks of a training follow."""

    OWN = "own"
    TRUE = "true"


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
    with torchrun_replicas():
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


@app.command(
    "dmd", epilog="Example: python -m model.distill dmd --takes DIR --teacher FILE --start FILE --minutes 60 --out DIR"
)
def train_dmd(
    out: Out,
    takes: Annotated[Path, typer.Option(help="Folder with takes, held-out ones among them.")],
    teacher: Annotated[Path, typer.Option(help="Weights of the teacher, with which the critic begins.")],
    start: Annotated[Path | None, typer.Option(help="Weights that the student begins with, or the teacher's.")] = None,
    motion: Annotated[Motion, typer.Option(help="Whose motion latents chunks follow.")] = Motion.OWN,
    chunks: Annotated[int, typer.Option(min=1, help="Of a stream.")] = TINY_RECIPE.chunks,
    causal: Annotated[
        bool, typer.Option("--causal", help="No frame sees later ones; the product has no such form.")
    ] = False,
    seed: Seed = 0,
    minutes: Minutes = None,
    steps: Steps = None,
    resume: Resume = False,
    threads: Threads = THREADS,
    codec: Annotated[Path | None, typer.Option(help="The codec of the takes, if it is not the shipped one.")] = None,
) -> None:
    """Distils a student by distribution matching with self-correction; under torchrun, with a replica a process."""
    recipe = replace(TINY_RECIPE, own_motion=motion == Motion.OWN, chunks=chunks, causal=causal)
    train = partial(dmd.train, teacher=teacher, takes=takes, start=start, recipe=recipe, codec=codec)
    _train(train, out, seed, minutes, steps, resume, threads)


@app.command(
    "ablation",
    epilog="Example: python -m model.distill ablation --takes DIR --teacher FILE --start FILE --steps 500 --out DIR",
)
def run_ablation(
    out: Annotated[Path, typer.Option(help="Folder for the students and what was measured; what is there is kept.")],
    takes: Annotated[Path, typer.Option(help="Folder with takes, held-out ones among them.")],
    teacher: Annotated[Path, typer.Option(help="Weights of the teacher, with which every critic begins.")],
    start: Annotated[Path, typer.Option(help="Weights that every student begins with.")],
    steps: Annotated[int, typer.Option(min=1, help="Of each training; every fifth updates the student.")],
    docs: Annotated[
        Path | None, typer.Option(help="Folder for table and plots, after everything was measured.")
    ] = None,
    chunks: Annotated[int, typer.Option(min=20, help="Of each long stream.")] = 1000,
    streams: Annotated[int, typer.Option(min=2, help="At once.")] = 4,
    arm: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    seed: Seed = 0,
    threads: Threads = THREADS,
) -> None:
    """Trains students on true motion, on streams of 1, 3 and 5 chunks and with a causal mask, and compares them."""
    if unknown := set(arm or ()) - set(ablation.ARMS):
        raise UserError(f"--arm {min(unknown)}: there are {', '.join(ablation.ARMS)}")
    torch.set_num_threads(threads)
    os.nice(5)
    lengths = ablation.Lengths(steps, chunks, streams, min(100, chunks // 2))
    ablation.run(out, takes, teacher, start, lengths, arm or tuple(ablation.ARMS), seed)
    if docs is not None:
        ablation.write(out, docs, lengths)


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


@app.command("all", epilog="Example: python -m model.distill all --out out/distill")
def train_all(out: Out, seed: Seed = 0, threads: Threads = THREADS) -> None:
    """Trains every network, from random weights to the distilled student: seven hours. Call it again to go on."""
    torch.set_num_threads(threads)
    os.nice(5)
    stages.train_all(out, stages.FULL, seed)


@app.command(epilog="Example: python -m model.distill smoke --out out/smoke")
def smoke(out: Out, seed: Seed = 0) -> None:
    """As `all`, with a few steps, in less than two minutes on two cores. What it trains is useless."""
    torch.set_num_threads(THREADS)
    write_clip(draw_clip(seed, 0, 33), out / "clip", 128)
    stages.train_all(out, stages.SMOKE, seed)
    codec.load_codec(out / "codec" / codec.WEIGHTS.name)
    reader.load_reader(out / "reader" / reader.WEIGHTS.name)
    for name in ("student", "dmd"):
        load_network(out / name / student.WEIGHTS)


if __name__ == "__main__":
    command.leave(command.run_app(app, "the checkpoint is kept; --resume continues"))
