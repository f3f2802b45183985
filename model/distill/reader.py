"""Reads the mouth, the lids and the pose back from pictures: small networks that measure what video shows.

Two convolutional networks are trained on rendered stills whose truth is known. `MouthNet` sees a square of 32 x 32
pixels around the mouth and gives the six numbers of the mouth; `FaceNet` sees the whole picture of 128 x 128 pixels and
gives the closure of the lids, yaw, pitch, roll and the place of the mouth, so that generated video can be read as well.

Both see every still alone and know nothing of the sound, so what they read can only come from the picture. Changes of
brightness, colour, sharpness, noise, place and size in training make them robust against codecs.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.distill.clips import Clip, draw_clip
from model.distill.face import MOTION, MOUTH, Identity, draw_identity, mouth_centre, render
from model.distill.metrics import LipSync, lip_sync
from model.distill.training import Budget, Counters, Task
from model.distill.training import train as run_training
from model.weights.trained import FOLDER, load_trained, save_trained

SIZE = 128  # pixels of a picture's side
RADIUS = 16  # half a side of the mouth's square
POSE = ("yaw", "pitch", "roll")
FACE = ("blink", *POSE, "centre_x", "centre_y")
WEIGHTS = FOLDER / "reader.safetensors"

# The networks give (number - mean) / deviation; these are about those of the data, so that all count alike.
MOUTH_MEAN = np.array((0.22, 0.18, 0.11, 0.17, 0.06, 0.07), np.float32)
MOUTH_DEVIATION = np.array((0.22, 0.19, 0.2, 0.34, 0.22, 0.12), np.float32)
FACE_MEAN = np.array((0.3, 0, 0, 0, 64, 91), np.float32)
FACE_DEVIATION = np.array((0.37, 0.075, 0.039, 0.02, 5, 4.5), np.float32)

MIRROR_SIGN = np.array((1, -1, 1, -1, -1, 1), np.float32)  # the numbers of a mirrored face
MIRROR_OFFSET = np.array((0, 0, 0, 0, SIZE, 0), np.float32)

STILL_FRAMES = 99  # frames of a clip from which stills are chosen
PEOPLE = 4  # who move as in the clip: drawing a person is much faster than speaking
WINDOWS, PICTURES = 6, 3  # stills of a person, of the mouth's window and of the whole picture
WINDOW = 48  # pixels of a window's side: the mouth's square with a margin to shift and zoom
MOUTH_BATCH, FACE_BATCH = 48, 20
HELD_OUT_CLIPS = 24

Frames = NDArray[Any]


def mouth_crops(frames: Frames, centres: NDArray[np.floating], radius: int = RADIUS) -> NDArray[np.float32]:
    """Squares around the mouth, by bilinear interpolation.

    Args:
        frames: RGB [T, height, width, 3], uint8 in 0 .. 255 or floating point in 0 .. 1.
        centres: Column and row of the mouth's centre, [T, 2], where whole numbers are borders between pixels. So the
            crop at whole numbers (x, y) is frames[t, y - radius : y + radius, x - radius : x + radius].
        radius: Half a side of the square in pixels.

    Returns:
        float32 [T, 2 radius, 2 radius, 3] in 0 .. 1. Beyond the picture its border is repeated.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    _check_frames(frames)
    if np.shape(centres) != (len(frames), 2):
        raise ValueError(f"centres: got {np.shape(centres)}, wanted [{len(frames)}, 2]")
    steps = np.arange(2 * radius) - radius
    return _bilinear(frames, centres[:, :1] + steps, centres[:, 1:] + steps)


def _check_frames(frames: Frames) -> None:
    pixels = frames.dtype == np.uint8 or np.issubdtype(frames.dtype, np.floating)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not pixels:
        raise ValueError(f"frames: got {frames.dtype} {frames.shape}, wanted uint8 or floating point [T, H, W, 3]")


