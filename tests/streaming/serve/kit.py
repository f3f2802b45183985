"""A server of sessions whose face shows numbers, for tests: real sessions, sockets and encoders, no networks."""

import asyncio
import io
import json
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import av
import numpy as np
import soundfile
from aiohttp import ClientWebSocketResponse, FormData, TCPConnector, WSMsgType
from aiohttp.test_utils import TestClient, TestServer
from aiohttp.web import BaseRunner
from av.error import InvalidDataError
from numpy.typing import NDArray
from PIL import Image

from model.config import ChunkConfig
from streaming.live.director import Director, Options
from streaming.live.face import FaceState, Finished, Rendered, Unit
from streaming.live.journal import replay
from streaming.live.opening import kept, settings_of
from streaming.live.session import LiveSession, MonotonicClock
from streaming.live.snapshot import restore
from streaming.live.timeline import Event
from streaming.live.voice import Voice
from streaming.serve.access import Access
from streaming.serve.app import Server
from streaming.serve.limits import Limits
from streaming.serve.messages import FromServer, decode_from_server, pack
from streaming.serve.sessions import Sessions
from tests.streaming.live.stage import DrawnFace

HANGS = 120  # seconds, which no test takes
CHUNK = ChunkConfig(height=128, width=128)
BLOCK = 32  # pixels: 16 of them, 4 x 4, are the bits of a frame's number
TOKEN = "the-token-of-a-test"
PORTRAITS = Path(__file__).parents[3] / "examples" / "portraits"
IDENTITY = {"portrait": "any"}

T = TypeVar("T")


class NumberedFace(DrawnFace):
    """Each frame shows a number that is one more than that of the frame before: of the first, 1."""

    def __init__(self) -> None:
        super().__init__(CHUNK)

    def start(self) -> FaceState:
        state = super().start()
        return replace(state, tail=np.zeros((5, CHUNK.height, CHUNK.width, 3), np.uint8))

    def generate(self, state: FaceState, speech: NDArray[np.float32], quality: int) -> Generator[Unit, None, None]:
        self.drawn.append(quality)
        yield None
        first = number_of(state.tail[-1]) + 1
        pictures = np.stack([numbered(first + k) for k in range(CHUNK.new_frames)])
        for begin in range(0, CHUNK.new_frames, 4):
            yield Rendered(pictures[begin : begin + 4])
        yield Finished(FaceState(state.number + 1, None, pictures[-5:], state.ring.append(speech)), 0.0)


class NoisyFace(NumberedFace):
    """The same with noise, which makes many bytes of each frame."""

    def generate(self, state: FaceState, speech: NDArray[np.float32], quality: int) -> Generator[Unit, None, None]:
        random = np.random.default_rng(state.number)
        for unit in super().generate(state, speech, quality):
            if isinstance(unit, Rendered):
                noise = random.integers(0, 100, unit.rgb.shape, np.uint8)
                yield Rendered(np.where(unit.rgb > 127, 255 - noise, noise))
            else:
                yield unit


def numbered(number: int) -> NDArray[np.uint8]:
    """A picture of a number's 16 bits."""
    bits = np.array([number >> k & 1 for k in range(16)], np.uint8).reshape(4, 4) * 255
    return np.repeat(bits.repeat(BLOCK, 0).repeat(BLOCK, 1)[..., None], 3, 2)


def number_of(rgb: NDArray[Any]) -> int:
    """The number that a picture shows, decoded or not."""
    bits = rgb[BLOCK // 2 :: BLOCK, BLOCK // 2 :: BLOCK, 1].reshape(-1) > 127
    return int(sum(int(bit) << k for k, bit in enumerate(bits)))


def film(data: bytes) -> tuple[list[int], NDArray[np.float32], float]:
    """The numbers in an MP4's frames, its sound, and when it begins; the last fragment may be cut."""
    numbers, begins = [], math.nan
    with av.open(io.BytesIO(data), "r") as container, suppress(InvalidDataError):
        for frame in container.decode(video=0):
            numbers.append(number_of(frame.to_ndarray(format="rgb24")))
            begins = begins if len(numbers) > 1 else float(frame.time or 0)
    parts: list[NDArray[Any]] = [np.zeros(0)]
    with av.open(io.BytesIO(data), "r") as container, suppress(InvalidDataError):
        parts.extend(frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0))
    return numbers, np.concatenate(parts).astype(np.float32), begins


class NumberedPipeline:
    """What the server takes for a pipeline; one session at a time."""

    def __init__(self, face: Callable[[], DrawnFace] = NumberedFace) -> None:
        self.config: Any = SimpleNamespace(chunk=CHUNK)
        self._face, self._busy = face, threading.Lock()

    def portrait(self, image: Any) -> NDArray[np.uint8]:
        picture = Image.open(image) if isinstance(image, Path) else image
        return np.asarray(picture.convert("RGB").resize((CHUNK.width, CHUNK.height)))

    def live(
        self,
        image: NDArray[np.uint8],  # noqa: ARG002
        *,
        kind: Any = "segments",
        lag: Any = None,
        wait_frames: int | None = None,
        prompt: str | None = None,  # noqa: ARG002
        seed: int = 0,  # noqa: ARG002
        max_queued: float = 60.0,
        on_event: Callable[[Event], None] = lambda _: None,
        snapshots: Path | None = None,
        resume: Path | None = None,
        position: int | None = None,
    ) -> LiveSession:
        face, settings = self._face(), settings_of(CHUNK, kind, lag, wait_frames, max_queued)
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this pipeline is making another video")
        voice = Voice(settings.kind, CHUNK, settings.limit)
        director = Director(face, voice, Options(settings.lag, settings.wait_frames))
        if resume:
            snapshot, happened = kept(resume, IDENTITY)
            restore(director, snapshot)
            replay(director, happened, position, 0.0)
        return LiveSession(
            director, IDENTITY, on_event=on_event, snapshots=snapshots, clock=MonotonicClock(),
            release=self._busy.release,
        )  # fmt: skip


