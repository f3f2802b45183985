"""The process of a cluster: starts replicas by Ray, and is their front until it is told to end."""

import asyncio
import logging
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from model.errors import UserError
from streaming.cluster.front import Front
from streaming.cluster.group import Load
from streaming.cluster.scaling import Size
from streaming.serve.access import Access, is_loopback
from streaming.serve.server import Settings, listening, log_to_stderr, on_signals

NAME = "flashtalk"  # of the application in Ray Serve
STORE = 100 * 2**20  # bytes of Ray's object store, which carries nothing here

log = logging.getLogger("flashtalk.serve")


def run(load: Load, size: Size, settings: Settings, address: str | None, overcommit: bool) -> None:
    """Serves until SIGINT or SIGTERM. Raises `UserError` if the port, Ray or the replicas cannot be had.

    Args:
        load: gives a pipeline with its networks, on the machine of a replica.
        size: of the cluster; with no replicas, others start them, and Ray is not needed.
        settings: of the front.
        address: of a Ray cluster; None: one on this machine, which ends with this process.
        overcommit: that of `Placement`.
    """
    host = settings.host
    if size.replicas:
        if address and is_loopback(host):
            raise UserError(f"--ray {address}: replicas on other machines cannot reach --host {host}; name another one")
        size = _connect(address, size)
        if not is_loopback(host):
            host = _own_address()
    log_to_stderr(settings.log_json)
    asyncio.run(_serve(load, size, settings, host, overcommit))


def _connect(address: str | None, size: Size) -> Size:
    """Connects this process to Ray; returns the size with the GPUs of a replica, which depend on what Ray has."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or it would tell its makers of this cluster
    os.environ.setdefault("RAY_worker_niceness", "0")  # it is 15, which on a busy machine starves what is real time
    try:
        import ray  # pyright: ignore[reportMissingImports]: it is an extra, here and below
    except ModuleNotFoundError as error:
        raise UserError("cluster needs the package ray: pip install 'flashtalk-triton[cluster]'") from error
    options: dict[str, Any] = {}
    if address is None:
        cpus = max(os.cpu_count() or 1, math.ceil(size.most * size.cpus))
        options = {"include_dashboard": False, "object_store_memory": STORE, "num_cpus": cpus}
    try:
        ray.init(address or "local", logging_level=logging.WARNING, **options)
    except ConnectionError as error:
        raise UserError(f"--ray {address}: no Ray cluster answers there") from error
    if size.gpus is None:
        size = replace(size, gpus=float(size.ranks) if ray.cluster_resources().get("GPU") else 0.0)
    return size


def _own_address() -> str:
    from ray.util import get_node_ip_address  # pyright: ignore[reportMissingImports]

    return get_node_ip_address()


async def _serve(load: Load, size: Size, settings: Settings, host: str, overcommit: bool) -> None:
    front = Front(Access(settings.token, settings.origins, settings.limits), settings.limits, overcommit)
    ended = on_signals()
    async with listening(front.app, settings) as url:
        own = f"http://{host}:{url.rpartition(':')[2]}"
        async with _replicas(load, size, settings, own, ended):
            if not ended.is_set():
                print(settings.page(url), flush=True)
            await ended.wait()
            log.info("ending: %d replicas keep their sessions", len(front.placement.replicas))
            front.draining = True


@asynccontextmanager
async def _replicas(
    load: Load, size: Size, settings: Settings, front: str, ended: asyncio.Event
) -> AsyncIterator[None]:
    """Replicas in Ray, from when they are ready, or the end has come, until all have kept their sessions."""
    if not size.replicas:
        yield
        return
    from ray import serve  # pyright: ignore[reportMissingImports]

    from streaming.cluster.deployment import application

    def start() -> None:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        serve.run(application(load, size, settings, front), name=NAME, route_prefix=None)

    starting = asyncio.ensure_future(asyncio.to_thread(start))
    waiting = asyncio.ensure_future(ended.wait())
    try:
        await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and (error := starting.exception()):
            raise UserError(f"the replicas cannot be started: {error}") from error
        yield
    finally:
        waiting.cancel()
        await asyncio.to_thread(serve.delete, NAME)
        await asyncio.gather(starting, return_exceptions=True)