def _bilinear(frames: Frames, columns: NDArray[np.floating], rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """Frames [T, height, width, 3] at columns [T, w] and rows [T, h] -> float32 [T, h, w, 3] in 0 .. 1.

    Column 0 is the first pixel's centre. Places beyond the picture get its border.
    """
    left, right, x_share = _neighbours(columns, frames.shape[2])
    top, bottom, y_share = _neighbours(rows, frames.shape[1])
    squares = np.empty((len(frames), rows.shape[1], columns.shape[1], 3), np.float32)
    for t, frame in enumerate(frames):
        pixels, x, y = frame.astype(np.float32), x_share[t, :, None], y_share[t, :, None, None]
        lines = pixels[top[t]] * (1 - y) + pixels[bottom[t]] * y
        squares[t] = lines[:, left[t]] * (1 - x) + lines[:, right[t]] * x
    return squares / np.float32(255 if frames.dtype == np.uint8 else 1)


def _neighbours(places: NDArray[np.floating], size: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]:
    """The pixels on both sides of each place, and the share of the second."""
    inside = np.clip(places, 0, size - 1)
    first = np.floor(inside).astype(np.int64)
    return first, np.minimum(first + 1, size - 1), (inside - first).astype(np.float32)


# --- Networks -------------------------------------------------------------------------------------------------------


def _convolution(inputs: int, outputs: int, stride: int = 2, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class MouthNet(nn.Module):
    """Mouth squares [N, 3, 32, 32] in 0 .. 1 -> the six standardised numbers [N, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(3, 16, stride=1),
            _convolution(16, 24),
            _convolution(24, 32),
            _convolution(32, 48),
            nn.Flatten(),
            nn.Linear(48 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, len(MOUTH)),
        )

    def forward(self, squares: Tensor) -> Tensor:
        """Reads mouths."""
        centred = squares - squares.mean((2, 3), keepdim=True)  # the light and the colour of the skin do not matter
        return self.layers(centred / (squares.std((1, 2, 3), keepdim=True) + 0.02))


class FaceNet(nn.Module):
    """Pictures [N, 3, 128, 128] in 0 .. 1 -> the six standardised numbers of `FACE` [N, 6].

    The pose comes from where features are. So some channels become *points*: the mean place under a softmax over a map
    of 32 x 32, which is accurate to a fraction of a pixel.
    """

    def __init__(self, points: int = 24) -> None:
        super().__init__()
        self.begin = nn.Sequential(_convolution(3, 16, kernel=5), _convolution(16, 32))
        self.middle = nn.Sequential(_convolution(32, 32, stride=1), _convolution(32, 32, stride=1))
        self.points = nn.Conv2d(32, points, 1)
        self.shrink = nn.Sequential(_convolution(32, 32), _convolution(32, 48), _convolution(48, 64), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(64 * 4 * 4 + 2 * points, 64), nn.ReLU(), nn.Linear(64, len(FACE)))
        self.register_buffer("places", torch.linspace(-2, 2, 32), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Reads faces."""
        features = self.middle(self.begin(pictures * 2 - 1))
        maps = self.points(features).flatten(2).softmax(2).unflatten(2, (32, 32))
        columns, rows = (maps.sum(2) * self.places).sum(2), (maps.sum(3) * self.places).sum(2)
        return self.head(torch.cat((self.shrink(features), columns, rows), 1))


class ReaderNetwork(nn.Module):
    """Both networks, which are trained and stored together."""

    def __init__(self) -> None:
        super().__init__()
        self.mouth = MouthNet()
        self.face = FaceNet()


# --- Reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """What was read from T frames, all float32: in the units of `model.distill.face.MOTION`, the centre in pixels."""

    mouth: NDArray[np.float32]  # [T, 6] in the order of MOUTH
    blink: NDArray[np.float32]  # [T]
    pose: NDArray[np.float32]  # [T, 3] yaw, pitch, roll
    centre: NDArray[np.float32]  # [T, 2] column and row of the mouth's centre, as read, even if it was given


class Reader:
    """Reads video with trained networks: each picture and its mirror image, of which it takes the mean."""

    def __init__(self, network: ReaderNetwork) -> None:
        self._network = network.eval()

    def read(self, frames: Frames, centres: NDArray[np.floating] | None = None) -> Reading:
        """Reads each frame by itself.

        Args:
            frames: RGB [T, 128, 128, 3], uint8 in 0 .. 255 or floating point in 0 .. 1.
            centres: Column and row of the mouth's centre where they are known, [T, 2]; else they are read as well.

        Raises:
            ValueError: If shapes or dtypes do not fit.
        """
        face = self.read_face(frames)
        mouth = self.read_mouth(mouth_crops(frames, face[:, 4:] if centres is None else centres))
        return Reading(mouth, face[:, 0], face[:, 1:4], face[:, 4:])

    def read_mouth(self, squares: NDArray[np.float32]) -> NDArray[np.float32]:
        """The six numbers of the mouth, [T, 6], from `mouth_crops` of the frames, [T, 32, 32, 3] in 0 .. 1."""
        if squares.shape[1:] != (2 * RADIUS, 2 * RADIUS, 3):
            raise ValueError(f"squares: got {squares.shape}, wanted [T, {2 * RADIUS}, {2 * RADIUS}, 3]")
        seen, mirrored = (_run(self._network.mouth, side) for side in (squares, squares[:, :, ::-1]))
        return ((seen + mirrored) / 2 * MOUTH_DEVIATION + MOUTH_MEAN).astype(np.float32)

    def read_face(self, frames: Frames) -> NDArray[np.float32]:
        """The numbers of `FACE`, [T, 6], from frames as `read` gets them."""
        _check_frames(frames)
        if frames.shape[1:3] != (SIZE, SIZE):
            raise ValueError(f"frames: got {frames.shape}, wanted [T, {SIZE}, {SIZE}, 3]")
        seen, mirrored = (
            _run(self._network.face, side) * FACE_DEVIATION + FACE_MEAN for side in (frames, frames[:, :, ::-1])
        )
        return ((seen + mirrored * MIRROR_SIGN + MIRROR_OFFSET) / 2).astype(np.float32)


def _run(network: nn.Module, frames: Frames) -> NDArray[np.float32]:
    """A network's six numbers for each of the pictures [T, h, w, 3], computed for 64 at a time to keep memory small."""
    if not len(frames):
        return np.zeros((0, 6), np.float32)
    scale = np.float32(255 if frames.dtype == np.uint8 else 1)
    parts = (part.astype(np.float32) / scale for part in np.split(frames, range(64, len(frames), 64)))
    with torch.inference_mode():
        return np.concatenate([network(torch.from_numpy(part).permute(0, 3, 1, 2)).numpy() for part in parts])


def load_reader(path: Path = WEIGHTS) -> Reader:
    """The trained reader of the project, or of another file. Raises `UserError` if the file is missing or another's."""
    network = ReaderNetwork()
    network.load_state_dict(load_trained(path)[0])
    return Reader(network)


def evaluate(
    reader: Reader, clips: Sequence[Clip], frames: Sequence[Frames] | None = None, seed: int = 0
) -> dict[str, dict[str, LipSync]]:
    """How well the reader's numbers follow the truth, for all people and by the tone of their skin.

    Args:
        reader: Reads the frames.
        clips: With the truth; at least eight frames each.
        frames: For each clip [T, 128, 128, 3], such as its frames after a codec; by default the rendered ones.
        seed: Of the intervals.

    Returns:
        By group ("all", and of those that occur "light", "medium" and "dark", thirds of the scale of skin tones) and by
        number: those of `MOUTH` with the mouth's known centre, again with the centre that is read ("open, free"), and
        those of `FACE`.
    """
    read, truth = [], []
    for i, clip in enumerate(clips):
        pictures = clip.frames(SIZE) if frames is None else frames[i]
        centres = mouth_centre(clip.identity, clip.motion, SIZE)
        known, free = reader.read(pictures, centres), reader.read(pictures)
        read.append(np.column_stack((known.mouth, free.mouth, free.blink, free.pose, free.centre)))
        mouth = _named(clip.motion, MOUTH)
        truth.append(np.column_stack((mouth, mouth, _named(clip.motion, ("blink", *POSE)), centres)))
    names = (*MOUTH, *(f"{name}, free" for name in MOUTH), *FACE)
    third = [min(int(clip.identity.skin_tone * 3), 2) for clip in clips]
    groups = {"all": range(len(clips))}
    groups |= {
        name: [i for i in range(len(clips)) if third[i] == k] for k, name in enumerate(("light", "medium", "dark"))
    }
    return {
        name: lip_sync([read[i] for i in group], [truth[i] for i in group], names, seed)
        for name, group in groups.items()
        if group
    }


def _named(motion: NDArray[np.floating], names: Sequence[str]) -> NDArray[np.floating]:
    return motion[:, [MOTION.index(name) for name in names]]


def table(groups: dict[str, dict[str, LipSync]]) -> str:
    """What `evaluate` found as a Markdown table of correlations, with their intervals for all people."""
    lines = ["| | " + " | ".join(groups) + " | lag | spread | bias |", "|---" * (len(groups) + 4) + "|"]
    for name, everyone in groups["all"].items():
        r = everyone.r
        cells = [f"{r.value:.3f} ({r.low:.3f} to {r.high:.3f})"]
        cells += [f"{group[name].r.value:.3f}" for key, group in groups.items() if key != "all"]
        cells += [f"{everyone.lag.value:.0f}", f"{everyone.spread.value:.2f}", f"{everyone.bias.value:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- Training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stills:
    """Stills of many clips with their truth."""

    windows: NDArray[np.uint8]  # [N, 48, 48, 3] around the mouth
    centres: NDArray[np.float32]  # [N, 2] of the mouth in its window
    mouth: NDArray[np.float32]  # [N, 6]
    pictures: NDArray[np.uint8]  # [M, 128, 128, 3]
    face: NDArray[np.float32]  # [M, 6] in the order of FACE


def draw_stills(seed: int, clips: int, held_out: bool = False) -> Stills:
    """Stills of the first clips of a seed, each acted by 4 people: of each, 6 windows of the mouth and 3 pictures."""
    with ThreadPoolExecutor(2) as pool:  # the renderer releases Python's lock
        parts = list(pool.map(lambda index: _stills(draw_clip(seed, index, STILL_FRAMES, held_out)), range(clips)))
    people = [person for part in parts for person in part]
    return Stills(*(np.concatenate([getattr(person, name) for person in people]) for name in Stills.__annotations__))


def _stills(clip: Clip) -> list[Stills]:
    rng = np.random.default_rng([clip.seed, clip.index, clip.held_out, PEOPLE])
    return [
        _stills_of(person, clip.motion, rng)
        for person in (clip.identity, *(draw_identity(rng) for _ in range(PEOPLE - 1)))
    ]


def _stills_of(person: Identity, motion: NDArray[np.float32], rng: np.random.Generator) -> Stills:
    """Stills of one person. The lids are not open in every second picture, if they ever are not."""
    spoken = motion[rng.choice(len(motion), WINDOWS, replace=False)]
    centres = mouth_centre(person, spoken, SIZE)
    corners = np.clip(np.round(centres) - WINDOW // 2, 0, SIZE - WINDOW).astype(int)
    windows = [render(person, spoken[i : i + 1], SIZE, (int(x), int(y), WINDOW)) for i, (x, y) in enumerate(corners)]
    seen = rng.choice(len(motion), PICTURES, replace=False)
    blinking = np.flatnonzero(_named(motion, ("blink",)) > 0.05)
    if len(blinking):
        seen[::2] = rng.choice(blinking, len(seen[::2]))
    faces = motion[seen]
    return Stills(
        windows=np.concatenate(windows),
        centres=centres - corners.astype(np.float32),
        mouth=_named(spoken, MOUTH),
        pictures=render(person, faces, SIZE),
        face=np.column_stack((_named(faces, ("blink", *POSE)), mouth_centre(person, faces, SIZE))),
    )


Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # mouth squares, their numbers, pictures, their numbers


def _batch(stills: Stills, rng: np.random.Generator) -> Batch:
    """Random stills, moved, zoomed, mirrored, recoloured and blurred at random, with standardised truth."""
    i = rng.integers(len(stills.windows), size=MOUTH_BATCH)
    squares, _ = _moved(stills.windows[i], stills.centres[i], 2 * RADIUS, 1.2, 0.08, rng)
    mirrored = rng.random(len(i)) < 0.5
    squares[mirrored] = squares[mirrored, :, ::-1]
    mouth = (stills.mouth[i] - MOUTH_MEAN) / MOUTH_DEVIATION

    j = rng.integers(len(stills.pictures), size=FACE_BATCH)
    middle = np.full((len(j), 2), SIZE / 2, np.float32)
    pictures, place = _moved(stills.pictures[j], middle, SIZE, 3.0, 0.1, rng)
    face = stills.face[j].copy()
    face[:, 4:] = (face[:, 4:] - place[:, :2]) / place[:, 2:] + SIZE / 2
    mirrored = rng.random(len(j)) < 0.5
    pictures[mirrored] = pictures[mirrored, :, ::-1]
    face[mirrored] = face[mirrored] * MIRROR_SIGN + MIRROR_OFFSET
    face = (face - FACE_MEAN) / FACE_DEVIATION
    return _changed(squares, rng), torch.from_numpy(mouth), _changed(pictures, rng), torch.from_numpy(face)


def _moved(
    frames: Frames, centres: NDArray[np.floating], size: int, shift: float, zoom: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Squares of `size` pixels about places near the centres, and for each the place and the step between pixels."""
    places = centres + np.clip(rng.normal(0, shift, centres.shape), -3 * shift, 3 * shift)
    steps = rng.uniform(1 - zoom, 1 + zoom, (len(frames), 1))
    offsets = (np.arange(size) + 0.5 - size / 2) * steps - 0.5
    squares = _bilinear(frames, places[:, :1] + offsets, places[:, 1:] + offsets)
    return squares, np.concatenate((places, steps), 1).astype(np.float32)


def _changed(squares: NDArray[np.float32], rng: np.random.Generator) -> Tensor:
    """Random contrast, tint, blur and noise on [N, h, w, 3]; returns [N, 3, h, w]."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    x = torch.from_numpy(squares).permute(0, 3, 1, 2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    n = len(x)
    for axis in (2, 3):
        strength = torch.rand(n, 1, 1, 1, generator=generator) - 0.4  # below zero, which means none, in two of five
        x = x.lerp((x.roll(1, axis) + x.roll(-1, axis)) / 2, strength.clamp_min(0))
    x = (x - 0.5) * (1 + 0.2 * normal(n, 1, 1, 1)) + 0.5 + 0.06 * normal(n, 1, 1, 1) + 0.04 * normal(n, 3, 1, 1)
    return x + 0.015 * normal(n, 1, 1, 1).abs() * normal(*x.shape)


def _correlations(network: ReaderNetwork, stills: Stills) -> dict[str, float]:
    """The correlation of each number with its truth, and the mean error of the mouth's centre in pixels."""
    reader = Reader(network)
    mouth, face = reader.read_mouth(mouth_crops(stills.windows, stills.centres)), reader.read_face(stills.pictures)
    read, truth = (*mouth.T, *face.T), (*stills.mouth.T, *stills.face.T)
    r = {name: float(np.corrcoef(x, y)[0, 1]) for name, x, y in zip((*MOUTH, *FACE), read, truth, strict=True)}
    return r | {"centre_error": float(np.abs(face[:, 4:] - stills.face[:, 4:]).mean())}


def train(
    folder: Path,
    budget: Budget,
    seed: int = 0,
    resume: bool = False,
    start: Path | None = None,
    clips: int = 500,
    report: Callable[[str], None] = print,
) -> Counters:
    """Trains a reader in `folder`, and writes `reader.safetensors` there, which `load_reader` reads.

    Args:
        folder: For the checkpoint, curves and the result, see `model.distill.training.train`.
        budget: How long, without the minute or two that drawing the stills takes.
        seed: Of people, voices, movement, weights and changes.
        resume: Continues the training in `folder`.
        start: Weights to begin with, such as the shipped ones, instead of random ones.
        clips: How many sentences the stills are of, each spoken by four people.
        report: Gets lines of progress.

    Raises:
        UserError: As for `model.distill.training.train`, and if no clips can be drawn.
    """
    report(f"reader: draws stills of {clips} clips")
    stills, held_out = draw_stills(seed, clips), draw_stills(seed, min(clips, HELD_OUT_CLIPS), held_out=True)
    torch.manual_seed(seed)
    network = ReaderNetwork()
    if start is not None:
        network.load_state_dict(load_trained(start)[0])

    def loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        squares, mouth, pictures, face = batch
        mouth_loss = (network.mouth(squares) - mouth).square().mean()
        face_loss = (network.face(pictures) - face).square().mean()
        return mouth_loss + face_loss, {"mouth_loss": mouth_loss.item(), "face_loss": face_loss.item()}

    def write(counters: Counters) -> None:
        settings = {"seed": seed, "clips": clips, "steps": counters.step}
        save_trained(folder / WEIGHTS.name, network.state_dict(), settings)

    task = Task(
        name="reader",
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.02),
        batch=lambda rng: _batch(stills, rng),
        loss=loss,
        evaluate=lambda _: _correlations(network, held_out),
        write=write,
    )
    return run_training(task, folder, budget, seed, resume, report=report)
