"""A session in a file, from which it goes on as if it had never ended.

Frames are not kept but what they were made from: the state before the oldest chunk that has frames which were not
shown, and what that chunk and those after it heard. Resuming generates these chunks again, which gives the same bits on
the same machine. The sound that waits, and the samples that make no whole frame yet, are there too.

A file is in the safetensors format. Its metadata say in JSON what was said above in tensors, and what the session fits
to: hashes of portrait, prompt, configuration and weights.
"""

import hashlib
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from model.audio import Ring
from model.errors import UserError
from model.files import replacing, unreadable
from streaming.live.director import Chunk, Director, Made
from streaming.live.face import FaceState, Finished, Rendered, cut
from streaming.live.pcm import Stretch
from streaming.live.states import State
from streaming.live.stats import Counts
from streaming.live.timeline import FrameSound, filler
from streaming.live.voice import Arriving, Segment

FORMAT = "flashtalk-session-1"
DURATIONS = ("first", "step", "whole")  # of recent chunks

Identity = dict[str, str]  # portrait, prompt, configuration, weights -> hash


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A session at one moment."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]  # JSON


# --- Session -> snapshot ---------------------------------------------------------------------------------------------


def snapshot_of(director: Director) -> Snapshot:
    """The session as a value. It may be in the middle of a chunk, which then is generated again from its beginning."""
    chunks = [chunk for chunk in director.chunks if chunk.start + chunk.kept > director.shown]
    if director.work:
        size = len(director.work.chunk.sounds)
        chunks = [c for c in chunks if c.start < director.work.chunk.start]
        chunks.append(replace(director.work.chunk, kept=size, whole=True))
    before = chunks[0].before if chunks else director.next_state
    if before is None:
        raise RuntimeError("a session has neither a chunk in work nor what the next one goes on from")
    voice, ring = director.voice, before.ring
    tensors = {
        "tail": torch.from_numpy(before.tail),
        "ring.samples": torch.from_numpy(ring.samples),
        "ring.raw": torch.from_numpy(ring.raw),
        **_sounds("queue", voice.frames),
        **{key: x for k, chunk in enumerate(chunks) for key, x in _sounds(f"chunk.{k}", chunk.sounds).items()},
    }
    if before.motion is not None:
        tensors["motion"] = before.motion.cpu()
    if voice.arriving:
        parts = {"kept": voice.arriving.stretch.kept, "speech": voice.arriving.speech, "sound": voice.arriving.sound}
        tensors |= {f"arriving.{name}": torch.from_numpy(x) for name, x in parts.items()}
    values = {
        "seed": director.face.seed,
        "shown": director.shown,
        "number": before.number,
        "next_number": director.next_number,
        "gain": ring.gain,
        "last_shown": director.last_shown,
        "quality": director.quality.index,
        "durations": {name: list(getattr(director.durations, name)) for name in DURATIONS},
        "state": str(director.playback.state),
        "counts": asdict(director.stats.counts),
        "queue": _labels(voice.frames),
        "chunks": [_described(chunk) for chunk in chunks],
        "segments": [asdict(segment) for segment in voice.segments.values()],
        "arriving": voice.arriving and _arriving(voice.arriving),
        "next_segment": voice.next_number,
        "interrupted": voice.interrupted,
        "dropped": voice.dropped,
        "clock": voice.clock,
    }
    return Snapshot(tensors, values)


def _described(chunk: Chunk) -> dict[str, Any]:
    numbers = {name: getattr(chunk, name) for name in ("quality", "start", "kept", "whole")}
    return numbers | {"number": chunk.before.number, "sounds": _labels(chunk.sounds)}


def _arriving(arriving: Arriving) -> dict[str, Any]:
    stretch = arriving.stretch
    return {
        "number": arriving.number, "rate": stretch.rate, "start": stretch.start, "given": stretch.given,
        "received": len(arriving.received),
    }  # fmt: skip


def _sounds(name: str, sounds: Sequence[FrameSound] | deque[FrameSound]) -> dict[str, Tensor]:
    """Sound that somebody sent, [frame, sample]."""
    sent = [sound for sound in sounds if sound.segment is not None]
    if not sent:
        return {}
    parts = {"speech": [sound.speech for sound in sent], "sound": [sound.sound for sound in sent]}
    return {f"{name}.{part}": torch.from_numpy(np.stack(arrays)) for part, arrays in parts.items()}


def _labels(sounds: Sequence[FrameSound] | deque[FrameSound]) -> list[tuple[int | None, int]]:
    return [(sound.segment, sound.samples) for sound in sounds]


# --- Snapshot -> session ---------------------------------------------------------------------------------------------


