"""Carries requests and WebSockets between a client and a replica, at the pace of the slower one."""

import asyncio
import socket
from collections.abc import Awaitable, Mapping
from contextlib import suppress

import aiohttp
from aiohttp import ClientResponse, ClientWebSocketResponse, WSCloseCode, WSMsgType, web

from streaming.serve.app import SEND_BUFFER
from streaming.serve.errors import CODES, RefusedError
from streaming.serve.limits import Limits
from streaming.serve.messages import MEDIA, MOMENTS, Bye, Ready, decode_from_server, encode, unpack
from streaming.serve.socket import FAREWELL, websocket

FOR = "X-Forwarded-For"
FRONT = "X-Flashtalk-Front"  # has the token, so that only the front is believed about where a request comes from
LOOK = 1.0  # seconds after which the front looks whether a client that waits for an answer is still there
CONNECT = 2.0  # seconds in which a replica accepts a connection
_HOP = {"connection", "keep-alive", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"}
_SOCKET = {f"sec-websocket-{part}" for part in ("key", "version", "protocol", "extensions")}
_OWN = _HOP | _SOCKET | {FOR.lower(), FRONT.lower()}  # headers of one connection, not of the request


def client() -> aiohttp.ClientSession:
    """What the front asks replicas with."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT)
    connector = aiohttp.TCPConnector(limit=0, socket_factory=_short_socket)
    return aiohttp.ClientSession(
        timeout=timeout, connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
    )


def _short_socket(address: tuple) -> socket.socket:
    """Keeps the system's own buffer short, or a slow viewer would fall behind unseen."""
    family, kind, protocol, *_ = address
    connection = socket.socket(family, kind, protocol)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SEND_BUFFER)
    return connection


def headers_for(request: web.Request, token: str) -> dict[str, str]:
    """The headers of a request as a replica gets them. `Host` stays, with which it checks the origin."""
    kept = {name: value for name, value in request.headers.items() if name.lower() not in _OWN}
    return kept | {FOR: request.remote or "", FRONT: token}


async def forward(
    request: web.Request, asks: aiohttp.ClientSession, url: str, token: str, body: bytes | None = None
) -> web.StreamResponse:
    """Sends a request on, and its answer back while it comes. Raises what aiohttp raises if there is none.

    `body` is that of the request if it was read already.
    """
    data = body if body is not None else request.content if request.can_read_body else None
    headers = headers_for(request, token)
    asking = asks.request(request.method, url + request.path_qs, headers=headers, data=data, allow_redirects=False)
    async with await unless_gone(request, asking) as answer:
        response = web.StreamResponse(status=answer.status, headers=end_to_end(answer.headers))
        await response.prepare(request)
        try:
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
        except ConnectionError:
            pass  # the client has gone
        except aiohttp.ClientError:
            if request.transport:
                request.transport.abort()  # so that the client knows that this is not the end
        return response


async def unless_gone(request: web.Request, asking: Awaitable[ClientResponse]) -> ClientResponse:
    """A replica's answer. Gives up, which the replica sees, when the client has gone, which nobody tells a handler."""
    answering = asyncio.ensure_future(asking)
    try:
        while not (await asyncio.wait({answering}, timeout=LOOK))[0]:
            if request.transport is None:
                raise RefusedError("bad_request", "the client has gone")
        return answering.result()
    finally:
        answering.cancel()


def end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of an answer that are for the client."""
    return {name: value for name, value in headers.items() if name.lower() not in _OWN}


class Relay:
    """A WebSocket that speaks `flashtalk.v1`, between a client and a replica.

    Attributes:
        seen: index of the last moment that went to the client; None if there was none.
        ended: whether the replica has said that the session has ended.
    """

    def __init__(self, upstream: ClientWebSocketResponse, limits: Limits) -> None:
        """Takes over a connection to a replica. `limits` are those of the client."""
        self.seen: int | None = None
        self.ended = False
        self._upstream = upstream
        self._socket = websocket(limits)
        self._dead = asyncio.Event()

    @classmethod
    async def open(
        cls, request: web.Request, asks: aiohttp.ClientSession, url: str, token: str, limits: Limits
    ) -> "Relay":
        """Connects to a replica. Raises `RefusedError` as that refuses, and what aiohttp raises if it is not there."""
        protocols = [part.strip() for part in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if part]
        try:
            upstream = await asks.ws_connect(
                url + request.path_qs,
                protocols=protocols,
                headers=headers_for(request, token),
                max_msg_size=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=FAREWELL),  # pyright: ignore[reportCallIssue]  (attrs)
            )
        except aiohttp.WSServerHandshakeError as error:
            codes = (code for code, (status, _) in CODES.items() if status == error.status)
            raise RefusedError(next(codes, "internal")) from error
        return cls(upstream, limits)

    async def serve(self, request: web.Request) -> bool:
        """Carries messages until either side has ended. Returns whether the replica broke off."""
        await self._socket.prepare(request)
        up, down = asyncio.create_task(self._up()), asyncio.create_task(self._down())
        dead = asyncio.create_task(self._dead.wait())
        try:
            await asyncio.wait({down, dead}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (up, down, dead):
                task.cancel()
            await asyncio.gather(up, down, dead, return_exceptions=True)
        broken = self._dead.is_set() or self._upstream.close_code in (None, WSCloseCode.ABNORMAL_CLOSURE)
        return broken and not self.ended and not self._socket.closed

    async def farewell(self, message: Bye | None) -> web.WebSocketResponse:
        """Ends both sides; the client is told the message."""
        with suppress(ConnectionError):
            if message and not self._socket.closed:
                await self._socket.send_str(encode(message))
            await self._socket.close(code=WSCloseCode.GOING_AWAY if message else WSCloseCode.OK)
        await self._upstream.close()
        return self._socket

    def abandon(self) -> None:
        """The replica is dead, though its connection may not say so."""
        self._dead.set()

    async def _up(self) -> None:
        """From the client to the replica; ends the other direction too."""
        with suppress(ConnectionError):
            async for message in self._socket:
                if message.type == WSMsgType.BINARY:
                    await self._upstream.send_bytes(message.data)
                elif message.type == WSMsgType.TEXT:
                    await self._upstream.send_str(message.data)
        await self._upstream.close()

    async def _down(self) -> None:
        """From the replica to the client."""
        async for message in self._upstream:
            if message.type == WSMsgType.BINARY:
                await self._socket.send_bytes(message.data)
                self._note_media(message.data)
            elif message.type == WSMsgType.TEXT:
                await self._socket.send_str(message.data)
                self._note_text(message.data)

    def _note_media(self, data: bytes) -> None:
        media = unpack(data)
        if media.kind == MEDIA and self.seen is not None:
            ahead = (media.moment - self.seen) % MOMENTS
            self.seen += ahead if ahead < MOMENTS // 2 else 0

    def _note_text(self, text: str) -> None:
        if '"type":"ready"' in text or '"type":"bye"' in text:
            message = decode_from_server(text)
            if isinstance(message, Ready):
                self.seen = message.position - 1
            self.ended = isinstance(message, Bye)
