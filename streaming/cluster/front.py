"""The address that clients know. It has no sessions: it carries each request to the replica that has its session.

What it speaks is what a replica speaks, the API of `docs/serve.md`, so the page comes from a replica too.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from yarl import URL

from streaming.cluster.placement import EVERY, Placement, Replica, Report
from streaming.cluster.relay import Relay, client, end_to_end, forward, headers_for
from streaming.serve.access import REMEMBERED, Access
from streaming.serve.answers import answering, with_headers
from streaming.serve.app import OPTIONS_BYTES, keep_short
from streaming.serve.errors import RefusedError
from streaming.serve.limits import Limits
from streaming.serve.messages import Bye
from streaming.serve.uploads import read_all

FORM = 4096  # bytes around portrait and options
BEGIN = 120.0  # seconds in which a session begins
PROBE = 2.0  # seconds in which a replica answers whether it lives
UNREACHABLE = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError)  # also what takes too long
_report = msgspec.json.Decoder(Report)

log = logging.getLogger("flashtalk.serve")


class Front:
    """The web application of a cluster.

    Attributes:
        app: for aiohttp.
        placement: of the sessions.
        draining: whether no sessions may begin.
    """

    def __init__(self, access: Access, limits: Limits, overcommit: bool = False) -> None:
        """`access` has the token, which replicas have too; `overcommit` is that of `Placement`."""
        self.placement, self.draining = Placement(time.monotonic, overcommit), False
        self.placement.on_lost = self._lost
        self._access, self._limits = access, limits
        self._relays: dict[Relay, Replica] = {}
        self._seen: dict[str, int] = {}  # of sessions that were lost: the last moment that went to a viewer
        self._count_metrics()
        answers = answering(access, lambda code: self._refused.labels(code).inc())
        self.app = web.Application(middlewares=[answers], client_max_size=limits.recording_bytes)
        self.app.on_response_prepare.append(with_headers(access))
        one = "/v1/sessions/{id}"
        self.app.router.add_routes(
            [
                web.post("/cluster/replicas", self._report),
                web.get("/cluster/targets", self._targets),
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.post("/v1/sessions", self._create),
                web.get("/v1/sessions", self._list),
                web.post(one + "/resume", self._resume),
                web.get(one + "/ws", self._socket),
                web.route("*", one, self._sticky),
                web.route("*", one + "/{action:.+}", self._sticky),
                web.get("/{path:.*}", self._any),
            ]
        )
        self.app.cleanup_ctx.append(self._running)

    async def _running(self, _app: web.Application) -> AsyncIterator[None]:
        self._client = client()
        task = asyncio.create_task(self._sweep())
        yield
        task.cancel()
        await self._client.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            self.placement.sweep()

    def _lost(self, replica: Replica) -> None:
        log.warning("replica %s is lost, with %d sessions", replica.name, len(replica.begun))
        self._losses.inc()
        for relay, there in self._relays.items():
            if there is replica:
                relay.abandon()

    # --- Replicas ----------------------------------------------------------------------------------------------------

    async def _report(self, request: web.Request) -> web.Response:
        self._access.check_token(request.headers, request.remote or "")
        try:
            report = _report.decode(await request.read())
        except msgspec.MsgspecError as error:
            raise RefusedError("bad_request", f"report: {error}") from error
        if report.replica not in self.placement.replicas:
            log.info("replica %s at %s, for %d sessions", report.replica, report.url, report.limit)
        return web.json_response({"lost": self.placement.report(report)})

    async def _targets(self, request: web.Request) -> web.Response:
        """The replicas as Prometheus discovers them by HTTP."""
        self._access.check_token(request.headers, request.remote or "")
        replicas = self.placement.replicas.values()
        targets = [{"targets": [URL(r.url).authority], "labels": {"replica": r.name}} for r in replicas]
        return web.json_response(targets)

    # --- Sessions ----------------------------------------------------------------------------------------------------

    async def _create(self, request: web.Request) -> web.StreamResponse:
        self._access.check_token(request.headers, request.remote or "")
        self._access.check_creation()
        self._check_room()
        body = await read_all(request.content, self._limits.portrait_bytes + OPTIONS_BYTES + FORM, "the form")
        return await self._begin(request, request.path_qs, body, None)

    async def _list(self, request: web.Request) -> web.Response:
        """For operators: what is open on all replicas."""
        self._access.check_token(request.headers, request.remote or "")
        lists = await asyncio.gather(*(self._listed(replica) for replica in self.placement.replicas.values()))
        return web.json_response({"sessions": [session for sessions in lists for session in sessions]})

    async def _listed(self, replica: Replica) -> list[dict[str, Any]]:
        headers, timeout = {"Authorization": f"Bearer {self._access.token}"}, aiohttp.ClientTimeout(PROBE)
        try:
            async with self._client.get(replica.url + "/v1/sessions", headers=headers, timeout=timeout) as answer:
                return (await answer.json())["sessions"]
        except UNREACHABLE:
            await self._lives(replica)
            return []

    async def _resume(self, request: web.Request) -> web.StreamResponse:
        """Where the session is, if its replica lives, which knows best whether it can be resumed; else anywhere."""
        session, path = request.match_info["id"], request.path_qs
        if session in self._seen and "position" not in request.query:
            path = str(request.rel_url.update_query(position=self._seen[session] + 1))
        owner = self.placement.owner(session)
        if owner and not owner.draining:
            try:
                return await self._post(request, owner, path, b"", session)
            except UNREACHABLE as error:
                if await self._lives(owner):
                    raise RefusedError("lost") from error
        return await self._begin(request, path, b"", session)

    async def _begin(self, request: web.Request, path: str, body: bytes, resumed: str | None) -> web.Response:
        """Begins a session, or goes on with one, on a replica with room. One that has none after all is passed by."""
        tried: list[Replica] = []
        while True:
            self._check_room(resumed)
            with self.placement.placing(resumed, tried) as replica:
                tried.append(replica)
                try:
                    response = await self._post(request, replica, path, body, resumed)
                except UNREACHABLE:
                    await self._lives(replica)
                    continue
            if response.status != 503:
                return response

    def _check_room(self, resumed: str | None = None) -> None:
        if self.draining:
            raise RefusedError("draining")
        if resumed is None and not self.placement.free:
            raise RefusedError("limit_sessions")

    async def _post(
        self, request: web.Request, replica: Replica, path: str, body: bytes, resumed: str | None
    ) -> web.Response:
        """The replica's answer to a request that begins a session. Raises one of `UNREACHABLE` if there is none."""
        headers, timeout = headers_for(request, self._access.token), aiohttp.ClientTimeout(BEGIN)
        async with self._client.post(replica.url + path, data=body, headers=headers, timeout=timeout) as answer:
            content = await answer.read()
        if answer.status in (200, 201):  # 200: it was open, and goes on there
            session = json.loads(content)["id"]
            self.placement.opened(session, replica)
            self._seen.pop(session, None)
        elif answer.status == 404 and resumed and self.placement.owner(resumed) is None:
            self._seen.pop(resumed, None)
        return web.Response(status=answer.status, body=content, headers=end_to_end(answer.headers))

    def _replica_of(self, request: web.Request) -> Replica:
        replica = self.placement.owner(request.match_info["id"])
        if replica is None:
            raise RefusedError("not_found")
        return replica

    async def _sticky(self, request: web.Request) -> web.StreamResponse:
        keep_short(request)
        return await self._forward(request, self._replica_of(request))

    async def _any(self, request: web.Request) -> web.StreamResponse:
        """What every replica answers in the same way: the page, and portraits."""
        replica = next(iter(self.placement.replicas.values()), None)
        if replica is None:
            raise RefusedError("limit_sessions", "no replica is ready")
        return await self._forward(request, replica)

    async def _forward(self, request: web.Request, replica: Replica) -> web.StreamResponse:
        try:
            return await forward(request, self._client, replica.url, self._access.token)
        except UNREACHABLE as error:
            await self._lives(replica)
            raise RefusedError("lost") from error

    async def _lives(self, replica: Replica) -> bool:
        """Whether a replica that broke off a connection still answers. If not, it is lost."""
        try:
            async with self._client.get(replica.url + "/healthz", timeout=aiohttp.ClientTimeout(PROBE)):
                return True
        except UNREACHABLE:
            self.placement.lose(replica)
            return False

    # --- WebSockets --------------------------------------------------------------------------------------------------

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        session, replica = request.match_info["id"], self._replica_of(request)
        keep_short(request)
        try:
            relay = await Relay.open(request, self._client, replica.url, self._access.token, self._limits)
        except UNREACHABLE as error:
            await self._lives(replica)
            raise RefusedError("lost") from error
        self._relays[relay] = replica
        try:
            broken = await relay.serve(request)
        finally:
            del self._relays[relay]
        bye = None
        if broken and not await self._lives(replica):
            bye = self._bye(session, relay)
        elif relay.ended:
            self.placement.closed(session, replica)
        return await relay.farewell(bye)

    def _bye(self, session: str, relay: Relay) -> Bye:
        """What a client is told whose replica has died: where to go on."""
        seen = max(self._seen.get(session, -1), -1 if relay.seen is None else relay.seen)
        if seen >= 0:
            self._seen[session] = seen
        if len(self._seen) > REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return Bye("lost", seen + 1)

    # --- Operation ---------------------------------------------------------------------------------------------------

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.json_response({"replicas": len(self.placement.replicas)})

    async def _readyz(self, _request: web.Request) -> web.Response:
        self._check_room()
        return web.json_response({"free": self.placement.free, "capacity": self.placement.capacity})

    async def _metrics(self, request: web.Request) -> web.Response:
        self._access.check_token(request.headers, request.remote or "")
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _count_metrics(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._refused = Counter("flashtalk_refused", "What the front refused", ["code"], registry=registry)
        self._losses = Counter("flashtalk_replicas_lost", "Replicas that died", registry=registry)
        placement = self.placement
        figures: dict[str, tuple[str, Any]] = {
            "flashtalk_cluster_replicas": ("Replicas that live", lambda: len(placement.replicas)),
            "flashtalk_cluster_capacity": ("Sessions that there are networks for", lambda: placement.capacity),
            "flashtalk_cluster_free": ("Sessions that can begin now", lambda: placement.free),
            "flashtalk_cluster_sessions": (
                "Sessions that are open",
                lambda: sum(len(replica.begun) for replica in placement.replicas.values()),
            ),
        }
        for name, (text, value) in figures.items():
            Gauge(name, text, registry=registry).set_function(value)
