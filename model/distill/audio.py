"""The speech encoder of the tiny preset: trained on espeak-ng's speech to give the six numbers of the mouth.

It has the product's form (`SpeechEncoder` with six outputs) and is trained as the product runs it: on rings of eight
seconds with the gain of `Ring`, zeros before the beginning of a stream, and nothing after its newest frame.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention

from model.audio import Ring, SpeechEncoder
from model.config import TINY, AudioConfig, ChunkConfig, from_official
from model.distill.face import MOUTH
from model.distill.metrics import Interval, bootstrap
from model.distill.speech import Track, draw_track
from model.distill.training import Budget, Counters, Task
from model.distill.training import train as run_training
from model.weights.trained import FOLDER, load_trained, save_trained

WEIGHTS = FOLDER / "audio.safetensors"
CHUNK = ChunkConfig()  # of every preset: 25 frames per second, rings of eight seconds, 28 new frames per chunk
TRACK_FRAMES = 11 * CHUNK.new_frames  # longer than a ring, so that rings both begin and go on
POOL = 3000  # tracks that a training draws its rings from: ten hours
BATCH = 4
RATE = 2e-3
EARLIER_WEIGHT = 0.5  # in the loss, of the frames that are in the ring only as a context

CONFIG = TINY.audio
_LAYERS = "model.feature_extractor.conv_layers"
_STEEP = 10.0  # before the first activation, so that weak frequencies get through it in proportion, not squared
_SCALE = 16384  # of samples that are kept as int16; +-2 fits


@dataclass(frozen=True, eq=False)
class Heard:
    """A track as the encoder hears it: `wave` int16 [N] with the gain of a `Ring`, and the true `mouth` [frames, 6]."""

    wave: NDArray[np.int16]
    mouth: NDArray[np.float32]
    voice: str
    kind: str


def hear(track: Track) -> Heard:
    """Sends a track, of whole slices, through a `Ring`."""
    ring = Ring.empty(CHUNK)
    pieces = []
    for piece in track.wave.reshape(-1, CHUNK.slice_samples):
        ring = ring.append(piece)
        pieces.append(ring.samples[-CHUNK.slice_samples :])
    wave = np.clip(np.concatenate(pieces) * _SCALE, -32768, 32767).astype(np.int16)
    return Heard(wave, track.mouth, track.voice, track.kind)


class Pool:
    """Tracks of a seed by number, each drawn when it is first asked for and then kept."""

    def __init__(
        self, seed: int, size: int, held_out: bool = False, kind: str | None = None, studio: bool = False
    ) -> None:
        self.seed, self.size, self.held_out, self.kind, self.studio = seed, size, held_out, kind, studio
        self._tracks: dict[int, Heard] = {}

    def __getitem__(self, index: int) -> Heard:
        if index not in self._tracks:
            rng = np.random.default_rng([self.seed, index, self.held_out])
            self._tracks[index] = hear(draw_track(rng, TRACK_FRAMES, self.held_out, self.kind, self.studio))
        return self._tracks[index]


def ring_at(heard: Heard, end: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The ring whose newest frame is `end` - 1, and the mouth of its frames: float32 [cached_samples], [frames, 6].

    Before the track are zeros and a closed mouth.
    """
    frames = min(end, CHUNK.cached_frames)
    wave = np.zeros(CHUNK.cached_samples, np.float32)
    mouth = np.zeros((CHUNK.cached_frames, len(MOUTH)), np.float32)
    wave[-frames * CHUNK.frame_samples :] = heard.wave[(end - frames) * CHUNK.frame_samples : end * CHUNK.frame_samples]
    mouth[-frames:] = heard.mouth[end - frames : end]
    return wave / np.float32(_SCALE), mouth


