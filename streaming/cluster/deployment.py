"""A replica in Ray Serve, which starts it where there is room, restarts it when it dies, and wants more or fewer.

Ray carries no request and no frame: a replica has a port of its own.
"""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import aiohttp
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.util import get_node_ip_address

from streaming.cluster.replica import Replica
from streaming.cluster.scaling import Size, by_sessions
from streaming.serve.access import is_loopback
from streaming.serve.server import Settings, log_to_stderr, warm
from streaming.serve.sessions import Pipeline


class Worker:
    """What Ray Serve starts on a machine: networks and their server."""

    async def __init__(self, load: Callable[[], Pipeline], sessions: int, settings: Settings, front: str) -> None:
        """Loads the networks, and serves once they are warm."""
        log_to_stderr(settings.log_json)
        pipelines = await asyncio.to_thread(_loaded, load, sessions)
        host = settings.host if is_loopback(settings.host) else get_node_ip_address()
        self._replica = Replica(pipelines, replace(settings, host=host, port=0), front)
        self._stack = AsyncExitStack()
        await self._stack.enter_async_context(self._replica.running())
        self._client = await self._stack.enter_async_context(aiohttp.ClientSession())

    async def check_health(self) -> None:
        """Ray Serve replaces a replica whose server does not answer."""
        async with self._client.get(self._replica.url + "/healthz"):
            pass

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `scaling.by_sessions` decides by."""
        report = self._replica.report
        return {"sessions": float(len(report.sessions)), "places": float(min(report.limit, report.fits))}

    async def __del__(self) -> None:
        """Ray Serve ends the replica: sessions are kept, and can go on elsewhere."""
        await self._stack.aclose()


def _loaded(load: Callable[[], Pipeline], count: int) -> list[Pipeline]:
    pipelines = [load() for _ in range(count)]
    for pipeline in pipelines:
        warm(pipeline)
    return pipelines


def application(load: Callable[[], Pipeline], size: Size, settings: Settings, front: str) -> serve.Application:
    """What Ray Serve is to run.

    Args:
        load: gives a pipeline with its networks, on a replica's machine.
        size: of the cluster.
        settings: of the front; replicas take its token, limits, portraits, snapshots and origins.
        front: its URL, as replicas reach it.
    """
    scaling = AutoscalingConfig(
        min_replicas=size.replicas,
        max_replicas=size.most,
        metrics_interval_s=2.0,
        look_back_period_s=10.0,
        upscale_delay_s=5.0,
        downscale_delay_s=size.idle,
        policy=AutoscalingPolicy(policy_function=by_sessions),
    )
    return (
        serve.deployment(Worker)
        .options(
            name="replica",
            ray_actor_options={"num_gpus": size.gpus, "num_cpus": size.cpus},
            autoscaling_config=scaling,
            health_check_period_s=5.0,
            health_check_timeout_s=30.0,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=2 * settings.limits.drain,
        )
        .bind(load, size.sessions, settings, front)
    )
