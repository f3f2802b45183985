"""A client of `python -m streaming serve`: sends a recording, writes what viewers see and hear to an MP4.

FLASHTALK_TOKEN=... python examples/talk_to_server.py http://127.0.0.1:8700 portrait.jpg voice.wav talk.mp4
"""

import asyncio
import json
import math
import os
import struct
import sys
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import soundfile

SOUND, MEDIA = 1, 3  # kinds of binary messages
PIECE = 0.1  # seconds of sound in a message
REST = 12  # ticks, half a second: what may be on its way when the last frame of speech is told


async def main(server: str, portrait: str, voice: str, out: str) -> None:
    """Begins a session, speaks, and writes until everything was heard. Raises what aiohttp raises."""
    samples, rate = soundfile.read(voice, dtype="int16", always_2d=True)
    token = {"Authorization": f"Bearer {os.environ['FLASHTALK_TOKEN']}"}
    async with aiohttp.ClientSession(server, raise_for_status=check) as http:
        with Path(portrait).open("rb") as file:
            async with http.post("/v1/sessions", data={"portrait": file}, headers=token) as response:
                session = await response.json()
        path, key = f"/v1/sessions/{session['id']}", {"Authorization": f"Bearer {session['key']}"}
        async with http.ws_connect(f"{path}/ws", headers=key, protocols=["flashtalk.v1"]) as socket:
            sound = {"rate": rate, "format": "pcm_s16le", "channels": samples.shape[1]}
            await socket.send_json({"type": "hello", "audio": sound, "video": "fmp4"})
            segment = event_of(await socket.receive_str())["next_segment"]
            speaking = asyncio.create_task(speak(socket, segment, samples, round(PIECE * rate)))
            await record(socket, Path(out))
            await speaking
        await http.delete(path, headers=key)


async def check(response: aiohttp.ClientResponse) -> None:
    """Raises what the server says if it has refused a request."""
    if not response.ok and response.content_type == "application/json":
        raise aiohttp.ClientError((await response.json())["error"]["message"])
    response.raise_for_status()


def event_of(text: str) -> dict[str, Any]:
    """A message that is JSON. Raises what it says if it is an error."""
    event = json.loads(text)
    if event["type"] == "error":
        raise aiohttp.ClientError(event["message"])
    return event


async def record(socket: aiohttp.ClientWebSocketResponse, out: Path) -> None:
    """Writes media until the segment was heard, which is told before its last frames come: messages overtake media."""
    tick, last = 0, math.inf
    with out.open("wb") as film:
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                film.write(message.data[8:])
                kind, _, _, number = struct.unpack("<BBHI", message.data[:8])
                tick = number if kind == MEDIA else tick
                if tick > last:
                    return
                continue
            event = event_of(message.data)
            if event["type"] in ("playback_started", "playback_finished"):
                print(event)
            if event["type"] == "playback_finished":
                last = tick + REST
            if event["type"] == "bye":
                return


async def speak(socket: aiohttp.ClientWebSocketResponse, segment: int, samples: np.ndarray, size: int) -> None:
    """Sends a segment as fast as the server takes it."""
    for begin in range(0, len(samples), size):
        await socket.send_bytes(struct.pack("<BBHI", SOUND, 0, 0, segment) + samples[begin : begin + size].tobytes())
    await socket.send_json({"type": "end"})


if __name__ == "__main__":
    if len(sys.argv) != 5 or "FLASHTALK_TOKEN" not in os.environ:
        sys.exit(f"usage: {str(__doc__).splitlines()[-1]}")
    try:
        asyncio.run(main(*sys.argv[1:]))
    except (aiohttp.ClientError, OSError, soundfile.LibsndfileError) as error:
        sys.exit(f"error: {error}")
