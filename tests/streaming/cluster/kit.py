"""A front and replicas in one event loop, with numbered faces: real sockets and sessions, neither Ray nor networks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp.test_utils import TestClient

from streaming.cluster.front import Front
from streaming.cluster.replica import Replica
from streaming.serve.access import Access
from streaming.serve.limits import Limits
from streaming.serve.server import Settings
from tests.streaming.serve.kit import PORTRAITS, TOKEN, AsServed, NumberedPipeline, Serving, eventually


class Clustered(Serving):
    """A cluster, and a client of its front."""

    def __init__(self, client: TestClient, front: Front, settings: Settings) -> None:
        self.client, self.front, self.settings = client, front, settings
        self.replicas: list[Replica] = []
        self._stacks: dict[Replica, AsyncExitStack] = {}

    async def start(self, sessions: int) -> Replica:
        """Starts a replica, and waits until the front knows it."""
        pipelines = [NumberedPipeline() for _ in range(sessions)]
        replica, known = Replica(pipelines, self.settings, str(self.client.make_url(""))), self.front.placement.replicas
        self._stacks[replica] = AsyncExitStack()
        await self._stacks[replica].enter_async_context(replica.running())
        await eventually(lambda: any(there.url == replica.url for there in known.values()))
        self.replicas.append(replica)
        return replica

    async def end(self, replica: Replica) -> None:
        """Ends a replica as Ray Serve does."""
        await self._stacks.pop(replica).aclose()
        self.replicas.remove(replica)

    def of(self, facts: dict[str, Any]) -> Replica:
        """The replica that has a session."""
        return next(replica for replica in self.replicas if facts["id"] in replica.sessions.open)


@asynccontextmanager
async def clustered(folder: Path, *sessions: int, overcommit: bool = True, **limits: Any) -> AsyncIterator[Clustered]:
    bounds = replace(Limits(), **limits)
    front = Front(Access(TOKEN, [], bounds), bounds, overcommit)
    settings = Settings("127.0.0.1", 0, TOKEN, bounds, PORTRAITS, folder, [], [], False)
    async with TestClient(AsServed(front.app)) as client:
        cluster = Clustered(client, front, settings)
        try:
            await asyncio.gather(*(cluster.start(count) for count in sessions))
            yield cluster
        finally:
            for replica in list(cluster.replicas):
                await cluster.end(replica)
