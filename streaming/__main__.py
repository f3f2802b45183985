"""`python -m streaming run`: a portrait and a voice in, a talking video out."""

import ctypes
import errno
import json
import os
import re
import signal
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated

import typer

try:
    from model.command import check_choice
    from model.errors import UserError
    from model.files import replacing
except ImportError as error:  # a package of the same name as one of ours came first
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

MIN_PORTRAIT = 16  # pixels a side
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Turns a portrait and a voice into a talking video, chunk by chunk.",
)


@app.callback()
def _streaming() -> None:
    """Keeps `run` a subcommand while it is the only one."""


@app.command(
    epilog="Example: python -m streaming run --image examples/portrait.jpg --audio examples/voice.wav --out talk.mp4"
)
def run(
    image: Annotated[str, typer.Option(help="Portrait: any picture Pillow reads; the middle is cut out to size.")],
    audio: Annotated[
        str, typer.Option(help="Voice: WAV, FLAC, OGG, MP3 ...; '-' for 16-bit mono 16 kHz PCM on standard input.")
    ],
    out: Annotated[
        str, typer.Option(help="Video: NAME.mp4, a folder for PNG frames, or '-' for raw RGB24 on standard output.")
    ],
    preset: Annotated[
        str | None,
        typer.Option(
            help="Size of the system: tiny (two CPU cores keep up) or flashtalk-14b (the official weights, a GPU)."
            " Default: flashtalk-14b if there are a GPU and a checkpoint, else tiny."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of the official weights. Without one, tiny draws coloured noise.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Run flashtalk-14b without a checkpoint, for timing: noise.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="What is to be seen. Default: a person talking.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same video.")] = 9999,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, bf16, fp8 (the student's linear layers), fp8-attn (its self-attention too), fp8-vae (and a"
            " level of the decoder), or auto: what the checkpoint is made for, bf16 on a GPU, fp32 on a CPU."
        ),
    ] = "auto",
    steps: Annotated[int, typer.Option(help="Denoising steps a chunk; the student was distilled for 4.")] = 4,
    audio_mode: Annotated[
        str, typer.Option(help="stream hears up to now, as a live session must; once hears the whole file first.")
    ] = "stream",
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the student, and record what the GPU does as CUDA graphs: faster, but for a longer start, the"
            " longest on a machine where `python -m model.warm` has not run. Default: on a GPU only.",
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write timings, versions and settings there as JSON.")] = None,
) -> None:
    """Generates a video of the portrait speaking the voice, as long as the voice."""
    _keep_memory()
    # The command line answers at once; what takes seconds to import waits until there is something to do.
    import torch

    from model.compile import load_compiled
    from model.config import DEFAULT_PROMPT, PRECISIONS, PRESETS
    from model.image import load_image, resize_center_crop
    from model.sampler import NUM_TIMESTEPS
    from model.text import tokenize
    from model.weights.checkpoint import load_models, random_models
    from model.weights.quantize import is_fp8_checkpoint
    from streaming.audio_features import on_stream, once_featurizer, stream_featurizer
    from streaming.cuda_graphs import CudaGraphs
    from streaming.generator import ChunkGenerator
    from streaming.progress import show, stage
    from streaming.session import Session
    from streaming.session import report as report_of
    from streaming.session import run as perform
    from streaming.sinks import open_sink
    from streaming.sources import open_source
    from streaming.timers import StageTimer

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if compiled is None:
        compiled = device == "cuda"
    if preset is None:
        preset = "flashtalk-14b" if device == "cuda" and checkpoint else "tiny"
    if precision == "auto":
        quantised = checkpoint is not None and is_fp8_checkpoint(checkpoint)
        precision = "fp8" if quantised else "bf16" if device == "cuda" else "fp32"
    check_choice("--device", device, ("cpu", "cuda"))
    check_choice("--preset", preset, PRESETS)
    check_choice("--precision", precision, PRECISIONS)
    check_choice("--audio-mode", audio_mode, ("stream", "once"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no NVIDIA GPU here; use --device cpu")
    if not 1 <= steps <= NUM_TIMESTEPS:
        raise UserError(f"--steps {steps}: name a number from 1 to {NUM_TIMESTEPS}")
    if checkpoint is None and preset != "tiny" and not random_weights:
        raise UserError(f"--preset {preset} needs --checkpoint FOLDER (or --random-weights, which draws noise)")
    if checkpoint is not None and random_weights:
        raise UserError("--checkpoint and --random-weights exclude each other")
    if report is not None:
        if report.resolve() in {Path(name).resolve() for name in (image, audio, out)}:
            raise UserError(f"--report {report}: that is another of the files named; name a new one")
        _write_whole(report, None)

    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions stay float32

    config = replace(PRESETS[preset], chunk=replace(PRESETS[preset].chunk, sample_steps=steps))
    chunk, where = config.chunk, torch.device(device)
    settings = {
        "preset": preset, "checkpoint": str(checkpoint) if checkpoint else None, "precision": precision,
        "seed": seed, "steps": steps, "audio_mode": audio_mode, "compiled": compiled, "chunk": asdict(chunk),
    }  # fmt: skip
    picture = load_image(Path(image))
    if min(picture.size) < MIN_PORTRAIT:
        raise UserError(f"{image}: {picture.width} x {picture.height} pixels show no portrait; give a larger picture")
    portrait = resize_center_crop(picture, chunk.height, chunk.width)
    with (
        open_source(audio, chunk) as source,
        open_sink(out, chunk.width, chunk.height, chunk.tgt_fps, source.rate, source.channels) as sink,
    ):
        with stage(f"loading the models{f', compiling for {chunk.width} x {chunk.height}' if compiled else ''}"):
            if compiled:
                models = load_compiled(config, checkpoint, where, PRECISIONS[precision])
            elif checkpoint is not None:
                models = load_models(config, checkpoint, where, PRECISIONS[precision])
            else:
                models = random_models(config, where, PRECISIONS[precision])
        timer = StageTimer(where)
        with stage("preparing portrait and prompt"):
            ids = tokenize(prompt or DEFAULT_PROMPT, config.text, config.dit.text_len, models.folder)
            graphs = partial(CudaGraphs, where) if compiled and where.type == "cuda" else None
            generator = ChunkGenerator(models, timer, new_capture=graphs)
            session = Session(generator, generator.prepare(portrait, ids), seed)
        if audio_mode == "once":
            with stage("hearing the whole track"):
                slices = list(source)
                featurizer = once_featurizer(models.audio, chunk, slices)
        else:
            slices, featurizer = source, stream_featurizer(models.audio, chunk)
        played = perform(session, slices, on_stream(featurizer, generator.audio_stream), sink, chunk, timer)
        progress = show(played, timer, chunk.tgt_fps, source.duration)
    if checkpoint is None:
        print(f"{preset} has random weights: the video is coloured noise, not a face.", file=sys.stderr)
    if report is not None:
        _write_whole(report, json.dumps(report_of(progress, timer, where, settings), indent=2) + "\n")


def _write_whole(path: Path, text: str | None) -> None:
    """Writes the report, whole or not at all; without a text, only tries whether that would be possible."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if text is None:
            with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
                return
        with replacing(path) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise UserError(f"--report {path} cannot be written ({error.strerror}); name another place") from error


def _keep_memory() -> None:
    """Spares the CPU the page faults of large tensors that come and go; the tiny preset gains about a tenth.

    Huge pages, where the system offers them, and freed memory that stays with the process (glibc's malloc).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**25)  # its upper limit; larger blocks are mapped and unmapped each time
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class _Interrupted(BaseException):
    """Ctrl-C, a polite kill or a closed terminal; passes what handles exceptions, and closes files on its way."""


def _interrupt(_signal: int, _frame: object) -> None:
    raise _Interrupted


def main() -> int:
    """Runs the command line; a user's mistake ends in one line and exit code 2, an interruption in 130."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        app(standalone_mode=False)
    except UserError as error:
        return _fail(str(error))
    except typer.TyperException as error:
        return _fail(error.format_message())
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        return _fail(_out_of_memory(str(error)))
    except _Interrupted:
        print("interrupted: what was made so far is kept", file=sys.stderr)
        return 130
    return 0


def _out_of_memory(reason: str) -> str:
    """One line of PyTorch's many: what was wanted, what there is, and what takes less."""
    import torch

    wanted = re.search(r"Tried to allocate ([0-9.]+ .iB)", reason)
    more = wanted[1] if wanted else "more"
    used, (_, there) = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()
    return (
        f"the GPU has too little memory: {more} wanted beside {used / 2**30:.1f} GiB, and there are"
        f" {there / 2**30:.1f} GiB for all; --precision fp8-vae needs least, --no-compile less than --compile"
    )


def _fail(message: str) -> int:
    """Prints the message on one line, whatever names and reasons are in it; none if the help has said it all."""
    if message:
        print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
