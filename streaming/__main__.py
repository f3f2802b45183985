"""`python -m streaming run`, `live`, `serve` and `cluster`: a portrait and a voice in, a talking video out."""

import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

try:
    from model.command import leave, spell_what_cannot_be_printed
    from model.errors import UserError
    from model.files import check_replaceable, refuse_to_replace, replacing
    from streaming.options import (
        CheckpointOption,
        CompiledOption,
        ConfigOption,
        DeviceOption,
        HostOption,
        IceServerOption,
        IdleOption,
        ImageOption,
        LimitsOption,
        LogJsonOption,
        OriginOption,
        OutOption,
        PortOption,
        PortraitsOption,
        PrecisionOption,
        PresetOption,
        PromptOption,
        ProxyOption,
        QuietOption,
        RandomWeightsOption,
        ReportOption,
        SeedOption,
        SizeOption,
        StepsOption,
        ViewersOption,
        Wav2vecOption,
    )
    from streaming.progress import progress_line, stage, starting
except ImportError as error:  # a package of the same name as one of ours came first
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from streaming.pipeline import TalkingHeadPipeline

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Turns a portrait and a voice into a talking video, chunk by chunk.",
)


def parse_size(text: str | None) -> tuple[int, int] | Literal["auto"] | None:
    """What --size says: "640x320" is a width and a height."""
    if text is None or text == "auto":
        return text
    if not (match := re.fullmatch(r"(\d{1,6})\s*[xX*]\s*(\d{1,6})", text.strip())):
        raise UserError(f"--size {text}: write WIDTHxHEIGHT, such as 448x768, or auto")
    return int(match[1]), int(match[2])


@app.command(
    epilog="Example: python -m streaming run --image examples/portrait.jpg --audio examples/voice.wav --out talk.mp4"
)
def run(
    image: ImageOption,
    audio: Annotated[
        str,
        typer.Option(
            help="Voice: WAV, FLAC, OGG, MP3, M4A, WebM ..., or a film; '-' for standard input: 16-bit mono 16 kHz PCM,"
            " or one of these formats."
        ),
    ],
    out: OutOption,
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    wav2vec: Wav2vecOption = None,
    random_weights: RandomWeightsOption = False,
    size: SizeOption = None,
    prompt: PromptOption = None,
    seed: SeedOption = 9999,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    steps: StepsOption = 4,
    shift: Annotated[float | None, typer.Option(help="Shift of the timesteps towards noise; published: 5.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a chunk, 1 + a multiple of 4; published: 33.")] = None,
    color: Annotated[float, typer.Option(help="How far colours are moved to the portrait's, 0 to 1.")] = 1.0,
    audio_mode: Annotated[
        str, typer.Option(help="stream hears up to now, as a live session must; once hears the whole file first.")
    ] = "stream",
    loudness: Annotated[
        str,
        typer.Option(
            help="steady: a moment of the sound keeps its gain. published: the gain of the last eight seconds is"
            " measured anew for every chunk, as the published code does."
        ),
    ] = "steady",
    noise: Annotated[
        str,
        typer.Option(
            help="counter: a function of the seed, the same on every machine. torch: what the published code draws for"
            " the seed on such a device; not with --compile on a GPU."
        ),
    ] = "counter",
    compiled: CompiledOption = None,
    report: ReportOption = None,
    quiet: QuietOption = False,
    config: ConfigOption = None,  # noqa: ARG001  (read before the other options are)
) -> None:
    """Generates a video of the portrait speaking the voice, as long as the voice."""
    _keep_memory()
    quiet = quiet or not _leads()
    with starting(quiet):  # what takes seconds to import waits until there is something to do
        from streaming.session import report as report_of
        from streaming.sinks import open_sink
        from streaming.sources import open_source

        load = _loader(checkpoint, preset, size, device, precision, steps, compiled, wav2vec, random_weights)
    if _leads():
        refuse_to_replace(out, portrait=image, voice=audio)
    if report is not None and _leads():
        if os.path.realpath(report) in map(os.path.realpath, (image, audio, out)):
            raise UserError(f"--report {report}: that is another of the files named; name a new one")
        _write_whole(report, None)
    pipeline = load(frames=frames, shift=shift, color=color, noise=noise, lazy=True)
    if (measured := pipeline.settings.get("measured")) and _leads():
        _say_size(measured)
    facts = {"prompt": prompt, "seed": seed, "audio_mode": audio_mode, "loudness": loudness}
    if pipeline.follows:
        pipeline.follow(**facts)
        return
    with pipeline.leading():
        chunk, portrait = pipeline.config.chunk, pipeline.portrait(image)
        with (
            open_source(audio, chunk) as source,
            open_sink(out, chunk.width, chunk.height, chunk.tgt_fps, source.rate, source.channels) as sink,
        ):
            if source.warning:
                print("warning:", source.warning, file=sys.stderr)
            compiling = f", compiling for {chunk.width} x {chunk.height}" if pipeline.settings["compiled"] else ""
            with stage(f"loading the models{compiling}", quiet):
                pipeline.load()
            with progress_line(pipeline.timer, chunk.tgt_fps, source.duration, quiet) as on_progress:
                progress = pipeline.generate(portrait, source, sink, **facts, on_progress=on_progress)
    if checkpoint is None:
        print(_limits_of(str(pipeline.settings["preset"])), file=sys.stderr)
    if report is not None:
        values = report_of(progress, pipeline.timer, pipeline.device, pipeline.settings | facts)
        _write_whole(report, json.dumps(values, indent=2) + "\n")


