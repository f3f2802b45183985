"""Measures the networks that ship with the project on people and voices that no training saw, and draws the sheets.

`write_report` makes a folder: `measures.json` has every number with its interval and, where one was agreed on, the
least value that is good enough; `README.md` has the same as tables; the pictures are for looking at.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from model.config import TINY_RANDOM
from model.distill import audio, codec, reader, sheets
from model.distill.clips import Clip, draw_clip
from model.distill.codec import SIZE, load_codec, round_trips, through_codec
from model.distill.face import MOUTH, mouth_centre, render
from model.distill.metrics import Interval, psnr, relative_sync
from model.distill.reader import Reader, load_reader
from model.files import replacing
from model.image import resize_center_crop
from model.machine import cpu_name, package_version
from model.vae import VAE

FRAMES = 33  # of a clip that is measured
STILLS = 8  # that make the fifty round trips
TONES = ("light", "medium", "dark")

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Measure:
    """A number, its 95 % interval over clips, the least value that is good enough, and its unit."""

    part: str
    name: str
    value: float
    low: float = math.nan
    high: float = math.nan
    wanted: float | None = None
    at_most: bool = False  # whether `wanted` is the largest good value instead

    @property
    def verdict(self) -> str:
        """What a table says: "met", "missed", or nothing where no value is wanted."""
        if self.wanted is None:
            return ""
        return "met" if (self.value <= self.wanted if self.at_most else self.value >= self.wanted) else "missed"


def _measure(part: str, name: str, interval: Interval, wanted: float | None = None) -> Measure:
    return Measure(part, name, interval.value, interval.low, interval.high, wanted)


def write_report(
    folder: Path, photo: Path | None, clips: int = 48, report: Callable[[str], None] = print
) -> list[Measure]:
    """Measures everything on `clips` held-out clips of 33 frames, draws the sheets, and writes both to `folder`.

    `photo` is a square picture of a real face for the photograph's numbers, which are left out without it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vae, eyes = load_codec(), load_reader()
    held_out = [draw_clip(0, index, FRAMES, held_out=True) for index in range(clips)]
    report(f"draws {clips} clips")
    rendered = [clip.frames(SIZE) for clip in held_out]
    report("decodes them")
    decoded = [through_codec(vae, frames) for frames in rendered]
    report("measures")
    measures = [
        *_reader_measures(eyes, held_out, rendered),
        *_audio_measures(clips),
        *_codec_measures(vae, eyes, held_out, rendered, decoded),
        *(_photo_measures(vae, photo, folder) if photo else ()),
        *_speed_measures(vae),
    ]
    _write_sheets(folder, vae)
    _write(folder, measures, clips)
    return measures


def _reader_measures(eyes: Reader, clips: Sequence[Clip], frames: Sequence[Frames]) -> Iterator[Measure]:
    """Correlation of what is read with the truth, for all people, and of the opening by skin tone."""
    groups = reader.evaluate(eyes, clips, frames)
    wanted = {"open": 0.97}
    for name, sync in groups["all"].items():
        yield _measure("reader", f"r of {name}", sync.r, wanted.get(name))
    for tone in TONES:
        if tone in groups:
            yield _measure("reader", f"r of open, {tone} skin", groups[tone]["open"].r)


def _audio_measures(clips: int) -> Iterator[Measure]:
    """R^2 in the product's streaming form: all frames of each chunk, and its last two, which hear nothing to come.

    Clean recordings show what the encoder knows of new voices. The others have a room, noise or music in them, which
    hide some of the closures.
    """
    encoder, scale = audio.load_audio()
    wanted = {"open": 0.85, "close": 0.75}
    for where, studio in (("clean", True), ("room and noise", False)):
        voices = audio.Pool(0, clips, held_out=True, kind="speech", studio=studio)
        pairs = audio.hear_streams(encoder, scale, [voices[index] for index in range(clips)])
        for name, score in audio.r_squared(pairs).items():
            yield _measure("audio", f"R2 of {name}, {where}", score, wanted.get(name))
        for name, score in audio.r_squared(pairs, newest=2).items():
            yield _measure("audio", f"R2 of {name}, {where}, last two frames", score)


def _codec_measures(
    vae: VAE, eyes: Reader, clips: Sequence[Clip], frames: Sequence[Frames], decoded: Sequence[Frames]
) -> Iterator[Measure]:
    squares = [
        [_mouths(clip, pictures) for clip, pictures in zip(clips, part, strict=True)] for part in (decoded, frames)
    ]
    plain = [i for i, clip in enumerate(clips) if not clip.identity["textured"]]
    tones = [min(int(clip.identity.skin_tone * 3), 2) for clip in clips]
    groups = {"": plain, ", textured": sorted({*range(len(clips))} - {*plain})}
    groups |= {f", {name} skin": [i for i in plain if tones[i] == tone] for tone, name in enumerate(TONES)}
    for name, chosen in groups.items():
        if chosen:
            whole = psnr([decoded[i] for i in chosen], [frames[i] for i in chosen])
            mouth = psnr([squares[0][i] for i in chosen], [squares[1][i] for i in chosen])
            yield _measure("codec", f"PSNR{name}, dB", whole, None if name else 36)
            yield _measure("codec", f"PSNR in the mouth box{name}, dB", mouth, None if name else 34)
    centres = [mouth_centre(clip.identity, clip.motion, SIZE) for clip in clips]
    read, best = (
        [eyes.read(pictures, c).mouth for pictures, c in zip(part, centres, strict=True)] for part in (decoded, frames)
    )
    truth = [clip.track.mouth for clip in clips]
    wanted = {"open": 0.95, "close": 0.9}
    for name, share in relative_sync(read, best, truth, MOUTH).items():
        yield _measure("codec", f"r of {name}, share of rendered", share, wanted.get(name))
    losses = []
    for pictures in frames[:STILLS]:
        trips = round_trips(vae, pictures[0])
        losses.append(trips[0] - trips[-1])
    name = f"loss of {STILLS} stills in 50 round trips, mean, dB"
    yield Measure("codec", name, float(np.mean(losses)), min(losses), max(losses), 1.0, at_most=True)


