"""Clients that are wrong, slow, gone or malicious: no crash, nothing leaks, and nobody else is disturbed."""

import asyncio
import base64
import gc
import os
import socket
import threading
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession, WSMsgType, WSServerHandshakeError

from streaming.serve.messages import Bye, ErrorMessage, PlaybackFinishedMessage, Ready, pack
from streaming.serve.socket import Connection
from streaming.serve.viewer import WAITING, Viewer
from tests.streaming.serve.kit import TOKEN as SECRET
from tests.streaming.serve.kit import NoisyFace, Serving, Talk, bearing, eventually, form, run, serving, speech
from tests.streaming.serve.test_socket import check_media

HELLO = '{"type": "hello", "audio": {"rate": 16000}}'
Facts = dict[str, Any]


@asynccontextmanager
async def undisturbed(**options: Any) -> AsyncIterator[tuple[Serving, Facts]]:
    """A server with a session that speaks before and after; in the end nothing is left of other clients."""
    async with serving(**options) as serve:
        facts = await serve.create()
        good = await serve.socket(facts, audio={"rate": 16000}, video="fmp4")
        reading = asyncio.create_task(good.rest())
        await say(good, 0)
        before = traces()
        yield serve, facts
        await say(good, serve.sessions.open[facts["id"]].live.next_segment)
        check_media(good.media)
        await eventually(lambda: all(now <= then for now, then in zip(traces(), before, strict=True)))
        await good.socket.close()
        await reading


async def say(talk: Talk, segment: int) -> None:
    await talk.say(segment, speech(0.3))
    await talk.tell("end")
    await eventually(
        lambda: any(isinstance(m, PlaybackFinishedMessage) and m.segment == segment for m in talk.messages)
    )