@app.command(
    epilog="Example: arecord -f S16_LE -r 16000 -t raw | python -m streaming live --image examples/portrait.jpg"
    " --kind microphone --out talk.mp4"
)
def live(
    image: ImageOption,
    out: OutOption,
    audio: Annotated[str, typer.Option(help="'-': standard input, raw PCM, signed 16-bit little-endian, mono.")] = "-",
    rate: Annotated[int, typer.Option(help="Samples a second of the sound.")] = 16_000,
    kind: Annotated[
        str,
        typer.Option(
            help="segments: all sound is said, however fast it comes; while a minute of it waits, no more is read."
            " microphone: sound is said at once or dropped."
        ),
    ] = "segments",
    lag: Annotated[
        str | None,
        typer.Option(
            help="Where generation is slower than real time: wait falls behind, drop drops sound of a microphone,"
            " smaller takes fewer steps and then a smaller picture. Default: wait; for a microphone drop."
        ),
    ] = None,
    wait_frames: Annotated[
        int | None,
        typer.Option(help="Frames of sound that a chunk waits for; fewer answer faster. Default: a chunk's, 28."),
    ] = None,
    snapshots: Annotated[
        Path | None, typer.Option(help="Keep a snapshot of the session there, written whenever a chunk is begun.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on from this snapshot.")] = None,
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    wav2vec: Wav2vecOption = None,
    random_weights: RandomWeightsOption = False,
    size: SizeOption = None,
    prompt: PromptOption = None,
    seed: SeedOption = 9999,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    steps: StepsOption = 4,
    compiled: CompiledOption = None,
    report: ReportOption = None,
    quiet: QuietOption = False,
    config: ConfigOption = None,  # noqa: ARG001  (read before the other options are)
) -> None:
    """Generates a video while its sound comes: the portrait listens, speaks and idles, until standard input ends."""
    _keep_memory()
    quiet = quiet or not _leads()
    with starting(quiet):
        from streaming.decoding import FILE_RATES
        from streaming.live.pipe import moments_of_pipe
        from streaming.sinks import open_sink
        from streaming.sources import SOUND_RATE

        load = _loader(checkpoint, preset, size, device, precision, steps, compiled, wav2vec, random_weights)
    if audio != "-" or sys.stdin is None:
        raise UserError(f"--audio {audio}: a live session hears standard input, '-'; `run` takes files")
    if rate not in FILE_RATES:
        raise UserError(f"--rate {rate}: name {FILE_RATES.start} to {FILE_RATES.stop - 1} samples a second")
    refuse_to_replace(out, portrait=image)
    if report is not None:
        refuse_to_replace(report, portrait=image)
        _write_whole(report, None)
    pipeline = load(lazy=True)
    facts = {"prompt": prompt, "seed": seed}
    if pipeline.follows:
        pipeline.follow(**facts)
        return
    with pipeline.leading():
        chunk, portrait = pipeline.config.chunk, pipeline.portrait(image)
        with open_sink(out, chunk.width, chunk.height, chunk.tgt_fps, SOUND_RATE, 1) as sink:
            with stage("loading the models", quiet):
                pipeline.load()
            with pipeline.live(
                portrait,
                **facts,
                kind=kind,  # pyright: ignore[reportArgumentType]  (it checks the words)
                lag=lag,  # pyright: ignore[reportArgumentType]
                wait_frames=wait_frames,
                snapshots=snapshots,
                resume=resume,
                on_event=lambda event: None if quiet else print(_in_words(event), file=sys.stderr),
            ) as session:
                first = session.position
                try:
                    for _ in moments_of_pipe(session, cast(BufferedReader, sys.stdin.buffer), rate, sink):
                        pass
                finally:
                    if report is not None:
                        values = {"settings": pipeline.settings, "first_frame": first, "session": session.stats()}
                        _write_whole(report, json.dumps(values, indent=2) + "\n")
    if checkpoint is None:
        print(_limits_of(str(pipeline.settings["preset"])), file=sys.stderr)