def run(test: Coroutine[Any, Any, T]) -> T:
    """Runs a test's coroutine."""
    return asyncio.run(asyncio.wait_for(test, HANGS))


class Serving:
    """A server, and a client of it."""

    def __init__(self, client: TestClient, server: Server, sessions: Sessions, access: Access) -> None:
        self.client, self.server, self.sessions, self.access = client, server, sessions, access

    async def create(self, portrait: str | bytes = "amara", options: dict[str, Any] | None = None) -> dict[str, Any]:
        response = await self.client.post("/v1/sessions", data=form(portrait, options), headers=bearing(TOKEN))
        assert response.status == 201, await response.text()
        return await response.json()

    async def post(
        self, facts: dict[str, Any], action: str, data: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        path = f"/v1/sessions/{facts['id']}/{action}"
        response = await self.client.post(path, data=data, headers=bearing(facts["key"]) | (headers or {}))
        return response.status, await response.json() if response.content_type == "application/json" else {}

    async def socket(self, facts: dict[str, Any], **hello: Any) -> "Talk":
        path = f"/v1/sessions/{facts['id']}/ws"
        socket = await self.client.ws_connect(
            path, headers=bearing(facts["key"]), protocols=["flashtalk.v1"], max_msg_size=0
        )
        await socket.send_json({"type": "hello", **hello})
        return Talk(socket)


class AsServed(TestServer):
    """A server that goes on with a request whose client has gone, as the real one does; aiohttp's would cancel it."""

    async def _make_runner(self, **options: Any) -> BaseRunner:
        return await super()._make_runner(**options | {"handler_cancellation": False})


@asynccontextmanager
async def serving(
    sessions: int = 1,
    folder: Path | None = None,
    origins: list[str] | None = None,
    face: Callable[[], DrawnFace] = NumberedFace,
    **limits: Any,
) -> AsyncIterator[Serving]:
    bounds = replace(Limits(), **limits)
    registry = Sessions([NumberedPipeline(face) for _ in range(sessions)], bounds, folder)
    access = Access(TOKEN, origins or [], bounds)
    server = Server(registry, access, PORTRAITS)
    connector = TCPConnector(force_close=True)  # so that no idle connection looks like a leak
    async with TestClient(AsServed(server.app), connector=connector) as client:
        yield Serving(client, server, registry, access)


def form(portrait: str | bytes = "amara", options: dict[str, Any] | str | None = None) -> FormData:
    data = FormData(default_to_multipart=True)
    if isinstance(portrait, bytes):
        data.add_field("portrait", portrait, filename="../../etc/passwd")
    else:
        data.add_field("portrait", portrait)
    if options is not None:
        data.add_field("options", options if isinstance(options, str) else json.dumps(options))
    return data


def bearing(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


class Talk:
    """A client's end of a socket."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.socket = socket
        self.messages: list[FromServer] = []
        self.media: list[bytes] = []

    async def until(self, kind: type[T], matches: Callable[[T], bool] = lambda _: True) -> T:
        """Reads until a message of this kind; what came is kept."""
        async for message in self.socket:
            if message.type == WSMsgType.BINARY:
                self.media.append(message.data)
                continue
            self.messages.append(decode_from_server(message.data))
            last = self.messages[-1]
            if isinstance(last, kind) and matches(last):
                return last
        raise AssertionError(f"the socket was closed, and no {kind.__name__} came; there were {self.messages}")

    async def read_media(self, count: int) -> None:
        """Reads until so many binary messages have come."""
        while len(self.media) < count:
            message = await self.socket.receive()
            assert message.type in (WSMsgType.BINARY, WSMsgType.TEXT), message
            if message.type == WSMsgType.BINARY:
                self.media.append(message.data)
            else:
                self.messages.append(decode_from_server(message.data))

    async def rest(self) -> list[FromServer]:
        """Reads until the socket is closed; returns all messages."""
        async for message in self.socket:
            if message.type == WSMsgType.TEXT:
                self.messages.append(decode_from_server(message.data))
            else:
                self.media.append(message.data)
        return self.messages

    def vanish(self) -> None:
        """Is gone without a goodbye."""
        connection = self.socket._response.connection
        assert connection is not None
        assert connection.transport is not None
        connection.transport.abort()

    async def say(self, segment: int, samples: NDArray[Any], piece: int = 4800) -> None:
        for begin in range(0, len(samples), piece):
            await self.socket.send_bytes(pack(1, segment, samples[begin : begin + piece].tobytes()))

    async def tell(self, kind: str, **values: Any) -> None:
        await self.socket.send_json({"type": kind, **values})


def speech(seconds: float, rate: int = 16000) -> NDArray[np.int16]:
    """A tone of 440 Hz."""
    return (12000 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.int16)


def wav(seconds: float, rate: int = 16_000) -> bytes:
    """A WAV file of that tone."""
    data = io.BytesIO()
    soundfile.write(data, speech(seconds), rate, format="WAV", subtype="PCM_16")
    return data.getvalue()


async def eventually(condition: Callable[[], Any] | Callable[[], Awaitable[Any]]) -> None:
    """Waits until something is so; the test's own limit ends it otherwise."""
    while not condition():
        await asyncio.sleep(0.01)
