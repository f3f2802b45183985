"""Opens a session: checks what is asked for, and puts its parts together."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.command import check_choice
from model.config import ChunkConfig
from model.errors import UserError
from model.weights.checkpoint import Models
from model.weights.digest import digest_of_weights
from streaming.live.director import LAGS, Director, Lag, Options
from streaming.live.face import PortraitFace, Way
from streaming.live.journal import Record, records, replay
from streaming.live.session import Clock, LiveSession
from streaming.live.snapshot import Identity, Snapshot, digest, load, restore
from streaming.live.timeline import Event
from streaming.live.voice import KINDS, Kind, Voice


@dataclass(frozen=True)
class Settings:
    """How a session takes sound and keeps up; `settings_of` checks them."""

    kind: Kind
    lag: Lag
    wait_frames: int
    limit: int  # frames of sound that may wait


def settings_of(
    chunk: ChunkConfig, kind: Kind, lag: Lag | None, wait_frames: int | None, max_queued: float
) -> Settings:
    """What `TalkingHeadPipeline.live` was asked for, with its defaults. Raises `UserError` for what is impossible."""
    check_choice("kind", kind, KINDS)
    lag = lag or ("drop" if kind == "microphone" else "wait")
    check_choice("lag", lag, LAGS)
    if lag == "drop" and kind != "microphone":
        raise UserError("lag drop: only a microphone's sound may be dropped; take wait or smaller for segments")
    new = chunk.new_frames
    if not 1 <= (wait := new if wait_frames is None else wait_frames) <= new:
        raise UserError(f"wait_frames {wait}: name a number from 1 to {new}, the frames that a chunk shows")
    least = 2 * new / chunk.tgt_fps
    if not least <= max_queued < math.inf:
        raise UserError(f"max_queued {max_queued}: name {least:g} seconds, two chunks, or more")
    return Settings(kind, lag, wait, math.floor(max_queued * chunk.tgt_fps + 1e-6))


def open_session(
    settings: Settings,
    models: Models,
    ways: Sequence[Way],
    portrait: NDArray[np.uint8],
    prompt: str,
    seed: int,
    *,
    noise: str,
    resume: Path | None,
    position: int | None,
    on_event: Callable[[Event], None],
    snapshots: Path | None,
    clock: Clock,
    release: Callable[[], None],
) -> LiveSession:
    """A session that begins, or goes on from the snapshot `resume` and its journal, at `position` if that is given.

    Raises `UserError` if the snapshot cannot be read, or is of another portrait, prompt, configuration or weights.
    """
    chunks = [way.generator.config.chunk for way in ways]
    identity = {
        "portrait": digest(portrait),
        "prompt": digest(prompt),
        "configuration": digest(models.config.name, chunks, noise),
        "weights": digest_of_weights((models.dit, models.vae, models.audio)),
    }
    snapshot, happened = kept(resume, identity) if resume else (None, [])
    face = PortraitFace(ways, models.audio, portrait, snapshot.values["seed"] if snapshot else seed)
    voice = Voice(settings.kind, face.chunk, settings.limit)
    director = Director(face, voice, Options(settings.lag, settings.wait_frames))
    if snapshot:
        restore(director, snapshot)
        replay(director, happened, position, clock.now())
    return LiveSession(director, identity, on_event=on_event, snapshots=snapshots, clock=clock, release=release)


def kept(path: Path, identity: Identity) -> tuple[Snapshot, list[Record]]:
    """The snapshot at `path` and what happened after it. Raises `UserError` as `load` does.

    Whoever was taken for dead may still write, and remove journals that no snapshot names any more. So both are read
    again if another snapshot has come meanwhile.
    """
    snapshot = load(path, identity)
    while True:
        happened = list(records(path, snapshot.values.get("journal")))
        again = load(path, identity)
        if again.values.get("journal") == snapshot.values.get("journal"):
            return snapshot, happened
        snapshot = again
