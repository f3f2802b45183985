"""A WebSocket that speaks `flashtalk.v1`: sound and commands in, events and media out."""

import asyncio
import time
from collections import deque
from contextlib import suppress

import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web
from numpy.typing import NDArray

from streaming.serve.encoder import Encoded
from streaming.serve.errors import RefusedError
from streaming.serve.limits import Bucket, Limits
from streaming.serve.messages import (
    KEY,
    MEDIA,
    MEDIA_HEADER,
    PROTOCOL,
    SOUND,
    Bye,
    End,
    ErrorMessage,
    FromServer,
    Hello,
    Interrupt,
    Ping,
    Pong,
    SoundFormat,
    decode,
    encode,
    pack,
    unpack,
)
from streaming.serve.session import Session
from streaming.serve.viewer import Viewer

WAITING = 256  # messages that may wait for a reader before it is given up
FAREWELL = 2.0  # seconds in which a client may read what it was told last, and say goodbye


class Outbox:
    """What waits for one socket: messages, which overtake, and moments, of which a slow reader loses some.

    Attributes:
        viewer: the queue of moments; None if the socket takes none.
        overflown: whether more messages waited than a reader that is alive leaves.
    """

    def __init__(self) -> None:
        self.viewer: Viewer | None = None
        self.overflown = False
        self.changed = asyncio.Event()
        self._messages: deque[FromServer | bytes] = deque()
        self._closed = False

    def put(self, message: FromServer | bytes) -> None:
        """Adds a message; after `bye` nothing more is sent."""
        if len(self._messages) >= WAITING:
            self.overflown = True
            self.close()
        else:
            self._messages.append(message)
            self.changed.set()
        if isinstance(message, Bye):
            self.close()

    def close(self) -> None:
        """Ends the outbox for its reader, after the messages that wait."""
        self._closed = True
        self.changed.set()

    async def next(self) -> FromServer | bytes | Encoded | None:
        """Waits for what is to be sent next; None at the end."""
        while True:
            self.changed.clear()
            if self.overflown:
                return None
            if self._messages:
                return self._messages.popleft()
            if self._closed or (self.viewer and self.viewer.closed):
                return None
            if self.viewer and (item := self.viewer.take()):
                return item
            await self.changed.wait()


class Connection:
    """One WebSocket of a session."""

    def __init__(self, session: Session) -> None:
        """`serve` opens it."""
        limits = session.limits
        self._session, self._outbox = session, Outbox()
        self._socket = websocket(limits)
        self._rate = Bucket(limits.messages_per_second, 2 * limits.messages_per_second, time.monotonic)
        self._format: SoundFormat | None = None

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        """Answers the request, and speaks until either side has enough."""
        await self._socket.prepare(request)
        self._session.attend()
        sending = asyncio.create_task(self._send())
        try:
            await self._receive()
        except RefusedError as error:
            self._outbox.put(ErrorMessage(error.code, str(error), True))
        finally:
            self._outbox.close()
            self._session.listeners.discard(self._outbox)
            self._session.release(self)
            if self._outbox.viewer:
                self._session.broadcast.leave(self._outbox.viewer)
            self._session.leave()
            with suppress(TimeoutError):
                await asyncio.wait_for(sending, FAREWELL)
        return self._socket

    # --- In ----------------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        """Reads until the client has closed. Raises `RefusedError` for what ends the connection."""
        try:
            first = await asyncio.wait_for(self._socket.receive(), self._session.limits.connect)
        except TimeoutError:
            raise RefusedError("bad_message", "no hello came in time") from None
        if first.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
            return
        hello = decode(first.data) if first.type == WSMsgType.TEXT else None
        if not isinstance(hello, Hello):
            raise RefusedError("bad_message", f"the first message is hello, as text; this is {PROTOCOL}")
        self._begin(hello)
        async for message in self._socket:
            if message.type == WSMsgType.BINARY:
                await self._hear(message.data)
            elif message.type == WSMsgType.TEXT:
                self._obey(message.data)
            else:
                return

    def _begin(self, hello: Hello) -> None:
        if bye := self._session.bye:
            self._outbox.put(bye)
            return
        self._format = hello.audio
        if hello.video == "fmp4":
            self._outbox.viewer = self._session.join("mp4", self._outbox.changed)
        self._outbox.put(self._session.ready())
        if self._outbox.viewer:
            self._outbox.put(pack(MEDIA_HEADER, 0, self._session.broadcast.header))
        self._session.listeners.add(self._outbox)

    async def _hear(self, data: bytes) -> None:
        """Sound; what cannot be used is refused, and the connection stays."""
        message = unpack(data)
        if message.kind != SOUND or self._format is None:
            raise RefusedError("bad_message", "only sound is binary, and hello has to say how it is written")
        try:
            self._session.claim(self)
            await self._session.say(samples(message.body, self._format), self._format.rate, message.number)
        except RefusedError as error:
            self._refuse(error)

    def _obey(self, text: str) -> None:
        if not self._rate.take():
            raise RefusedError("too_many", "too many messages a second")
        message = decode(text)
        try:
            match message:
                case Ping():
                    self._outbox.put(Pong(message.t))
                case Interrupt():
                    self._session.interrupt()
                case End():
                    self._session.release(self)
                case Hello():
                    raise RefusedError("bad_message", "hello was said already")
        except RefusedError as error:
            self._refuse(error)

    def _refuse(self, error: RefusedError) -> None:
        self._outbox.put(ErrorMessage(error.code, str(error), False))

    # --- Out ---------------------------------------------------------------------------------------------------------

    async def _send(self) -> None:
        """Writes what waits, at the pace at which the client reads; then closes the socket."""
        with suppress(ConnectionError):
            while (item := await self._outbox.next()) is not None:
                if isinstance(item, Encoded):
                    flags = KEY if item.key else 0
                    await self._socket.send_bytes(pack(MEDIA, item.tick, item.fragment, flags, item.moment))
                elif isinstance(item, bytes):
                    await self._socket.send_bytes(item)
                else:
                    await self._socket.send_str(encode(item))
            await self._socket.close(code=WSCloseCode.OK)


def websocket(limits: Limits) -> web.WebSocketResponse:
    """The server's end of a WebSocket that speaks `flashtalk.v1`."""
    return web.WebSocketResponse(
        protocols=(PROTOCOL,),
        heartbeat=limits.heartbeat,
        timeout=FAREWELL,
        max_msg_size=limits.message_bytes,
        compress=False,
    )


def samples(body: memoryview, form: SoundFormat) -> NDArray[np.int16] | NDArray[np.float32]:
    """The samples of a message, [n] or [n, 2]. Raises `RefusedError` if one is cut."""
    if len(body) % form.frame_bytes:
        raise RefusedError("bad_audio", f"{len(body)} bytes are no whole samples of {form.frame_bytes} bytes")
    values = np.frombuffer(body, "<i2" if form.format == "pcm_s16le" else "<f4")
    return values.reshape(-1, form.channels) if form.channels > 1 else values
