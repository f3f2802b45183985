"""A client of `python -m streaming serve`: sends a recording, writes what viewers see and hear to an MP4.

FLASHTALK_TOKEN=... python examples/talk_to_server.py http://127.0.0.1:8700 portrait.jpg voice.wav talk.mp4
"""

import asyncio
import os
import struct
import sys
from pathlib import Path

import aiohttp
import numpy as np
import soundfile

SOUND, MEDIA_HEADER, MEDIA = 1, 2, 3  # kinds of binary messages
PIECE = 0.1  # seconds of sound in a message


async def main(server: str, portrait: str, voice: str, out: str) -> None:
    """Begins a session, speaks, and writes until everything was heard."""
    samples, rate = soundfile.read(voice, dtype="int16", always_2d=True)
    token = {"Authorization": f"Bearer {os.environ['FLASHTALK_TOKEN']}"}
    async with aiohttp.ClientSession(server, raise_for_status=True) as http:
        with Path(portrait).open("rb") as file:
            async with http.post("/v1/sessions", data={"portrait": file}, headers=token) as response:
                session = await response.json()
        path, key = f"/v1/sessions/{session['id']}", {"Authorization": f"Bearer {session['key']}"}
        async with http.ws_connect(f"{path}/ws", headers=key, protocols=["flashtalk.v1"]) as socket:
            sound = {"rate": rate, "format": "pcm_s16le", "channels": samples.shape[1]}
            await socket.send_json({"type": "hello", "audio": sound, "video": "fmp4"})
            segment = (await socket.receive_json())["next_segment"]
            speaking = asyncio.create_task(speak(socket, segment, samples, round(PIECE * rate)))
            with Path(out).open("wb") as film:
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.BINARY:
                        film.write(message.data[8:])
                        continue
                    event = message.json()
                    if event["type"] in ("playback_started", "playback_finished", "error"):
                        print(event)
                    if event["type"] in ("playback_finished", "bye"):
                        break
            await speaking
        await http.delete(path, headers=key)


async def speak(socket: aiohttp.ClientWebSocketResponse, segment: int, samples: np.ndarray, size: int) -> None:
    """Sends a segment as fast as the server takes it."""
    for begin in range(0, len(samples), size):
        await socket.send_bytes(struct.pack("<BBHI", SOUND, 0, 0, segment) + samples[begin : begin + size].tobytes())
    await socket.send_json({"type": "end"})


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