def draw_rings(pool: Pool, batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Rings at random moments of random tracks: waves [B, 640 F] and mouths [B, F, 6].

    Half of the batches are `batch` whole rings. The others are the newest quarters of four times as many, because many
    voices in a step teach more than long ones. Every other wave is upside down, as microphones may be.
    """
    quarter = rng.random() < 0.5
    frames = CHUNK.cached_frames // 4 if quarter else CHUNK.cached_frames
    rings = []
    for _ in range(4 * batch if quarter else batch):
        wave, mouth = ring_at(pool[int(rng.integers(pool.size))], int(rng.integers(CHUNK.new_frames, TRACK_FRAMES + 1)))
        wave, mouth = wave[-frames * CHUNK.frame_samples :], mouth[-frames:]
        rings.append((wave if rng.random() < 0.5 else -wave, mouth))
    waves, mouths = zip(*rings, strict=True)
    return torch.from_numpy(np.stack(waves)), torch.from_numpy(np.stack(mouths))


@dataclass(frozen=True)
class MouthScale:
    """Mean and deviation of the six numbers of the mouth over training speech, [6] each. The encoder's outputs are
    standardised by them: mouth = mean + deviation * output."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def measured(cls, mouths: Sequence[NDArray[np.float32]]) -> "MouthScale":
        """The scale of mouths [frames, 6]. A number that hardly varies has a deviation of 0.01."""
        numbers = np.concatenate(mouths).astype(np.float64)
        return cls(tuple(numbers.mean(0).tolist()), tuple(np.maximum(numbers.std(0), 0.01).tolist()))

    def standardised(self, mouth: Tensor) -> Tensor:
        """(mouth - mean) / deviation, [..., 6]."""
        return (mouth - torch.tensor(self.mean)) / torch.tensor(self.deviation)

    def mouth(self, outputs: Tensor) -> Tensor:
        """The inverse of `standardised`, limited to 0 to 1."""
        return (outputs * torch.tensor(self.deviation) + torch.tensor(self.mean)).clamp(0, 1)


def new_encoder(config: AudioConfig = CONFIG) -> SpeechEncoder:
    """An untrained encoder without dropout whose first two convolutions begin as a filter bank.

    The first has short tones under a Hann window, at frequencies that are even on the mel scale, with four phases each,
    and makes up for the fall of speech towards high frequencies. Its last four channels are constants: what the
    normalisation over channels makes of them says how loud a moment is. The second adds up the four phases of each
    frequency, which after the activation is its level, and mixes these levels at random. The first keeps its filters in
    training, which is then faster by a third.
    """
    encoder = SpeechEncoder(config)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, Wav2Vec2Attention):
            module.dropout = 0.0
    for module in encoder.model.encoder.layers.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)  # the usual deviation of 0.02 is too small for few channels
    bands, width = config.conv_dim[0] // 4 - 1, config.conv_kernel[0]
    mel = torch.linspace(_mel(80), _mel(7400), bands)
    frequency = 700 * (10 ** (mel / 2595) - 1)
    time = (torch.arange(width) - width / 2) / CHUNK.sample_rate
    angle = 2 * torch.pi * (frequency[:, None, None] * time + torch.arange(4)[:, None] / 4)  # [bands, 4, width]
    filters = torch.cos(angle) * torch.hann_window(width)
    emphasis = (frequency / 500).clamp(min=0.6) ** 1.3
    filters *= emphasis[:, None, None] / filters.square().sum(-1, keepdim=True).sqrt()
    state = encoder.state_dict()
    with torch.no_grad():
        state[f"{_LAYERS}.0.conv.weight"].zero_()[: 4 * bands] = filters.reshape(-1, 1, width)
        state[f"{_LAYERS}.0.conv.bias"].zero_()[4 * bands :] = torch.tensor([0.03, 0.1, 0.3, 1.0])
        state[f"{_LAYERS}.0.layer_norm.weight"].fill_(_STEEP)
        mixture = state[f"{_LAYERS}.1.conv.weight"]  # [outputs, 4 bands + 4, taps]
        levels = torch.randn(len(mixture), bands) / bands**0.5
        levels[:bands] = torch.eye(bands)[: len(mixture)]
        mixture[:, : 4 * bands] = levels.repeat_interleave(4, 1)[:, :, None] / mixture.shape[2]
    encoder.model.freeze_feature_encoder()  # else the gradient of the samples would be computed as well
    encoder.requires_grad_(True)
    encoder.get_parameter(f"{_LAYERS}.0.conv.weight").requires_grad_(False)
    return encoder


def _mel(frequency: float) -> float:
    return 2595 * math.log10(1 + frequency / 700)


