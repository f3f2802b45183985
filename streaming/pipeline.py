"""The Python API: a portrait and a voice in, frames with their sound out.

    from streaming import TalkingHeadPipeline

    with TalkingHeadPipeline.from_pretrained("SoulX-FlashTalk-14B", precision="fp8-vae") as pipeline:
        for rgb, sound in pipeline.stream("me.jpg", "voice.wav"):
            show(rgb, sound)

`from_pretrained` says what runs where; `stream` and `generate` say what is seen and heard.

Started by torchrun, the same program generates on several GPUs: every process calls the same methods with the same
arguments. Rank 0 opens the files and gives frames; on the other ranks, `generate` writes nothing and `stream` is empty.
"""

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kernels.common import without_autocast
from model.command import check_choice
from model.config import DEFAULT_PROMPT
from model.errors import UserError
from model.files import refuse_to_replace
from model.image import load_image, resize_center_crop
from model.parallel.ranks import Ranks
from model.parallel.rows import RowSplit
from model.parallel.tokens import TokenSplit
from model.portrait import keep_face
from model.sampler import TorchNoise
from model.text import tokenize
from model.weights.checkpoint import Models
from model.weights.digest import digest_of_weights
from streaming.audio_features import AudioFeaturizer, on_stream, once_featurizer, stream_featurizer
from streaming.auto_size import Size, largest_in_time, sizes_like
from streaming.choice import MAX_SIDE, Choice, checked_steps, choose
from streaming.cuda_graphs import CudaGraphs
from streaming.generator import ChunkGenerator
from streaming.live.director import Lag
from streaming.live.face import Way
from streaming.live.opening import open_session, settings_of
from streaming.live.session import Clock, LiveSession, MonotonicClock
from streaming.live.timeline import Event
from streaming.live.voice import Kind
from streaming.ranks import (
    FollowingGenerator,
    LeadingGenerator,
    RankGroup,
    RankLostError,
    facts_of_machine,
    join,
)
from streaming.session import Group, Session, play, run
from streaming.sinks import Sink, open_sink
from streaming.sources import ArraySource, FileSource, Slice, Source
from streaming.timers import StageTimer
from streaming.video_stream import NoSound, VideoStream
from streaming.writer import Progress

MIN_PORTRAIT = 16  # pixels a side

Picture = str | Path | Image.Image | NDArray[np.uint8]
Sound = str | Path | tuple[NDArray[np.floating], int] | Source


