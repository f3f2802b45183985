"""Drives a session of `python -m streaming serve` with the events of OpenAI's Realtime API.

`Avatar.take` is given each event that the agent's server sends; `Avatar.answers` gives what is to be sent back to it.
The event names are those of the published API and, in brackets, of its beta version.
"""

import base64
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

RATE = 24_000  # samples a second of the Realtime API's pcm16
SOUND = 1  # kind of a binary message


class Avatar:
    """A face for a voice agent: an open WebSocket of `flashtalk.v1` that said hello with `RATE` and pcm_s16le."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, next_segment: int) -> None:
        """`next_segment` is that of the server's `ready`."""
        self._socket, self._segment, self._next = socket, -1, next_segment
        self._items: dict[int, str] = {}  # segment -> the conversation's item that it says

    async def take(self, event: dict[str, Any]) -> None:
        """Takes an event from the agent's server."""
        match event["type"]:
            case "response.output_audio.delta" | "response.audio.delta":
                if self._items.get(self._segment) != event["item_id"]:
                    self._segment, self._next = self._next, self._next + 1
                    self._items[self._segment] = event["item_id"]
                header = struct.pack("<BBHI", SOUND, 0, 0, self._segment)
                await self._socket.send_bytes(header + base64.b64decode(event["delta"]))
            case "response.output_audio.done" | "response.audio.done":
                await self._socket.send_json({"type": "end"})
            case "input_audio_buffer.speech_started":
                await self._socket.send_json({"type": "interrupt"})

    async def answers(self) -> AsyncIterator[dict[str, Any]]:
        """What the agent's server is to be told: how far a sentence was heard before somebody interrupted it."""
        async for message in self._socket:
            if message.type != aiohttp.WSMsgType.TEXT:
                continue  # media, which whoever watches gets
            event = message.json()
            if event["type"] == "playback_finished":
                item = self._items.pop(event["segment"], None)
                if item is not None and event["interrupted"]:
                    yield {
                        "type": "conversation.item.truncate",
                        "item_id": item,
                        "content_index": 0,
                        "audio_end_ms": round(1000 * event["position"]),
                    }