def mouth_loss(
    encoder: SpeechEncoder, scale: MouthScale, waves: Tensor, mouths: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The squared error of the standardised numbers, in which the newest frames of a ring count most."""
    outputs = encoder.encode(waves, mouths.shape[1])[:, :, 0]
    errors = (outputs - scale.standardised(mouths)).square().mean((0, 2))  # [frames]
    weights = torch.full_like(errors, EARLIER_WEIGHT)
    weights[-CHUNK.frame_num :] = 1
    newest = errors[-CHUNK.frame_num :].mean().item()
    return (errors * weights).sum() / weights.sum(), {"newest": newest}


def hear_streams(encoder: SpeechEncoder, scale: MouthScale, tracks: Sequence[Heard]) -> list[NDArray[np.float32]]:
    """What the encoder hears chunk by chunk, and the truth: for each track [2, chunks, frame_num, 6]."""
    pairs = []
    with torch.inference_mode():
        for heard in tracks:
            ends = range(CHUNK.new_frames, len(heard.mouth) + 1, CHUNK.new_frames)
            waves, mouths = zip(*(ring_at(heard, end) for end in ends), strict=True)
            outputs = encoder.encode(torch.from_numpy(np.stack(waves)), CHUNK.cached_frames)[:, -CHUNK.frame_num :, 0]
            pairs.append(np.stack((scale.mouth(outputs).numpy(), np.stack(mouths)[:, -CHUNK.frame_num :])))
    return pairs


def r_squared(pairs: Sequence[NDArray[np.float32]], newest: int = CHUNK.frame_num) -> dict[str, Interval]:
    """R^2 of each number of the mouth over the newest frames of all chunks, 1 - errors / variance, with its interval.

    `pairs` are those of `hear_streams`. The interval is a bootstrap over tracks.
    """
    scores = {}
    for column, name in enumerate(MOUTH):
        sums = []
        for heard, true in (pair[:, :, -newest:, column].reshape(2, -1).astype(np.float64) for pair in pairs):
            sums.append((np.square(true - heard).sum(), np.square(true).sum(), true.sum(), len(true)))
        scores[name] = bootstrap(_r_squared, np.array(sums))
    return scores


def _r_squared(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    errors, squares, total, count = np.moveaxis(sums, -1, 0)
    return 1 - errors / np.maximum(squares - total**2 / count, 1e-9)


def train(
    folder: Path,
    budget: Budget,
    seed: int = 0,
    resume: bool = False,
    start: Path | None = None,
    config: AudioConfig = CONFIG,
    batch: int = BATCH,
    pool: int = POOL,
    scale_tracks: int = 60,
    evaluation_tracks: int = 24,
    report: Callable[[str], None] = print,
) -> Counters:
    """Trains the encoder in `folder`, and writes its weights there when the budget is used up.

    Each step sees `batch` rings, drawn from `pool` tracks of 12 s. The scale of the outputs is that of `scale_tracks`
    tracks of speech. The logged R^2 are those of `evaluation_tracks` tracks of held-out voices. `start` names weights
    to begin with, such as the shipped ones, instead of random ones; their scale is kept.

    Raises:
        UserError: espeak-ng is not installed, or what `training.train` raises.
    """
    torch.manual_seed(seed)
    encoder = new_encoder(config)
    tracks = Pool(seed, pool)
    if start is None:
        scale = MouthScale.measured([Pool(seed, pool, kind="speech")[index].mouth for index in range(scale_tracks)])
    else:
        before, scale = load_audio(start)
        encoder.load_state_dict(before.state_dict())
    held_out = Pool(seed, evaluation_tracks, held_out=True, kind="speech")
    heard = [held_out[index] for index in range(evaluation_tracks)]

    def scores() -> dict[str, float]:
        pairs = hear_streams(encoder, scale, heard)
        return {f"R2 {name}": score.value for name, score in r_squared(pairs).items()}

    task = Task(
        name="audio",
        network=encoder,
        optimizer=torch.optim.AdamW(encoder.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.02),
        batch=lambda rng: draw_rings(tracks, batch, rng),
        loss=lambda batch: mouth_loss(encoder, scale, *batch),
        evaluate=lambda _: scores(),
        write=lambda _: save_audio(encoder, scale, folder / WEIGHTS.name),
    )
    return run_training(task, folder, budget, seed, resume, report=report)


def save_audio(encoder: SpeechEncoder, scale: MouthScale, path: Path) -> None:
    """Writes the encoder in half precision."""
    settings = {"config": asdict(encoder.config), "scale": asdict(scale)}
    save_trained(path, {name: x.half() for name, x in encoder.state_dict().items()}, settings)


def load_audio(path: Path = WEIGHTS) -> tuple[SpeechEncoder, MouthScale]:
    """The trained encoder, float32, and the scale of its outputs. Raises `UserError` if the file is not one."""
    tensors, settings = load_trained(path)
    config = from_official(AudioConfig, settings["config"])
    encoder = SpeechEncoder(config)
    encoder.load_state_dict({name: x.float() for name, x in tensors.items()})
    return encoder.requires_grad_(False), MouthScale(*(tuple(settings["scale"][x]) for x in ("mean", "deviation")))