@app.command(epilog="Example: python -m streaming serve, then open the address that it prints")
def serve(
    host: HostOption = "127.0.0.1",
    port: PortOption = 8700,
    sessions: Annotated[
        int, typer.Option(min=1, max=64, help="Sessions at once. Each has networks of its own, and needs their memory.")
    ] = 1,
    viewers: ViewersOption = None,
    idle: IdleOption = None,
    limits: LimitsOption = None,
    portraits: PortraitsOption = None,
    snapshots: Annotated[
        Path | None, typer.Option(help="Keep sessions there, so that they can be resumed after the server has ended.")
    ] = None,
    origin: OriginOption = None,
    proxy: ProxyOption = None,
    ice_server: IceServerOption = None,
    log_json: LogJsonOption = False,
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    wav2vec: Wav2vecOption = None,
    random_weights: RandomWeightsOption = False,
    size: SizeOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    steps: StepsOption = 4,
    compiled: CompiledOption = None,
    quiet: QuietOption = False,
    config: ConfigOption = None,  # noqa: ARG001  (read before the other options are)
) -> None:
    """Serves live sessions: a page to talk to, an HTTP and WebSocket API, WebRTC. Ends at Ctrl-C or SIGTERM.

    Started by torchrun, several GPUs generate one session together, which rank 0 serves.
    """
    _keep_memory()
    quiet = quiet or not _leads()
    with starting(quiet):
        try:
            from streaming.serve.server import Settings, check_port, run, warm
        except ModuleNotFoundError as error:
            raise UserError(f"serve needs the package {error.name}: pip install 'flashtalk-triton[live]'") from error
        from streaming.ranks import check_sessions

        load = _loader(checkpoint, preset, size, device, precision, steps, compiled, wav2vec, random_weights)
    check_sessions(sessions, int(os.environ.get("WORLD_SIZE", 1)))
    settings = Settings.checked(
        host=host,
        port=port,
        limits=limits,
        viewers=viewers,
        idle=idle,
        portraits=portraits,
        snapshots=snapshots,
        origins=origin or [],
        proxies=proxy or [],
        ice_servers=ice_server or [],
        log_json=log_json,
        environment=os.environ,
    )
    if _leads():
        check_port(host, port)
    pipelines: list[TalkingHeadPipeline] = []
    for _ in range(sessions):
        if pipelines:
            with stage("generating a first chunk", quiet):  # so that the next pipeline sees what memory is left
                warm(pipelines[-1], settings.limits)
        with stage("loading the models", quiet):
            pipelines.append(load())
    first = pipelines[0]
    if first.follows:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # all ranks get them; rank 0 decides what ends
            signal.signal(number, signal.SIG_IGN)
        first.follow()
        return
    with first.leading():
        with stage("generating a first chunk", quiet):
            warm(pipelines[-1], settings.limits)
        if checkpoint is None:
            print(_limits_of(str(first.settings["preset"])), file=sys.stderr)
        run(pipelines, settings)


