"""A replica in Ray Serve, which starts it where there is room, restarts it when it dies, and wants more or fewer.

Ray carries no request and no frame: a replica has a port of its own.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from ray import serve  # pyright: ignore[reportMissingImports]: it is an extra, here and below
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy  # pyright: ignore[reportMissingImports]
from ray.util import get_node_ip_address  # pyright: ignore[reportMissingImports]

from model.errors import UserError
from streaming.cluster.group import Load, leading
from streaming.cluster.replica import Replica
from streaming.cluster.scaling import Size, by_sessions
from streaming.pipeline import TalkingHeadPipeline
from streaming.ranks import check_sessions
from streaming.serve.access import is_loopback
from streaming.serve.limits import Limits
from streaming.serve.server import Settings, log_to_stderr, warm


class Worker:
    """What Ray Serve starts on a machine: networks and their server."""

    async def __init__(self, load: Load, size: Size, settings: Settings, front: str) -> None:
        """Loads the networks, and serves once they are warm."""
        log_to_stderr(settings.log_json)
        self._stack = AsyncExitStack()
        pipelines = await asyncio.to_thread(self._stack.enter_context, _loaded(load, size, settings.limits))
        host = settings.host if is_loopback(settings.host) else get_node_ip_address()
        self._replica = Replica(pipelines, replace(settings, host=host, port=0, proxies=()), front)
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


@contextmanager
def _loaded(load: Load, size: Size, limits: Limits) -> Iterator[list[TalkingHeadPipeline]]:
    """A pipeline for each session, warm; with several ranks, those follow while the body runs."""
    with ExitStack() as stack:
        pipelines: list[TalkingHeadPipeline] = []
        for _ in range(size.sessions):
            pipelines.append(stack.enter_context(leading(load, size.ranks)) if size.ranks > 1 else load())
            warm(pipelines[-1], limits)  # so that the next one sees what memory is left
        yield pipelines


def application(load: Load, size: Size, settings: Settings, front: str) -> serve.Application:
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
        look_back_period_s=20.0,  # of metrics that come every 10 s
        upscale_delay_s=5.0,
        downscale_delay_s=size.idle,
        policy=AutoscalingPolicy(policy_function=by_sessions),
    )
    deployment = serve.deployment(
        name="replica",
        ray_actor_options={"num_gpus": size.gpus, "num_cpus": size.cpus},
        autoscaling_config=scaling,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=2 * settings.limits.drain,
    )
    return deployment(Worker).bind(load, size, settings, front)


def build(arguments: dict[str, Any]) -> serve.Application:
    """`application` from the `args` of a configuration file of Ray Serve, such as that of a RayService.

    They are `front`, `snapshots`, and as options of the command have them: `replicas`, `max_replicas`, `sessions`,
    `ranks`, `gpus`, `cpus`, `limits`, `viewers`, `idle`, `portraits`, `origins`, `ice_servers`. `pipeline` has
    arguments of `TalkingHeadPipeline.from_pretrained`. The token is $FLASHTALK_TOKEN. Raises `UserError` for any other
    name.
    """
    given = _DEFAULTS | arguments
    if unknown := [*(given.keys() - _DEFAULTS.keys()), *(name for name in ("front", "snapshots") if not given[name])]:
        raise UserError(f"args: {unknown[0]} is unknown or missing; there are {', '.join(_DEFAULTS)}")
    settings = Settings.checked(
        host="0.0.0.0",
        port=0,
        limits=Path(given["limits"]) if given["limits"] else None,
        viewers=given["viewers"],
        idle=given["idle"],
        portraits=Path(given["portraits"]) if given["portraits"] else None,
        snapshots=Path(given["snapshots"]),
        origins=given["origins"],
        ice_servers=given["ice_servers"],
        log_json=True,
        environment=os.environ,
    )
    replicas, ranks = given["replicas"], given["ranks"]
    check_sessions(given["sessions"], ranks)
    gpus = float(ranks) if given["gpus"] is None else given["gpus"]
    size = Size(replicas, given["max_replicas"] or replicas, given["sessions"], ranks, gpus, given["cpus"])
    load = partial(TalkingHeadPipeline.from_pretrained, **given["pipeline"])
    return application(load, size, settings, given["front"])


_DEFAULTS: dict[str, Any] = {
    "front": None, "snapshots": None, "replicas": 1, "max_replicas": None, "sessions": 1, "ranks": 1,
    "gpus": None, "cpus": 1.0, "limits": None, "viewers": None, "idle": None, "portraits": None, "origins": (),
    "ice_servers": (), "pipeline": {},
}  # fmt: skip
