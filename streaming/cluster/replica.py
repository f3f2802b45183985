"""A server of `streaming.serve` on a port of its own, which reports to a front. Knows no Ray."""

import asyncio
import hmac
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from streaming.cluster.placement import EVERY, Report, fitting
from streaming.cluster.relay import FOR, FRONT
from streaming.serve.server import Settings, app_of, listening
from streaming.serve.sessions import Pipeline, Sessions

log = logging.getLogger("flashtalk.serve")


class Replica:
    """Sessions, their server, and what it reports.

    Attributes:
        sessions: of this replica.
        url: of its server, once it runs.
    """

    def __init__(self, pipelines: Sequence[Pipeline], settings: Settings, front: str) -> None:
        """`settings` are those of the front, but for the address, which is this replica's; `front` is its URL."""
        self.sessions = Sessions(pipelines, settings.limits, settings.snapshots)
        self.url = ""
        self._settings, self._front = settings, front.rstrip("/") + "/cluster/replicas"
        self._name, self._chunk = secrets.token_hex(6), pipelines[0].config.chunk
        self._reached = True

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serves and reports while the body runs; then ends all sessions, each with a snapshot."""
        app = app_of(self.sessions, self._settings)
        app.middlewares.insert(0, believing(self._settings.token))
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(2 * EVERY)) as client,
            listening(app, self._settings) as self.url,
        ):
            reporting = asyncio.create_task(self._report_on(client))
            try:
                yield
            finally:
                reporting.cancel()
                self.sessions.draining = True
                await self._report(client)  # so that no session comes here again

    @property
    def report(self) -> Report:
        """What the front has to know now."""
        chunks = [session.live.stats(("chunk",))["chunk"]["p50_s"] for session in self.sessions.open.values()]
        fits = fitting(self.sessions.capacity, chunks, self._chunk.new_frames / self._chunk.tgt_fps)
        open_now, draining = list(self.sessions.open), self.sessions.draining
        return Report(self._name, self.url, self.sessions.capacity, fits, open_now, draining)

    async def _report_on(self, client: aiohttp.ClientSession) -> None:
        while True:
            await self._report(client)
            await asyncio.sleep(EVERY)

    async def _report(self, client: aiohttp.ClientSession) -> None:
        """Reports, and ends the sessions that the front has given to others. Without a front, there is a next time."""
        headers = {"Authorization": f"Bearer {self._settings.token}"}
        try:
            async with client.post(self._front, data=msgspec.json.encode(self.report), headers=headers) as answer:
                answer.raise_for_status()
                lost = (await answer.json())["lost"]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if self._reached:
                log.warning("the front at %s cannot be reached: %s", self._front, error or type(error).__name__)
            self._reached = False
            return
        self._reached = True
        for session in lost:
            if there := self.sessions.open.get(session):
                await self.sessions.close(there, "lost")


def believing(token: str) -> Any:
    """A middleware that believes the front, which has the token, about the address that a request comes from."""

    @web.middleware
    async def believe(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        told, address = request.headers.get(FRONT, ""), request.headers.get(FOR)
        if address and hmac.compare_digest(told.encode(), token.encode()):
            request = request.clone(remote=address)
        return await handler(request)

    return believe