def restore(director: Director, snapshot: Snapshot) -> None:
    """Brings a session that has not begun to where the snapshot was taken; generates what was not shown anew."""
    values, tensors = snapshot.values, snapshot.tensors
    director.shown, director.last_shown = values["shown"], values["last_shown"]
    director.playback.state = State(values["state"])
    director.stats.counts = Counts(**values["counts"])
    _restore_voice(director, snapshot)
    chunk = director.face.chunk
    arrays = {name: tensors[name].numpy() for name in ("tail", "ring.samples", "ring.raw")}
    ring = Ring(chunk, arrays["ring.samples"], arrays["ring.raw"], values["gain"])
    state = FaceState(values["number"], tensors.get("motion"), arrays["tail"], ring)
    pictures = [*state.tail]  # the last of these were shown last
    for k, described in enumerate(values["chunks"]):
        sounds = tuple(_read_sounds(director, snapshot, f"chunk.{k}", described["sounds"]))
        numbers = {name: described[name] for name in ("quality", "start", "kept", "whole")}
        made = Chunk(replace(state, number=described["number"]), sounds=sounds, **numbers)
        frames, state = _generated_again(director, made)
        pictures += frames
        director.chunks.append(made)
        for index, rgb in enumerate(frames, made.start):
            if index >= director.shown:
                director.made.append(Made(rgb, sounds[index - made.start], made.before.number, 0.0, 0.0))
    shown = pictures[: len(pictures) - len(director.made)]
    director.recent.extend(shown[-len(state.tail) :])
    director.next_state, director.next_number = state, values["next_number"]
    director.quality.index = values["quality"]
    for name in DURATIONS:
        getattr(director.durations, name).extend(values["durations"][name])


def _generated_again(director: Director, chunk: Chunk) -> tuple[list[NDArray[np.uint8]], FaceState]:
    """The frames of a chunk that are kept, and the state after them."""
    frames: list[NDArray[np.uint8]] = []
    for unit in director.face.generate(chunk.before, chunk.speech, chunk.quality):
        if isinstance(unit, Rendered):
            frames += [*unit.rgb]
        elif isinstance(unit, Finished) and chunk.whole:
            return frames, unit.state
        if len(frames) >= chunk.kept and not chunk.whole:
            break
    frames = frames[: chunk.kept]
    tail = np.stack([*chunk.before.tail, *frames][-len(chunk.before.tail) :])
    return frames, cut(chunk.before, chunk.speech, chunk.kept, tail)


def _restore_voice(director: Director, snapshot: Snapshot) -> None:
    voice, values, tensors = director.voice, snapshot.values, snapshot.tensors
    voice.frames.extend(_read_sounds(director, snapshot, "queue", values["queue"]))
    voice.segments = {segment["number"]: Segment(**segment) for segment in values["segments"]}
    voice.next_number, voice.interrupted = values["next_segment"], values["interrupted"]
    voice.dropped, voice.clock = values["dropped"], values["clock"]
    if arriving := values["arriving"]:
        kept, speech, sound = (tensors[f"arriving.{name}"].numpy() for name in ("kept", "speech", "sound"))
        stretch = Stretch(arriving["rate"], director.face.chunk, kept, arriving["start"], arriving["given"])
        received = deque([0.0] * arriving["received"])
        voice.arriving = Arriving(arriving["number"], stretch, speech, sound, received)


def _read_sounds(
    director: Director, snapshot: Snapshot, name: str, labels: Sequence[tuple[int | None, int]]
) -> list[FrameSound]:
    """The sounds of frames; when they were received, nobody knows any more."""
    silence, sent, sounds = filler(director.face.chunk), 0, []
    for segment, samples in labels:
        if segment is None:
            sounds.append(silence)
        else:
            speech, sound = (snapshot.tensors[f"{name}.{part}"][sent].numpy() for part in ("speech", "sound"))
            sounds.append(FrameSound(speech, sound, segment, samples))
            sent += 1
    return sounds


# --- Files -----------------------------------------------------------------------------------------------------------


def save(snapshot: Snapshot, identity: Identity, path: Path) -> None:
    """Writes a snapshot, whole or not at all. Raises `UserError` if it cannot be written."""
    metadata = {"format": FORMAT, "identity": json.dumps(identity), "session": json.dumps(snapshot.values)}
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(to_bytes({name: x.contiguous() for name, x in snapshot.tensors.items()}, metadata))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another place") from error


def load(path: Path, identity: Identity) -> Snapshot:
    """Reads a snapshot. Raises `UserError` if it cannot be read, or if it is of another session than `identity`."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is no snapshot of a session that this version can read")
            values, saved = json.loads(metadata["session"]), json.loads(metadata["identity"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except UserError:
        raise
    except Exception as error:  # safetensors raises an error of its own, which is no subclass of any other
        raise unreadable(path, error) from error
    if other := [name for name in identity if saved.get(name) != identity[name]]:
        raise UserError(f"{path} is of a session with another {' and another '.join(other)}: nothing was resumed")
    return Snapshot(tensors, values)


def digest(*parts: Any) -> str:
    """A hash of arrays and of anything that JSON or `repr` can write."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return hashed.hexdigest()