def traces() -> tuple[int, int, int]:
    """What a client that has gone may not leave behind: tasks, open files, threads.

    Sessions themselves begin and end a task for each moment, and asyncio keeps some threads.
    """
    own = ("Moments.__anext__", "Event.wait")
    tasks = [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__qualname__", "") not in own]
    threads = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
    return len(tasks), descriptors(), len(threads)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


async def refusal(serve: Serving, facts: Facts, *messages: str | bytes, hello: str | None = HELLO) -> ErrorMessage:
    """What the server answers to these messages of a socket."""
    path = f"/v1/sessions/{facts['id']}/ws"
    async with serve.client.ws_connect(path, headers=bearing(facts["key"])) as connection:
        for message in ([hello] if hello else []) + list(messages):
            await (connection.send_str(message) if isinstance(message, str) else connection.send_bytes(message))
        async for answer in connection:
            if answer.type == WSMsgType.TEXT and '"error"' in answer.data:
                return msgspec.json.decode(answer.data, type=ErrorMessage)
        raise AssertionError(f"no error came; the socket was closed with {connection.close_code}")


async def raw(serve: Serving, facts: Facts, *frames: bytes, path: str = "ws") -> socket.socket:
    """A socket that does nothing by itself: after the handshake it sends these frames, and never reads."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop, address = asyncio.get_running_loop(), (serve.client.host, serve.client.port)
    await loop.sock_connect(connection, address)
    request = (
        f"GET /v1/sessions/{facts['id']}/{path} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer {facts['key']}\r\n"
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n"
    )
    await loop.sock_sendall(connection, request.encode())
    for payload in frames:
        await loop.sock_sendall(connection, bytes([0x81, 0x80 | len(payload), 0, 0, 0, 0]) + payload)
    return connection


NONSENSE: list[tuple[str | None, list[str | bytes], str]] = [  # hello, further messages, what is answered
    (None, ["garbage"], "bad_message"),
    (None, [b"garbage"], "bad_message"),
    (None, ['{"type": "ping", "t": 1}'], "bad_message"),
    (None, ['{"type": "hello", "audio": {"rate": 3}}'], "bad_message"),
    (HELLO, ["garbage"], "bad_message"),
    (HELLO, [HELLO], "bad_message"),
    (HELLO, [b"short"], "bad_message"),
    (HELLO, [pack(9, 0, b"")], "bad_message"),
    (HELLO, [pack(1, 0, b"odd")], "bad_audio"),
    (HELLO, ['{"type": "ping", "t": 1}'] * 500, "too_many"),
    ('{"type": "hello"}', [pack(1, 0, b"ok")], "bad_message"),
]


def test_messages_that_make_no_sense_are_refused() -> None:
    async def test() -> None:
        async with undisturbed() as (serve, facts):
            for hello, messages, code in NONSENSE:
                assert (await refusal(serve, facts, *messages, hello=hello)).code == code, messages[:1]

    run(test())


def test_a_message_that_is_too_large_ends_its_socket() -> None:
    async def test() -> None:
        async with undisturbed() as (serve, facts):
            talk = await serve.socket(facts, audio={"rate": 16000})
            await talk.until(Ready)
            await talk.socket.send_bytes(bytes(65537))
            await talk.rest()
            assert talk.socket.close_code == 1009

    run(test())


def test_eight_clients_share_two_places() -> None:
    async def test() -> None:
        async with serving(sessions=2) as serve:

            async def client() -> int:
                response = await serve.client.post("/v1/sessions", data=form(), headers=bearing(SECRET))
                if response.status == 201:
                    talk = await serve.socket(await response.json(), audio={"rate": 16000}, video="fmp4")
                    await talk.say(0, speech(0.3))
                    await talk.tell("end")
                    await talk.until(PlaybackFinishedMessage)
                    check_media(talk.media)
                else:
                    assert (await response.json())["error"]["code"] == "limit_sessions"
                    assert response.headers["Retry-After"]
                return response.status

            assert sorted(await asyncio.gather(*(client() for _ in range(8)))) == [201] * 2 + [503] * 6

    run(test())


def test_a_session_has_so_many_viewers_and_no_more() -> None:
    async def test() -> None:
        async with serving(viewers=2) as serve:
            facts = await serve.create()
            talks = [await serve.socket(facts, video="fmp4") for _ in range(2)]
            for talk in talks:
                await talk.until(Ready)
            assert (await refusal(serve, facts, hello='{"type": "hello", "video": "fmp4"}')).code == "limit_viewers"
            path = f"/v1/sessions/{facts['id']}/stream.mp4"
            assert (await serve.client.get(path, headers=bearing(facts["key"]))).status == 429
            status, _ = await serve.post(facts, "whep", data="v=0", headers={"Content-Type": "application/sdp"})
            assert status == 429
            await talks[0].socket.close()
            await eventually(lambda: len(serve.sessions.open[facts["id"]].broadcast.viewers) == 1)
            await (await serve.socket(facts, video="fmp4")).until(Ready)

    run(test())


def test_a_reader_that_stops_loses_frames_alone_and_is_given_up() -> None:
    """Its own queue is cut, what is kept for it stays small, and in the end it is closed."""

    async def test() -> None:
        async with undisturbed(face=NoisyFace, stuck=0.0) as (serve, facts):
            session = serve.sessions.open[facts["id"]]
            (good,) = session.broadcast.viewers
            slow = await raw(serve, facts, b'{"type":"hello","video":"fmp4"}')
            await eventually(lambda: len(session.broadcast.viewers) == 2)
            (bad,) = session.broadcast.viewers - {good}
            longest = 0

            def lost() -> bool:
                nonlocal longest
                longest = max(longest, len(bad._waiting))
                return bad.dropped > 0

            await eventually(lost)
            assert longest <= WAITING
            assert good.dropped == 0
            await eventually(lambda: bad.closed)  # by the sweep
            slow.close()

    run(test())


@pytest.mark.parametrize("way", ["ws", "stream.mp4"])
def test_a_reader_that_never_reads_costs_no_descriptor_for_long(way: str) -> None:
    """It keeps its own end open, answers no ping, and what was written for it stays unread."""

    async def test() -> None:
        async with undisturbed(face=NoisyFace, stuck=0.3, heartbeat=0.5) as (serve, facts):
            session, before = serve.sessions.open[facts["id"]], descriptors()
            hello = [b'{"type":"hello","video":"fmp4"}'] if way == "ws" else []
            deaf = await raw(serve, facts, *hello, path=way)
            await eventually(lambda: session._connections == 2)
            await eventually(lambda: session._connections == 1)
            await eventually(lambda: descriptors() <= before + 1)  # its own end
            deaf.close()

    run(test())


def test_sockets_that_are_half_open_end() -> None:
    """One says nothing after the handshake, one nothing after hello, and one has gone without a word."""

    async def test() -> None:
        async with undisturbed(connect=0.2) as (serve, facts):
            session = serve.sessions.open[facts["id"]]
            silent = await raw(serve, facts)
            await eventually(lambda: session._connections == 2)
            await eventually(lambda: session._connections == 1)
            gone = await raw(serve, facts, HELLO.encode())
            await eventually(lambda: len(session.listeners) == 2)
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not a goodbye
            gone.close()
            await eventually(lambda: session._connections == 1)
            silent.close()

    run(test())


def test_a_client_that_vanishes_in_mid_chunk_leaves_the_session_to_others() -> None:
    async def test() -> None:
        async with undisturbed() as (serve, facts):
            session = serve.sessions.open[facts["id"]]
            for _ in range(3):
                talk = await serve.socket(facts, audio={"rate": 16000}, video="fmp4")
                ready = await talk.until(Ready)
                await talk.say(ready.next_segment + 1, speech(0.2))
                await talk.read_media(3)
                talk.vanish()
                await eventually(lambda: session._connections == 1)
            await eventually(lambda: session.live.state == "idle")

    run(test())


def test_ids_tickets_and_origins_of_others_open_nothing() -> None:
    async def test() -> None:
        async with undisturbed(sessions=2) as (serve, facts):
            other = await serve.create()
            path = f"/v1/sessions/{facts['id']}/ws"
            _, body = await serve.post(facts, "ticket")
            _, foreign = await serve.post(other, "ticket")
            assert await opens(serve, f"{path}?ticket={body['ticket']}") == 101
            assert await opens(serve, f"{path}?ticket={body['ticket']}") == 401  # once
            assert await opens(serve, f"{path}?ticket={foreign['ticket']}") == 401
            assert await opens(serve, f"{path}?ticket=") == 401
            assert await opens(serve, path) == 401
            assert await opens(serve, path, bearing(SECRET)) == 401
            assert await opens(serve, path, bearing(other["key"])) == 401
            assert await opens(serve, path, bearing(facts["key"]) | {"Origin": "https://evil.example"}) == 403
            for action in ("interrupt", "audio", "snapshot", "ticket", "whep", "resume"):
                serve.access._wrong.clear()
                status, _ = await serve.post(facts | {"key": other["key"]}, action, data=b"x")
                assert status == 401, action
            response = await serve.client.delete(f"/v1/sessions/{facts['id']}", headers=bearing(other["key"]))
            assert response.status == 401
            response = await serve.client.get(f"/v1/sessions/{facts['id']}", headers=bearing(other["key"]))
            assert response.status == 401
            response = await serve.client.post(
                "/v1/sessions", data=form(), headers=bearing(SECRET) | {"Origin": "https://evil.example"}
            )
            assert response.status == 403
            await serve.client.delete(f"/v1/sessions/{other['id']}", headers=bearing(other["key"]))

    async def opens(serve: Serving, path: str, headers: dict[str, str] | None = None) -> int:
        serve.access._wrong.clear()  # who guesses has to wait, which is tested elsewhere
        try:
            connection = await serve.client.ws_connect(path, headers=headers or {})
        except WSServerHandshakeError as error:
            return error.status
        await connection.close()
        return 101

    run(test())


def test_who_has_no_key_cannot_use_up_what_may_be_begun(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(folder=tmp_path, creations_per_minute=2) as serve:
            facts = await serve.create()
            await serve.sessions.close(serve.sessions.open[facts["id"]], "draining")
            for identifier in ("A" * 16, facts["id"]):
                for _ in range(2):
                    assert (await serve.client.post(f"/v1/sessions/{identifier}/resume")).status == 404
            assert (await serve.post(facts, "resume"))[0] == 201
            await serve.sessions.drain()
            assert (await serve.post(facts, "resume"))[0] == 429

    run(test())


def test_offers_that_are_none_are_refused() -> None:
    async def test() -> None:
        async with undisturbed() as (serve, facts):
            sdp = {"Content-Type": "application/sdp"}
            for offer in ("", "v=0", "garbage\r\n" * 100, "m=audio 9 UDP/TLS/RTP/SAVPF 0\r\n", "x" * 60_000):
                status, body = await serve.post(facts, "whep", data=offer, headers=sdp)
                assert (status, body["error"]["code"]) == (400, "bad_request"), offer[:20]
            assert (await serve.post(facts, "whep", data="x" * 70_000, headers=sdp))[0] == 413
            assert (await serve.post(facts, "whep", data="{}"))[0] == 400
            path = f"/v1/sessions/{facts['id']}/whep/unknown"
            assert (await serve.client.delete(path, headers=bearing(facts["key"]))).status == 404

    run(test())


def test_many_visits_leave_no_memory_behind() -> None:
    """Viewers that come and go: no object of theirs stays, and the third ten add nothing to what the second left."""

    async def test() -> None:
        async with undisturbed() as (serve, facts):
            session = serve.sessions.open[facts["id"]]

            async def visits() -> tuple[int, int]:
                url, headers = serve.client.make_url(f"/v1/sessions/{facts['id']}/ws"), bearing(facts["key"])
                for _ in range(10):
                    async with ClientSession() as client, client.ws_connect(url, headers=headers) as visit:
                        await visit.send_str('{"type": "hello", "video": "fmp4"}')
                        await Talk(visit).until(Ready)
                await eventually(lambda: session._connections == 1)
                gc.collect()
                ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/streaming/serve/*")])
                objects = sum(type(thing) in (Connection, Viewer) for thing in gc.get_objects())
                return objects, sum(trace.size for trace in ours.traces)

            tracemalloc.start()
            try:
                await visits()
                (_, first), (objects, second) = await visits(), await visits()
            finally:
                tracemalloc.stop()
            assert objects <= 4  # those of the client that stays, and of a visit that is just ending
            assert second - first < 50_000

    run(test())


def test_an_end_tells_everybody_and_waits_for_nobody() -> None:
    """A server that ends while one client reads nothing: the others are told, and the end is not delayed."""

    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            good = await serve.socket(facts, video="fmp4")
            await good.until(Ready)
            deaf = await raw(serve, facts, b'{"type":"hello","video":"fmp4"}')
            reading = asyncio.create_task(good.rest())
            await serve.sessions.drain()
            messages = await reading
            assert isinstance(messages[-1], Bye)
            assert messages[-1].reason == "draining"
            assert not serve.sessions.open
            deaf.close()

    run(test())