class TalkingHeadPipeline:
    """Makes talking-head videos with one set of weights, in one size, one video at a time.

    Attributes:
        config: all dimensions, in the picture's size.
        settings: what was chosen, as JSON values, for reports.
        device: where the networks run.
        timer: the stages of the video that is made, or was made last.
    """

    def __init__(self, choice: Choice) -> None:
        """Use `from_pretrained`."""
        self.config, self.device, self.settings = choice.config, choice.device, choice.settings
        self.timer = StageTimer(choice.device)
        self._choice, self._noise = choice, str(choice.settings["noise"])
        self._models: Models | None = None
        self._generators: dict[tuple[int, Size], ChunkGenerator] = {}  # by denoising steps and picture
        self._busy = False
        self._group: RankGroup | None = None
        self._ranks: Ranks | None = None
        self._leading = 0  # how many `leading` are open

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "tiny",
        *,
        preset: str | None = None,
        device: str | torch.device = "auto",
        precision: str = "auto",
        size: tuple[int, int] | Literal["auto"] | None = None,
        frames: int | None = None,
        steps: int = 4,
        shift: float | None = None,
        color: float = 1.0,
        compiled: bool | None = None,
        wav2vec: str | Path | None = None,
        noise: str = "counter",
        random_weights: bool = False,
        lazy: bool = False,
    ) -> Self:
        """Chooses weights, device and picture, and loads the networks.

        Args:
            model: The folder of a checkpoint, or the name of a preset for a run without one. "tiny" has weights in the
                package; the others need `random_weights`, and draw noise.
            preset: The dimensions of the checkpoint. Default: "flashtalk-14b".
            device: "cpu", "cuda", or "auto": CUDA if there is a GPU.
            precision: "fp32", "bf16", "fp8", "fp8-attn", "fp8-vae", "int8", "int8-vae", or "auto": what the checkpoint
                is made for; else fp32 on a CPU, and on a GPU bf16 or, where that would not fit, fp8, or int8 on a GPU
                without FP8. An FP8 checkpoint is widened where the GPU has no FP8, or another precision is named.
            size: Width and height of the video in pixels, multiples of 16. Default: those of the preset, which the
                student was trained for. "auto" loads the networks, times chunks of some sizes of the preset's format,
                and takes the largest that this machine plays in real time; `settings["measured"]` says what it took.
            frames: Frames of a chunk, of which the first `motion_frames_num` repeat the chunk before. Default: the
                preset's. 1 more than a multiple of 4.
            steps: Denoising steps a chunk, 1 to 1,000; the student was distilled for 4 and 2.
            shift: Of the timesteps, towards noise; above 0. Default: the preset's, 5 in the published code.
            color: How far each frame's colours are moved to the portrait's, 0 to 1.
            compiled: Whether to compile the student, and on a GPU to capture CUDA graphs. Default: on a GPU only, with
                graphs where their memory fits.
            wav2vec: The folder of the speech encoder, if it is neither in the checkpoint nor beside it.
            noise: "counter" is a function of seed, chunk and position, the same on every machine; "torch" draws what
                the published code draws for a seed on such a device, and works without CUDA graphs only.
            random_weights: Whether to run a preset that has no bundled weights without any, for timing.
            lazy: Whether `load` or the first video loads the networks, and not this call.

        Raises:
            UserError: An argument has a value that is not supported, or the GPU cannot multiply in the precision or has
                too little memory for it, or the checkpoint cannot be loaded, or the ranks that torchrun has started
                differ. The message is one line that says what fits.
        """
        device = str(device)
        group = join("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        with nullcontext() if group is None else group.together():
            choice = choose(
                model, preset, device, precision, size, frames, steps, shift, color, compiled, wav2vec, noise,
                random_weights,
            )  # fmt: skip
        pipeline = cls(choice)
        if group is not None:
            pipeline._join(group)
        if not pipeline.follows:
            for note in choice.notes:
                print(f"note: {note}", file=sys.stderr)
        if size == "auto":
            pipeline._take_largest_size()
        if not lazy:
            pipeline.load()
        return pipeline

    def _join(self, group: RankGroup) -> None:
        """Makes this one of the pipelines that generate together; raises `UserError` on all if they cannot."""
        group.agree(facts_of_machine() | self.settings)
        self._group, self._ranks = group, group.layout(self.config.dit.num_heads, self.device.type)
        self.settings["ranks"] = group.world
        if self._noise == "torch":
            raise UserError("noise torch: each GPU would draw its own; use counter")
        TokenSplit.of_grid(self._ranks, self.config.grid, self.device)
        RowSplit.of_rows(self._ranks, self.config.latent_shape[2])

    @without_autocast
    def load(self) -> Models:
        """The networks, which the first call loads. Sets cuDNN's float32 convolutions to full precision."""
        if self._models is None:
            if self._group is not None and self._leading:
                self._group.send(("load",))
            torch.backends.cudnn.allow_tf32 = False
            with nullcontext() if self._group is None else self._group.together():
                models = self._choice.load(self._ranks)
            if self._group is not None:
                networks = {"weights of the student": models.dit, "weights of the VAE": models.vae}
                self._group.agree({name: digest_of_weights([network])[:16] for name, network in networks.items()})
            self._models = models
        return self._models

    @property
    def follows(self) -> bool:
        """Whether this is a rank other than 0, which generates what rank 0 asks for and gives no frames."""
        return self._group is not None and not self._group.leads

    @contextmanager
    def leading(self) -> Iterator[None]:
        """On rank 0, lets the others `follow` until the body ends; without other ranks it does nothing.

        `generate` and `stream` do this themselves. Around them it covers what comes before, such as opening files, so
        that the others end as well if that fails.
        """
        self._leading += 1
        try:
            yield
        finally:
            self._leading -= 1
            if self._group is not None and not self._leading:
                with suppress(RankLostError):
                    self._group.call(("end",))

    def follow(self, **arguments: Any) -> None:
        """On a rank other than 0: generates what rank 0 asks for, until its `leading` ends.

        Raises `UserError` on all ranks if `arguments`, those of `generate` that matter to the result, differ from rank
        0's, and `RankLostError` if another rank has ended.
        """
        assert self._group is not None
        following: dict[Any, FollowingGenerator] = {}
        while (message := self._group.receive())[0] != "end":
            kind, *values = message
            if kind == "load":
                self.load()
            elif kind == "begin":
                self._group.agree(arguments)
                self._resize(*values)
                following.clear()
            else:
                key, *inputs = values
                if key not in following:
                    following[key] = FollowingGenerator(self._generator(*key), self._group)
                following[key].repeat(kind, *inputs)

    @without_autocast
    def portrait(self, image: Picture) -> NDArray[np.uint8]:
        """The portrait in the size of the video, RGB bytes [height, width, 3].

        It is scaled to cover the picture, and its middle is cut out, or a part beside the middle if a face would be cut
        otherwise. `image` is a file that Pillow reads, a Pillow image, or RGB bytes [height, width, 3].
        """
        if isinstance(image, str | Path):
            picture, name = load_image(Path(image)), str(image)
        else:
            picture, name = Image.fromarray(image) if isinstance(image, np.ndarray) else image, "the portrait"
        if min(picture.size) < MIN_PORTRAIT:
            raise UserError(
                f"{name}: {picture.width} x {picture.height} pixels show no portrait; give a larger picture"
            )
        height, width = self.config.chunk.height, self.config.chunk.width
        return (
            resize_center_crop(keep_face(picture.convert("RGB"), height, width), height, width).permute(1, 2, 0).numpy()
        )

    @without_autocast
    def stream(
        self,
        image: Picture,
        audio: Sound,
        *,
        prompt: str | None = None,
        seed: int = 9999,
        steps: int | None = None,
        audio_mode: str = "stream",
        loudness: str = "steady",
    ) -> VideoStream:
        """A video of the portrait speaking the voice, as long as the voice, frame by frame.

        Args:
            image: The portrait: a file that Pillow reads, a Pillow image, or RGB bytes [height, width, 3].
            audio: The voice: a file of sound or film, (samples, rate) with samples [n] or [n, channels] in [-1, 1], or
                a `Source`, which then stays open.
            prompt: What is to be seen. Default: a person talking.
            seed: The same seed gives the same video.
            steps: Denoising steps a chunk. Default: those of `from_pretrained`.
            audio_mode: "stream" hears up to now, as a live session must; "once" hears the whole sound first.
            loudness: In mode "stream", "steady" keeps the gain that a sample entered with; "published" measures the
                last eight seconds anew for every chunk.

        Raises:
            UserError: An argument cannot be used, here or, if the sound turns out to be damaged, while iterating.
            RuntimeError: Another stream of this pipeline is neither finished nor closed.
        """
        if self.follows:
            followed = self._followed(prompt=prompt, seed=seed, audio_mode=audio_mode, loudness=loudness)
            return VideoStream(followed, NoSound(), self.config.chunk.tgt_fps, lambda: None)
        with ExitStack() as stack:
            stack.enter_context(self.leading())
            source = self._open(audio, stack)
            stack.enter_context(self._exclusive())
            run_of = self._session(image, source, prompt, seed, steps, audio_mode, loudness)
            groups = play(*run_of, self.config.chunk, self.timer)
            return VideoStream(groups, source, self.config.chunk.tgt_fps, stack.pop_all().close)

    @without_autocast
    def generate(
        self,
        image: Picture,
        audio: Sound,
        out: str | Path | Sink,
        *,
        prompt: str | None = None,
        seed: int = 9999,
        steps: int | None = None,
        audio_mode: str = "stream",
        loudness: str = "steady",
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> Progress:
        """Writes the video of `stream` to NAME.mp4, to a folder of PNG files, or to a `Sink`, which then stays open.

        Arguments as in `stream`. Encoding runs in a thread of its own, beside the generation. `on_progress` is called
        after every group of frames. Returns what was made and how fast. If the run ends early, by an exception or an
        interruption, everything that was written before is kept.
        """
        chunk = self.config.chunk
        if self.follows:
            self.follow(prompt=prompt, seed=seed, audio_mode=audio_mode, loudness=loudness)
            return Progress()
        with ExitStack() as stack:
            stack.enter_context(self.leading())
            source = self._open(audio, stack)
            if not isinstance(out, Sink):
                refuse_to_replace(out, portrait=image, voice=audio)
                geometry = (chunk.width, chunk.height, chunk.tgt_fps, source.rate, source.channels)
                out = stack.enter_context(open_sink(str(out), *geometry))
            stack.enter_context(self._exclusive())
            run_of = self._session(image, source, prompt, seed, steps, audio_mode, loudness)
            progress = Progress()
            for progress in run(*run_of, out, chunk, self.timer):
                on_progress(progress)
            return progress

    @without_autocast
    def live(
        self,
        image: Picture,
        *,
        prompt: str | None = None,
        seed: int = 9999,
        kind: Kind = "segments",
        lag: Lag | None = None,
        wait_frames: int | None = None,
        max_queued: float = 60.0,
        on_event: Callable[[Event], None] = lambda _: None,
        snapshots: str | Path | None = None,
        resume: str | Path | None = None,
        position: int | None = None,
        clock: Clock | None = None,
    ) -> LiveSession:
        """A session without an end: sound is pushed while it comes, and the portrait listens, speaks and idles.

        Args:
            image: The portrait, as in `stream`.
            prompt: What is to be seen. Default: a person talking.
            seed: The same seed and the same sound, at the same times, give the same video.
            kind: "segments" of a voice agent, which are never dropped, or a "microphone", which is always live.
            lag: What happens where generation is slower than real time. "wait" falls behind; "drop" drops sound of a
                microphone; "smaller" takes fewer steps, and then a smaller picture, which is enlarged. Default: "wait",
                for a microphone "drop".
            wait_frames: Frames of sound that a chunk waits for while more may come. Default: those that a chunk shows.
                Fewer make speech start earlier, and need a machine that generates faster than real time.
            max_queued: Seconds of sound that may wait.
            on_event: Is called with each event, in the thread where it happened.
            snapshots: A file that is replaced by a snapshot for every chunk. A journal beside it has what happened
                since.
            resume: A file of a snapshot: the session goes on after what it had handed over, if the journal is beside
                it. Portrait, prompt, configuration and weights must be the same, and the seed is the snapshot's.
            position: The moment at which a resumed session goes on, because not all that it had handed over has
                arrived. Moments before the snapshot, or before the last interruption, cannot be shown again.
            clock: Another clock than the system's.

        Raises:
            UserError: An argument cannot be used, or the snapshot is of another session.
            RuntimeError: Another video of this pipeline is neither finished nor closed, or this is a rank other than 0,
                which should `follow`.
        """
        settings = settings_of(self.config.chunk, kind, lag, wait_frames, max_queued)
        if self.follows:
            raise RuntimeError("only rank 0 has a live session; call `follow` on the others")
        with ExitStack() as stack:
            stack.enter_context(self.leading())
            stack.enter_context(self._exclusive())
            self.timer.clear()
            portrait = self.portrait(image)
            self.load()
            self._begin_together(prompt=prompt, seed=seed)
            prompt = prompt or DEFAULT_PROMPT
            ways = [(None, None), *(self._cheaper_ways() if settings.lag == "smaller" else ())]
            opened = ExitStack()
            session = open_session(
                settings,
                self.load(),
                [self._way(portrait, prompt, steps, size) for steps, size in ways],
                portrait,
                prompt,
                seed,
                noise=self._noise,
                resume=Path(resume) if resume else None,
                position=position,
                on_event=on_event,
                snapshots=Path(snapshots) if snapshots else None,
                clock=clock or MonotonicClock(),
                release=opened.close,
            )
            opened.push(stack.pop_all())  # this pipeline is busy until the session is closed
            return session

    def _cheaper_ways(self) -> Iterator[tuple[int, Size | None]]:
        """Steps and sizes that take less and less time, for a machine that does not keep up."""
        steps = min(2, self.config.chunk.sample_steps)
        if steps < self.config.chunk.sample_steps:
            yield steps, None
        stride = self.config.vae.spatial_stride * self.config.dit.patch_size[1]
        for share in (0.75, 0.5):
            sides = (self.config.chunk.width, self.config.chunk.height)
            width, height = (max(stride, round(side * share / stride) * stride) for side in sides)
            yield steps, (width, height)

    def _way(self, portrait: NDArray[np.uint8], prompt: str, steps: int | None, size: Size | None) -> Way:
        """A generator of the session's portrait."""
        generator = self._led(steps, size)
        chunk = generator.config.chunk
        picture = resize_center_crop(Image.fromarray(portrait), chunk.height, chunk.width)
        ids = tokenize(prompt, self.config.text, self.config.dit.text_len, self.load().folder)
        return Way(generator, generator.prepare(picture, ids))

    def close(self) -> None:
        """Frees the networks and what belongs to them. A later call loads them again."""
        self._generators.clear()
        self._models = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _take_largest_size(self) -> None:
        """Changes to the largest picture that plays in real time; among several ranks, rank 0 measures."""
        if self.follows:
            self.follow()
        else:
            with self.leading():
                self._measure_sizes()
        if self._group is not None:
            measured: Any = self._group.share(self.settings.get("measured"))
            self._resize(tuple(measured["size"]))
            self.settings["measured"] = measured

    def _measure_sizes(self) -> None:
        chunk, stride = self.config.chunk, self.config.vae.spatial_stride * self.config.dit.patch_size[1]
        preset, duration = (chunk.width, chunk.height), chunk.new_frames / chunk.tgt_fps
        size, seconds = largest_in_time(self._chunk_seconds, sizes_like(*preset, stride, MAX_SIDE), preset, duration)
        self._resize(size)
        self.settings |= {"measured": {"size": list(size), "chunk_s": seconds, "lasts_s": duration}}

    def _resize(self, size: Size) -> None:
        self.config = replace(self.config, chunk=replace(self.config.chunk, width=size[0], height=size[1]))
        self.settings["chunk"] = asdict(self.config.chunk)
        self._generators.clear()

    @without_autocast
    def _chunk_seconds(self, size: Size) -> float:
        """Seconds that a chunk takes in this size, infinity if there is too little memory."""
        self._resize(size)
        chunk = self.config.chunk
        chunks = 3 if self.device.type == "cuda" else 2  # the first compiles, and on a GPU the second records graphs
        hum = np.sin(np.arange(chunks * chunk.slice_samples) / 20, dtype=np.float32)
        grey = np.full((chunk.height, chunk.width, 3), 128, np.uint8)
        try:
            with self.stream(grey, (hum, chunk.sample_rate)) as stream:
                began = time.perf_counter()
                for _ in stream:
                    if stream.frames == (chunks - 1) * chunk.new_frames:
                        began = time.perf_counter()
                return time.perf_counter() - began
        except torch.OutOfMemoryError:
            return math.inf

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One video at a time: they would share the memory of CUDA graphs."""
        if self._busy:
            raise RuntimeError("this pipeline is making another video: finish or close that first")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _open(self, audio: Sound, stack: ExitStack) -> Source:
        """The source of the voice. One that is opened here is closed with the stack, and its warning is a warning."""
        if isinstance(audio, Source):
            return audio
        chunk = self.config.chunk
        source = FileSource(str(audio), chunk) if isinstance(audio, str | Path) else ArraySource(*audio, chunk)
        stack.enter_context(source)
        if source.warning:
            warnings.warn(source.warning, stacklevel=3)
        return source

    def _session(
        self,
        image: Picture,
        source: Source,
        prompt: str | None,
        seed: int,
        steps: int | None,
        audio_mode: str,
        loudness: str,
    ) -> tuple[Session, Iterable[Slice], AudioFeaturizer]:
        """A session at its start, the slices of its sound, and what makes windows of features of them."""
        check_choice("audio_mode", audio_mode, ("stream", "once"))
        check_choice("loudness", loudness, ("steady", "published"))
        portrait = torch.from_numpy(self.portrait(image)).permute(2, 0, 1)
        models, generator, chunk = self.load(), self._led(steps), self.config.chunk
        self._begin_together(prompt=prompt, seed=seed, audio_mode=audio_mode, loudness=loudness)
        self.timer.clear()
        ids = tokenize(prompt or DEFAULT_PROMPT, self.config.text, self.config.dit.text_len, models.folder)
        session = Session(generator, generator.prepare(portrait, ids), seed)
        slices: Iterable[Slice] = source
        if audio_mode == "once":
            slices = list(source)
            featurizer = once_featurizer(models.audio, chunk, slices)
        else:
            featurizer = stream_featurizer(models.audio, chunk, loudness)
        return session, slices, on_stream(featurizer, generator.audio_stream)

    def _begin_together(self, **arguments: Any) -> None:
        """Begins a video on all ranks; raises `UserError` on all if they were given other arguments."""
        if self._group is not None:
            self._group.call(("begin", (self.config.chunk.width, self.config.chunk.height)))
            self._group.agree(arguments)

    def _followed(self, **arguments: Any) -> Iterator[Group]:
        """No frames; follows rank 0 when the first one is asked for."""
        self.follow(**arguments)
        yield from ()

    def _led(self, steps: int | None, size: Size | None = None) -> ChunkGenerator | LeadingGenerator:
        """The generator of this number of steps and size, with those of the other ranks; None: those of `config`."""
        steps = self.config.chunk.sample_steps if steps is None else steps
        size = size or (self.config.chunk.width, self.config.chunk.height)
        generator = self._generator(steps, size)
        return generator if self._group is None else LeadingGenerator(generator, self._group, (steps, size))

    def _generator(self, steps: int, size: Size) -> ChunkGenerator:
        """The generator of this number of steps and size, made when it is first asked for."""
        steps = checked_steps(steps)
        if (steps, size) not in self._generators:
            models = self.load()
            chunk = replace(self.config.chunk, sample_steps=steps, width=size[0], height=size[1])
            config = replace(models.config, chunk=chunk)
            noise = TorchNoise(config.latent_shape, steps, self.device) if self._noise == "torch" else None
            graphs = partial(CudaGraphs, self.device) if self._choice.graphs else None
            spare = self._choice.spare_bytes - sum(made.absorbed_bytes for made in self._generators.values())
            models = replace(models, config=config)
            self._generators[steps, size] = ChunkGenerator(models, self.timer, noise, graphs, self._ranks, spare)
        return self._generators[steps, size]