def _mouths(clip: Clip, frames: Frames) -> Frames:
    """The mouth boxes of a clip's frames, at whole pixels."""
    wide, high = codec.MOUTH_BOX
    corners = np.round(mouth_centre(clip.identity, clip.motion, SIZE)).astype(int) - (wide, high)
    return np.stack([frame[y : y + 2 * high, x : x + 2 * wide] for frame, (x, y) in zip(frames, corners, strict=True)])


def _photo_measures(vae: VAE, photo: Path, folder: Path) -> Iterator[Measure]:
    """A photograph, sized as the product sizes portraits, as a still of nine frames."""
    picture = resize_center_crop(Image.open(photo).convert("RGB"), SIZE, SIZE).permute(1, 2, 0).byte().numpy()
    frames = np.repeat(picture[None], 9, 0)
    decoded = through_codec(vae, frames)
    value = psnr([decoded], [frames]).value
    sheets.save(
        sheets.sheet(np.stack([picture, decoded[0], decoded[-1]]), 3, ("photo", "first frame", "last frame")),
        folder / "photo.jpg",
    )
    yield Measure("codec", "PSNR of a photograph, dB", value, wanted=33)


def _speed_measures(vae: VAE) -> Iterator[Measure]:
    """Processor times on one thread, the best of several, taken in turns, so that other processes matter little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = VAE(TINY_RANDOM.vae)
    before.prepare_weights()
    times: dict[str, list[float]] = {}
    clip = draw_clip(0, 0, FRAMES, held_out=True)
    with torch.inference_mode():
        latents = {name: torch.randn(9, net.config.z_dim, 16, 16) for name, net in (("codec", vae), ("before", before))}
        for _ in range(8):
            for name, network in (("codec", vae), ("before", before)):
                times.setdefault(name, []).append(_seconds(lambda n=network, z=latents[name]: list(n.decode(z))))
            times.setdefault("render", []).append(_seconds(lambda: render(clip.identity, clip.motion, SIZE)))
    torch.set_num_threads(threads)
    best = {name: min(values) for name, values in times.items()}
    yield Measure("codec", "decoding a chunk, ms", 1e3 * best["codec"])
    yield Measure(
        "codec",
        "decoding a chunk, share of the preset `tiny-random`",
        best["codec"] / best["before"],
        wanted=1,
        at_most=True,
    )
    yield Measure(
        "renderer", "drawing a frame of 128 x 128, ms", 1e3 * best["render"] / FRAMES, wanted=30, at_most=True
    )
    yield Measure("renderer", "frames per second and core", FRAMES / best["render"])


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _write_sheets(folder: Path, vae: VAE) -> None:
    sheets.save(sheets.people(), folder / "people.jpg")
    sheets.save(sheets.mouth_shapes(), folder / "mouth_shapes.jpg")
    clip = next(c for i in range(99) if (c := draw_clip(1, i, FRAMES, held_out=True)).track.kind == "speech")
    sheets.save(sheets.sentence(clip, [lambda frames: frames]), folder / "sentence.jpg")
    sheets.save(
        sheets.sentence(clip, [lambda frames: frames, lambda frames: through_codec(vae, frames)], SIZE),
        folder / "codec.jpg",
    )


def _write(folder: Path, measures: Sequence[Measure], clips: int) -> None:
    machine = f"{cpu_name()}, PyTorch {package_version('torch')}, {date.today().isoformat()}"
    values = [asdict(measure) for measure in measures]
    with replacing(folder / "measures.json") as temporary:
        temporary.write_text(json.dumps({"machine": machine, "clips": clips, "measures": values}, indent=1) + "\n")
    with replacing(folder / "measures.md") as temporary:
        temporary.write_text(_table(measures, machine, clips))


def _table(measures: Sequence[Measure], machine: str, clips: int) -> str:
    lines = [
        "# Measures of the trained networks",
        "",
        f"Written by `python -m model.distill report` on {clips} held-out clips of {FRAMES} frames ({machine}).",
        "",
        "| part | measure | value | 95 % interval | wanted | |",
        "|---|---|---|---|---|---|",
    ]
    for m in measures:
        interval = "" if math.isnan(m.low) else f"{m.low:.4g} to {m.high:.4g}"
        wanted = "" if m.wanted is None else f"{'<=' if m.at_most else '>='} {m.wanted:g}"
        lines.append(f"| {m.part} | {m.name} | {m.value:.4g} | {interval} | {wanted} | {m.verdict} |")
    return "\n".join(lines) + "\n"
