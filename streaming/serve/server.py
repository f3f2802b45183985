"""The process: settings that are checked, networks that are warm, a port, a log, and an end with snapshots."""

import asyncio
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from aiohttp import web
from aiortc import RTCIceServer

from model.errors import UserError
from streaming.serve.access import Access, is_loopback, token_for
from streaming.serve.answers import behind
from streaming.serve.app import Server
from streaming.serve.limits import Limits
from streaming.serve.rtc import stay_on_loopback
from streaming.serve.sessions import Pipeline, Sessions

_HERE = Path(__file__).parent
_BUNDLED = (_HERE / "portraits", _HERE.parents[1] / "examples" / "portraits")  # in a wheel, and in the repository

INTERRUPTED = 130  # exit code of a process that Ctrl-C has ended

log = logging.getLogger("flashtalk.serve")


@dataclass(frozen=True)
class Settings:
    """How a server is reached and what it bears; `checked` makes them."""

    host: str
    port: int
    token: str
    limits: Limits
    portraits: Path | None
    snapshots: Path | None
    origins: list[str]
    ice_servers: list[RTCIceServer]
    log_json: bool
    token_is_new: bool = False
    proxies: Collection[str] = ()

    def page(self, url: str) -> str:
        """The line that says where the page is, with a new token; one that the operator chose stays secret."""
        return f"The page is {url}/" + (f"#token={self.token}" if self.token_is_new else " (token: $FLASHTALK_TOKEN)")

    @classmethod
    def checked(
        cls,
        *,
        host: str,
        port: int,
        limits: Path | None,
        viewers: int | None,
        idle: float | None,
        portraits: Path | None,
        snapshots: Path | None,
        origins: Sequence[str],
        ice_servers: Sequence[str],
        log_json: bool,
        proxies: Sequence[str] = (),
        environment: Mapping[str, str],
    ) -> "Settings":
        """The settings of a command line. Raises `UserError` for what cannot be, or would not be safe.

        `viewers` and `idle`, if they are given, win over those in the file `limits`.
        """
        chosen = {name: value for name, value in (("viewers", viewers), ("idle", idle)) if value is not None}
        for origin in origins:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}":
                raise UserError(f"--origin {origin}: write it as https://example.com, without a path")
        for proxy in proxies:
            try:
                ipaddress.ip_address(proxy)
            except ValueError as error:
                raise UserError(f"--proxy {proxy}: write the address that it connects from, as 127.0.0.1") from error
        if portraits is not None and not portraits.is_dir():
            raise UserError(f"--portraits {portraits} is no folder")
        if snapshots is not None:
            try:
                snapshots.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--snapshots {snapshots} cannot be made ({error.strerror})") from error
        token = environment.get("FLASHTALK_TOKEN", "").strip()
        return cls(
            host,
            port,
            token_for(host, token),
            replace(Limits.read(limits) if limits else Limits(), **chosen),
            portraits or next((folder for folder in _BUNDLED if folder.is_dir()), None),
            snapshots,
            list(origins),
            [_ice_server(url, environment.get("FLASHTALK_TURN", "")) for url in ice_servers],
            log_json,
            not token,
            frozenset(proxies),
        )


def _ice_server(url: str, turn: str) -> RTCIceServer:
    scheme = url.partition(":")[0]
    if scheme in ("stun", "stuns"):
        return RTCIceServer(url)
    user, _, password = turn.partition(":")
    if scheme not in ("turn", "turns") or not password:
        raise UserError(
            f"--ice-server {url}: write stun:HOST:PORT, or turn:HOST:PORT and $FLASHTALK_TURN=USER:PASSWORD"
        )
    return RTCIceServer(url, user, password)


def warm(pipeline: Pipeline, limits: Limits) -> None:
    """Generates a chunk, so that the first session does not wait for compilers.

    Raises `UserError` if sessions cannot have these limits.
    """
    chunk = pipeline.config.chunk
    if limits.queue < (least := 2 * chunk.new_frames / chunk.tgt_fps):
        raise UserError(f"--limits: queue = {limits.queue:g}: write {least:g} seconds, two chunks, or more")
    with pipeline.live(np.full((chunk.height, chunk.width, 3), 128, np.uint8)) as session:
        next(session.moments())


def check_port(host: str, port: int) -> None:
    """Finds out before networks are loaded that the port cannot be had. Raises `UserError`."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
            one.bind((host, port))
    except OSError as error:
        raise _no_port(host, port, error) from error


def _no_port(host: str, port: int, error: OSError) -> UserError:
    return UserError(f"--host {host} --port {port} cannot be listened at ({error.strerror}); name others")


def run(pipelines: Sequence[Pipeline], settings: Settings) -> None:
    """Serves until SIGINT or SIGTERM. Raises `UserError` if the port cannot be had."""
    log_to_stderr(settings.log_json)
    asyncio.run(_serve(pipelines, settings))


def log_to_stderr(as_json: bool) -> None:
    """Writes the log of this process, a line an event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


async def _serve(pipelines: Sequence[Pipeline], settings: Settings) -> None:
    sessions = Sessions(pipelines, settings.limits, settings.snapshots)
    ended = on_signals()
    async with listening(app_of(sessions, settings), settings) as url:
        print(settings.page(url), flush=True)
        await ended.wait()
        log.info("ending: %d sessions are kept", len(sessions.open))


def app_of(sessions: Sessions, settings: Settings) -> web.Application:
    """The web application of sessions. At a loopback address, WebRTC stays on that interface."""
    if is_loopback(settings.host):
        stay_on_loopback()
    access = Access(settings.token, settings.origins, settings.limits)
    return Server(sessions, access, settings.portraits, settings.ice_servers).app


def on_signals() -> asyncio.Event:
    """Is set by SIGINT, SIGTERM and SIGHUP. A second Ctrl-C ends the process at once, however the first one fares."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, ended.set)
    loop.add_signal_handler(signal.SIGINT, lambda: os._exit(INTERRUPTED) if ended.is_set() else ended.set())
    return ended


@asynccontextmanager
async def listening(app: web.Application, settings: Settings) -> AsyncIterator[str]:
    """Serves an application while the body runs; yields its address. Raises `UserError` if the port cannot be had."""
    app.middlewares.insert(0, behind(settings.proxies))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=settings.limits.drain)
    await runner.setup()
    try:
        site = web.TCPSite(runner, settings.host, settings.port)
        try:
            await site.start()
        except OSError as error:
            raise _no_port(settings.host, settings.port, error) from error
        host, port = runner.addresses[0][:2]
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{port}"
    finally:
        await runner.cleanup()


class JsonLines(logging.Formatter):
    """Log records as JSON, a line each."""

    _STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        values = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        values |= {name: value for name, value in record.__dict__.items() if name not in self._STANDARD}
        if record.exc_info:
            values["error"] = self.formatException(record.exc_info)
        return json.dumps(values, default=str)
