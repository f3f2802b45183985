"""HTTP: routes and what they do. `docs/serve.md` documents it for clients."""

import asyncio
import logging
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import BodyPartReader, web
from aiohttp.http import HttpProcessingError
from aiortc import RTCIceServer
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from streaming.serve.access import Access, bearer
from streaming.serve.answers import answering, with_headers
from streaming.serve.errors import RefusedError
from streaming.serve.messages import SessionOptions, decode_options
from streaming.serve.metrics import Metrics
from streaming.serve.rtc import Peer
from streaming.serve.session import Session
from streaming.serve.sessions import Sessions
from streaming.serve.socket import Connection
from streaming.serve.uploads import portrait_of, read_all, say_recording

PAGE = Path(__file__).parent / "page"
HEALTHY_LAG = 1.0  # seconds by which the event loop may be late
OPTIONS_BYTES = 16 * 1024
SEND_BUFFER = 64 * 1024  # bytes

log = logging.getLogger("flashtalk.serve")


class Server:
    """The web application of some sessions.

    Attributes:
        app: for aiohttp.
        metrics: of the sessions.
    """

    def __init__(
        self, sessions: Sessions, access: Access, portraits: Path | None, ice_servers: list[RTCIceServer] | None = None
    ) -> None:
        """Puts the application together.

        Args:
            sessions: of this process.
            access: who may do what.
            portraits: a folder of pictures that a client may choose from; None: there are none.
            ice_servers: for viewers behind firewalls.
        """
        self._sessions, self._access = sessions, access
        self._portraits = {path.stem: path for path in sorted(portraits.glob("*.jpg"))} if portraits else {}
        self._ice_servers = ice_servers or []
        self._peers: dict[str, tuple[Session, Peer]] = {}
        self._lag = 0.0
        self.metrics = Metrics(sessions)
        sessions.on_begin = lambda session: setattr(session.broadcast, "on_encoded", self.metrics.encoded.observe)
        sessions.on_end = self.metrics.ended
        answers = answering(access, lambda code: self.metrics.refused.labels(code).inc())
        self.app = web.Application(middlewares=[answers], client_max_size=sessions.limits.recording_bytes)
        self.app.on_response_prepare.append(with_headers(access))
        self.app.router.add_routes(self._routes())
        self.app.cleanup_ctx.append(self._sweeping)
        self.app.on_shutdown.append(self._end)

    def _routes(self) -> list[web.AbstractRouteDef]:
        one = "/v1/sessions/{id}"
        return [
            web.get("/", self._page),
            web.static("/page", PAGE),
            web.get("/v1/portraits", self._list_portraits),
            web.get("/v1/portraits/{name}", self._portrait),
            web.post("/v1/sessions", self._create),
            web.get("/v1/sessions", self._list),
            web.get(one, self._show),
            web.delete(one, self._delete),
            web.post(one + "/resume", self._resume),
            web.post(one + "/audio", self._audio),
            web.post(one + "/interrupt", self._interrupt),
            web.post(one + "/snapshot", self._snapshot),
            web.post(one + "/ticket", self._ticket),
            web.get(one + "/ws", self._socket),
            web.get(one + "/stream.mp4", self._stream),
            web.post(one + "/whep", self._whep),
            web.delete(one + "/whep/{viewer}", self._end_whep),
            web.get("/healthz", self._healthz),
            web.get("/readyz", self._readyz),
            web.get("/metrics", self._metrics),
        ]

    def _session(self, request: web.Request) -> Session:
        """The session that the request names and has the key of."""
        with self._access.trying(request.remote or ""):
            return self._sessions.find(request.match_info["id"], bearer(request.headers))

    # --- Page --------------------------------------------------------------------------------------------------------

    async def _page(self, _request: web.Request) -> web.FileResponse:
        return web.FileResponse(PAGE / "index.html")

    async def _list_portraits(self, _request: web.Request) -> web.Response:
        return web.json_response({"portraits": list(self._portraits)})

    async def _portrait(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(self._known_portrait(request.match_info["name"]))

    def _known_portrait(self, name: str) -> Path:
        if name not in self._portraits:
            raise RefusedError("not_found", "there is no such portrait")
        return self._portraits[name]

    # --- Sessions ----------------------------------------------------------------------------------------------------

    async def _create(self, request: web.Request) -> web.Response:
        """A form with `portrait`, a file or the name of a known one, and `options`, JSON."""
        self._access.check_token(request.headers, request.remote or "")
        self._access.check_creation()
        if not request.content_type.startswith("multipart/"):
            raise RefusedError("bad_request", "send a form (multipart/form-data) with portrait and options")
        portrait, options = None, SessionOptions()
        try:
            async for part in await request.multipart():
                if not isinstance(part, BodyPartReader) or part.name not in ("portrait", "options"):
                    raise RefusedError("bad_request", "the form has the fields portrait and options")
                if part.name == "options":
                    options = decode_options(await read_all(part, OPTIONS_BYTES, "options"))
                elif part.filename is None:
                    name = await read_all(part, 100, "the name of a portrait")
                    portrait = self._known_portrait(name.decode(errors="replace"))
                else:
                    data = await read_all(part, self._sessions.limits.portrait_bytes, "the portrait")
                    portrait = await asyncio.to_thread(portrait_of, data, self._sessions.limits)
        except (ValueError, AssertionError, HttpProcessingError) as error:  # of aiohttp's parsers
            raise RefusedError("bad_request", "the form is damaged") from error
        if portrait is None:
            raise RefusedError("bad_request", "the form has no portrait")
        return self._begun(await self._sessions.create(portrait, options))

    async def _resume(self, request: web.Request) -> web.Response:
        position = request.query.get("position")
        if position is not None and not re.fullmatch("[0-9]{1,15}", position):
            raise RefusedError("bad_request", "position is the index of a moment")
        with self._access.trying(request.remote or ""):
            identifier, key = request.match_info["id"], bearer(request.headers)
            moment, admit = None if position is None else int(position), self._access.check_creation
            session, was_open = await self._sessions.resume(identifier, key, moment, admit)
        return self._begun(session, 200 if was_open else 201)

    def _begun(self, session: Session, status: int = 201) -> web.Response:
        ice = [{"urls": s.urls, "username": s.username, "credential": s.credential} for s in self._ice_servers]
        body = {"id": session.id, "key": session.key, "ice_servers": ice} | self._facts(session)
        return web.json_response(body, status=status, headers={"Location": f"/v1/sessions/{session.id}"})

    def _facts(self, session: Session) -> dict[str, Any]:
        ready = msgspec.to_builtins(session.ready())
        return {name: ready[name] for name in ("width", "height", "fps", "rate", "position", "mime", "limits")}

    async def _list(self, request: web.Request) -> web.Response:
        """For operators: what is open."""
        self._access.check_token(request.headers, request.remote or "")
        return web.json_response({"sessions": [_listed(session) for session in self._sessions.open.values()]})

    async def _show(self, request: web.Request) -> web.Response:
        session = self._session(request)
        return web.json_response(self._facts(session) | {"stats": msgspec.to_builtins(session.figures())})

    async def _delete(self, request: web.Request) -> web.Response:
        """By whoever has the session's key, or by an operator, who has the token."""
        secret, identifier = bearer(request.headers), request.match_info["id"]
        with self._access.trying(request.remote or ""):
            by_operator = self._access.is_token(secret)
            session = self._sessions.there(identifier) if by_operator else self._sessions.find(identifier, secret)
        await self._sessions.close(session)
        return web.Response(status=204)

    async def _audio(self, request: web.Request) -> web.Response:
        session = self._session(request)
        data = await read_all(request.content, session.limits.recording_bytes, "the recording")
        speaker = object()
        session.claim(speaker)
        session.attend()
        try:
            segment, seconds = await say_recording(session, data, gone=lambda: request.transport is None)
        finally:
            session.leave()
            session.release(speaker)
        return web.json_response({"segment": segment, "seconds": round(seconds, 3)})

    async def _interrupt(self, request: web.Request) -> web.Response:
        finished = self._session(request).interrupt()
        heard = finished and {"segment": finished.segment, "position": finished.position}
        return web.json_response({"interrupted": heard})

    async def _snapshot(self, request: web.Request) -> web.Response:
        return web.json_response({"position": await self._sessions.snapshot(self._session(request))})

    async def _ticket(self, request: web.Request) -> web.Response:
        ticket = self._access.ticket(self._session(request).id)
        return web.json_response({"ticket": ticket, "seconds": self._sessions.limits.ticket}, status=201)

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        identifier = request.match_info["id"]
        if ticket := request.query.get("ticket"):
            with self._access.trying(request.remote or ""):
                self._access.use_ticket(identifier, ticket)
            session = self._sessions.there(identifier)
        else:
            session = self._session(request)
        keep_short(request)
        return await Connection(session).serve(request)

    # --- Viewers -----------------------------------------------------------------------------------------------------

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """A film without an end, for players that read from HTTP."""
        session = self._session(request)
        keep_short(request)
        viewer = session.join("http")
        session.attend()
        response = web.StreamResponse(headers={"Content-Type": "video/mp4"})
        try:
            await response.prepare(request)
            await response.write(session.broadcast.header)
            while item := await viewer.next():
                async with asyncio.timeout(session.limits.stuck):
                    await response.write(item.fragment)
        except ConnectionError:
            pass  # the player has gone
        except TimeoutError:  # the player reads nothing; a polite end would wait until it has read what was written
            if request.transport:
                request.transport.abort()
        finally:
            session.broadcast.leave(viewer)
            session.leave()
        return response

    async def _whep(self, request: web.Request) -> web.Response:
        session = self._session(request)
        if request.content_type != "application/sdp":
            raise RefusedError("bad_request", "an offer is application/sdp")
        offer = await read_all(request.content, session.limits.message_bytes, "the offer")
        peer = Peer(session, self._ice_servers, self._forget)
        answer = await peer.answer(offer.decode(errors="replace"))
        identifier = secrets.token_urlsafe(12)
        self._peers[identifier] = session, peer
        location = f"/v1/sessions/{session.id}/whep/{identifier}"
        return web.Response(status=201, text=answer, content_type="application/sdp", headers={"Location": location})

    async def _end_whep(self, request: web.Request) -> web.Response:
        session, (owner, peer) = self._session(request), self._peers.get(request.match_info["viewer"], (None, None))
        if peer is None or owner is not session:
            raise RefusedError("not_found")
        await peer.end()
        return web.Response(status=204)

    def _forget(self, peer: Peer) -> None:
        self._peers = {name: entry for name, entry in self._peers.items() if entry[1] is not peer}

    # --- Operation ---------------------------------------------------------------------------------------------------

    async def _healthz(self, _request: web.Request) -> web.Response:
        body = {"lag_seconds": round(self._lag, 3), "sessions": len(self._sessions.open)}
        return web.json_response(body, status=200 if self._lag < HEALTHY_LAG else 503)

    async def _readyz(self, _request: web.Request) -> web.Response:
        if not self._sessions.free:
            raise RefusedError("draining" if self._sessions.draining else "limit_sessions")
        return web.json_response({"free": self._sessions.free, "capacity": self._sessions.capacity})

    async def _metrics(self, request: web.Request) -> web.Response:
        self._access.check_token(request.headers, request.remote or "")
        body = generate_latest(self.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _sweeping(self, _app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(self._sweep())
        yield
        task.cancel()

    async def _sweep(self) -> None:
        while True:
            begun = time.monotonic()
            await asyncio.sleep(1)
            self._lag = time.monotonic() - begun - 1
            try:
                await self._sessions.sweep()
            except Exception:
                log.exception("sweep")

    async def _end(self, _app: web.Application) -> None:
        await self._sessions.drain()
        await asyncio.gather(*(peer.end() for _, peer in list(self._peers.values())))


def _listed(session: Session) -> dict[str, Any]:
    return {
        "id": session.id,
        "state": str(session.live.state),
        "position": session.live.position,
        "viewers": len(session.broadcast.viewers),
        "seconds": round(time.monotonic() - session.begun),
    }


def keep_short(request: web.Request) -> None:
    """Keeps the system's own buffer of a connection short, or a slow viewer would fall minutes behind unseen."""
    connection = request.transport and request.transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