@app.command(epilog="Example: python -m streaming cluster --replicas 2 --snapshots /shared/sessions")
def cluster(
    snapshots: Annotated[
        Path, typer.Option(help="Folder that all machines share. Sessions are kept there, and go on from there.")
    ],
    replicas: Annotated[
        int, typer.Option(min=0, help="Replicas at least. 0: others start them, and this is their front.")
    ] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Replicas at most, as sessions need them. Default: --replicas.")
    ] = None,
    sessions: Annotated[
        int,
        typer.Option(
            min=1, max=64, help="Sessions of a replica at once. Each has networks of its own, and needs their memory."
        ),
    ] = 1,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes of a replica that generate its one session together, each with a GPU.")
    ] = 1,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of a replica, such as 0.5. Default: one for each rank where there are any."),
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="CPU cores that Ray counts for a replica.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster, such as auto or HOST:6379. Default: this machine alone."),
    ] = None,
    overcommit: Annotated[
        bool, typer.Option("--overcommit", help="Begin sessions on replicas where they would not keep up, too.")
    ] = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8700,
    viewers: ViewersOption = None,
    idle: IdleOption = None,
    limits: LimitsOption = None,
    portraits: PortraitsOption = None,
    origin: OriginOption = None,
    proxy: ProxyOption = None,
    ice_server: IceServerOption = None,
    log_json: LogJsonOption = False,
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    wav2vec: Wav2vecOption = None,
    random_weights: RandomWeightsOption = False,
    size: SizeOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    steps: StepsOption = 4,
    compiled: CompiledOption = None,
    quiet: QuietOption = False,
    config: ConfigOption = None,  # noqa: ARG001  (read before the other options are)
) -> None:
    """Serves live sessions by many replicas on many machines, behind one address. Ends at Ctrl-C or SIGTERM."""
    with starting(quiet):
        try:
            from streaming.cluster.command import run
            from streaming.serve.server import Settings
        except ModuleNotFoundError as error:
            raise UserError(
                f"cluster needs the package {error.name}: pip install 'flashtalk-triton[cluster]'"
            ) from error
        from streaming.cluster.scaling import Size
        from streaming.ranks import check_sessions

        load = _loader(checkpoint, preset, size, device, precision, steps, compiled, wav2vec, random_weights)
    check_sessions(sessions, ranks)
    most = max_replicas or replicas
    if most < replicas:
        raise UserError(f"--max-replicas {most} is less than --replicas {replicas}")
    settings = Settings.checked(
        host=host,
        port=port,
        limits=limits,
        viewers=viewers,
        idle=idle,
        portraits=portraits,
        snapshots=snapshots.absolute(),
        origins=origin or [],
        proxies=proxy or [],
        ice_servers=ice_server or [],
        log_json=log_json,
        environment=os.environ,
    )
    if replicas and ray is None:
        load(lazy=True)  # a mistake is found here, before many processes find it
    run(load, Size(replicas, most, sessions, ranks, gpus, cpus), settings, ray, overcommit)


def _loader(
    checkpoint: Path | None,
    preset: str | None,
    size: str | None,
    device: str,
    precision: str,
    steps: int,
    compiled: bool | None,
    wav2vec: Path | None,
    random_weights: bool,
) -> "Callable[..., TalkingHeadPipeline]":
    """Loads the networks that these options name. Imports what takes seconds to import."""
    from streaming.pipeline import TalkingHeadPipeline

    return partial(
        TalkingHeadPipeline.from_pretrained,
        checkpoint or preset or "tiny",
        preset=preset or ("flashtalk-14b" if checkpoint else None),
        device=device,
        precision=precision,
        size=parse_size(size),
        steps=steps,
        compiled=compiled,
        wav2vec=wav2vec,
        random_weights=random_weights,
    )


def _in_words(event: Any) -> str:
    """An event of a session in a line: "playback_started segment 0, index 41, at 12.3"."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    values = (
        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in vars(event).items()
    )
    return f"{name} {', '.join(values)}"


def _leads() -> bool:
    """Whether this process reads, writes and speaks: without torchrun, or as its rank 0."""
    return os.environ.get("RANK", "0") == "0"


def _limits_of(preset: str) -> str:
    """What a preset without a checkpoint cannot do, in one line."""
    from model.config import BUNDLED

    if preset in BUNDLED:
        return (
            f"{preset} knows drawn people of 128 x 128 pixels (examples/portraits); it keeps a photograph only roughly."
        )
    return f"{preset} has random weights: the video is coloured noise, not a face."


def _say_size(measured: dict[str, Any]) -> None:
    width, height = measured["size"]
    took, lasts = measured["chunk_s"], measured["lasts_s"]
    verdict = "plays in real time" if took <= lasts else "is the smallest tried, and not real time"
    found = f"{width}x{height} {verdict}: a chunk of {lasts:.2f} s takes {took:.2f} s"
    print(f"size auto: {found}; --size {width}x{height} spares the measuring", file=sys.stderr)


def _write_whole(path: Path, text: str | None) -> None:
    """Writes the report, whole or not at all; without a text, only tries whether that would be possible."""
    try:
        if text is None:
            check_replaceable(path)
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
    spell_what_cannot_be_printed()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        app(standalone_mode=False)
    except UserError as error:  # all ranks have the same, unless one is lost
        return _fail(str(error) if _leads() or type(error).__name__ == "RankLostError" else "")
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


def console() -> None:
    """The console script `flashtalk`."""
    leave(main())


if __name__ == "__main__":
    console()
