"""Ray on this machine: three sessions on two replicas, one of which is killed."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch

from streaming.live.director import Director
from streaming.live.face import Finished, PortraitFace, Rendered, cut
from streaming.live.timeline import filler
from streaming.live.voice import Voice
from streaming.pipeline import TalkingHeadPipeline
from streaming.serve.messages import MEDIA, Bye, unpack
from tests.streaming.serve.kit import PORTRAITS, Talk, bearing, form, speech

pytest.importorskip("ray", reason="ray is missing: pip install 'flashtalk-triton[cluster]'")

ROOT = Path(__file__).parents[3]
TOKEN = "the-token-of-a-test"
SEEDS = (5, 6, 7)
SPOKEN = speech(4)
SHOWN = 25 * 4 + 40  # moments
HANGS = 3000  # seconds in which Ray starts even on a machine that has a lot else to do


@pytest.mark.slow
def test_a_killed_replica_loses_no_frame_of_its_sessions(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "tests.streaming.cluster.ray_program", "cluster", "--replicas", "2", "--sessions", "2",
        "--cpus", "0.5", "--snapshots", str(tmp_path), "--port", "0", "--device", "cpu", "--steps", "1", "--overcommit",
        "--log-json", "--quiet",
    ]  # fmt: skip
    environment = os.environ | {"FLASHTALK_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "The page is" in line), "")
        assert line, (tmp_path / "log").read_text()
        url = line.split()[3].rstrip("/")
        clients = asyncio.run(asyncio.wait_for(three_sessions(url, tmp_path), HANGS))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=HANGS)
        assert process.returncode == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.communicate()
    for client, seed in zip(clients, SEEDS, strict=True):
        check_shown(client.notes, seed)
    assert sorted(len(client.films) for client in clients) == [1, 2, 2]
    for client in clients:
        check_seen(client)


@dataclass
class Client:
    """A client of one session.

    Attributes:
        films: moments in the media of each socket, one after the other.
        positions: where the session went on each time that it was resumed.
    """

    http: aiohttp.ClientSession
    facts: dict[str, Any]
    file: Path
    films: list[list[int]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    said: bool = False

    @property
    def path(self) -> str:
        return f"/v1/sessions/{self.facts['id']}"

    @property
    def notes(self) -> list[dict[str, Any]]:
        """What the replicas noted of each moment."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [json.loads(line) for line in lines]

    async def watch(self) -> None:
        """Speaks once, and watches until the session is closed; resumes it as often as it is lost."""
        while (bye := await self._watch_once()).reason != "closed":
            assert bye.reason == "lost"
            await self._resume(bye)

    async def _watch_once(self) -> Bye:
        headers = bearing(self.facts["key"])
        async with self.http.ws_connect(f"{self.path}/ws", headers=headers, max_msg_size=0) as socket:
            await socket.send_json({"type": "hello", "audio": {"rate": 16_000}, "video": "fmp4"})
            talk = Talk(socket)
            if not self.said:
                await talk.say(0, SPOKEN)
                await talk.tell("end")
                self.said = True
            *_, bye = await talk.rest()
        media = [unpack(data) for data in talk.media]
        self.films.append([message.moment for message in media if message.kind == MEDIA])
        assert isinstance(bye, Bye)
        return bye

    async def _resume(self, bye: Bye) -> None:
        """Another replica may have no room until Ray has started a new one."""
        while True:
            async with self.http.post(f"{self.path}/resume", headers=bearing(self.facts["key"])) as response:
                if response.status == 201:
                    facts = await response.json()
                    assert facts["position"] == bye.position
                    self.positions.append(facts["position"])
                    return
                assert response.status == 503, await response.text()
                await asyncio.sleep(int(response.headers["Retry-After"]))


async def three_sessions(url: str, folder: Path) -> list[Client]:
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(None)) as http:
        clients = []
        for seed in SEEDS:
            async with http.post("/v1/sessions", data=form("amara", {"seed": seed}), headers=bearing(TOKEN)) as answer:
                assert answer.status == 201, await answer.text()
                facts = await answer.json()
            clients.append(Client(http, facts, folder / f"noted-{facts['id']}"))
        watching = [asyncio.create_task(client.watch()) for client in clients]
        await until(watching, lambda: all(spoken(client) > 20 for client in clients))
        processes = [client.notes[-1]["process"] for client in clients]
        assert sorted(processes.count(process) for process in set(processes)) == [1, 2]
        os.kill(next(process for process in processes if processes.count(process) == 2), signal.SIGKILL)
        await until(watching, lambda: all(client.notes[-1]["index"] >= SHOWN for client in clients))
        for client in clients:
            await http.delete(client.path, headers=bearing(client.facts["key"]))
        await asyncio.gather(*watching)
        return clients


def spoken(client: Client) -> int:
    return sum(note["segment"] == 0 for note in client.notes)


async def until(watching: list[asyncio.Task[None]], condition: Callable[[], bool]) -> None:
    while not condition():
        for task in watching:
            if task.done():
                task.result()
        await asyncio.sleep(0.1)


def check_seen(client: Client) -> None:
    """Of each film, the next one is what follows, as its viewer has it."""
    for film, following, position in zip(client.films, client.films[1:], client.positions, strict=False):
        assert film[-1] == position - 1
        assert following[0] == position
    for film in client.films:
        assert film == sorted(film)


def check_shown(notes: list[dict[str, Any]], seed: int) -> None:
    """What replicas handed over is, to the bit, what a session hands over that nobody disturbs.

    Where a chunk is cut depends on when sound came, so the undisturbed session cuts where this one did.
    """
    moments = {note["index"]: note for note in notes}
    assert sorted(moments) == list(range(len(moments)))
    for note in notes:  # a moment that did not arrive was handed over twice
        assert {**note, "process": 0} == {**moments[note["index"]], "process": 0}
    pictures, sounds = undisturbed([moments[index] for index in range(len(moments))], seed)
    assert [note["picture"] for _, note in sorted(moments.items())] == pictures
    assert [note["sound"] for _, note in sorted(moments.items())] == sounds


def undisturbed(moments: list[dict[str, Any]], seed: int) -> tuple[list[str], list[str]]:
    """Hashes of the pictures and sounds of chunks with these numbers and lengths, one after the other."""
    torch.set_num_threads(1)
    face = face_of(seed)
    voice = Voice("segments", face.chunk, 1500)
    voice.push(SPOKEN.astype(np.float32) / np.float32(32768), 16_000, 0, 0.0)
    voice.end()
    state, pictures, sounds = face.start(), [], []
    for number, group in groupby(moments, lambda note: note["chunk"]):
        shown = list(group)
        heard = voice.take(sum(note["segment"] == 0 for note in shown))
        heard = [*heard, *[filler(face.chunk)] * (face.chunk.new_frames - len(heard))]
        before, speech_of_chunk = replace(state, number=number), np.concatenate([frame.speech for frame in heard])
        frames: list[Any] = []
        for unit in face.generate(before, speech_of_chunk, 0):
            if isinstance(unit, Rendered):
                frames += [*unit.rgb]
            elif isinstance(unit, Finished):
                state = unit.state
        frames = frames[: len(shown)]
        if len(shown) < face.chunk.new_frames:
            state = cut(before, speech_of_chunk, len(shown), np.stack([*before.tail, *frames][-len(before.tail) :]))
        pictures += [hashlib.sha256(frame.tobytes()).hexdigest() for frame in frames]
        sounds += [hashlib.sha256(frame.sound.tobytes()).hexdigest() for frame in heard[: len(shown)]]
    return pictures, sounds


def face_of(seed: int) -> PortraitFace:
    """The face that a replica has for this seed."""
    pipeline = TalkingHeadPipeline.from_pretrained("tiny", device="cpu", steps=1)
    with pipeline.live(pipeline.portrait(PORTRAITS / "amara.jpg"), seed=seed) as session:
        director: Director = session._director
    assert isinstance(director.face, PortraitFace)
    return director.face
