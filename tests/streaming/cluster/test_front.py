"""The front of a cluster: a client cannot tell it from a server, wherever its session is, and whatever dies."""

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from streaming.cluster import relay
from streaming.cluster.placement import Report
from streaming.cluster.relay import Relay
from streaming.serve.messages import Bye, PlaybackFinishedMessage, Ready, unpack
from tests.streaming.cluster.kit import Clustered, clustered
from tests.streaming.serve.kit import TOKEN, bearing, eventually, film, form, run, speech, wav


def test_every_request_finds_its_session(tmp_path: Path) -> None:
    async def test() -> None:
        async with clustered(tmp_path, 1, 1) as cluster:
            one, other = await cluster.create(), await cluster.create("kofi")
            assert cluster.of(one) is not cluster.of(other)
            for facts in (one, other):
                response = await cluster.client.get(f"/v1/sessions/{facts['id']}", headers=bearing(facts["key"]))
                assert (await response.json())["stats"]["state"] == "idle"
                status, body = await cluster.post(facts, "audio", (speech(0.5)).tobytes())
                assert (status, body["error"]["code"]) == (400, "bad_audio")
                status, body = await cluster.post(facts, "ticket")
                assert status == 201
                status, body = await cluster.post(facts, "whep", "no SDP", {"Content-Type": "application/sdp"})
                assert (status, body["error"]["code"]) == (400, "bad_request")
            assert (await cluster.post(one | {"key": other["key"]}, "interrupt"))[0] == 401
            assert (await cluster.post(one | {"id": "A" * 16}, "interrupt"))[0] == 404
            response = await cluster.client.delete(f"/v1/sessions/{one['id']}", headers=bearing(one["key"]))
            assert response.status == 204
            assert list(cluster.of(other).sessions.open) == [other["id"]]

    run(test())


def test_an_operator_sees_and_ends_the_sessions_of_all_replicas(tmp_path: Path) -> None:
    async def test() -> None:
        async with clustered(tmp_path, 1, 1) as cluster:
            one, other = await cluster.create(), await cluster.create()
            assert await listed(cluster) == {one["id"], other["id"]}
            response = await cluster.client.delete(f"/v1/sessions/{one['id']}", headers=bearing(TOKEN))
            assert response.status == 204
            assert await listed(cluster) == {other["id"]}
            there = cluster.front.placement.owner(other["id"])
            assert there is not None
            there.url = "http://127.0.0.1:9"  # nobody answers there
            assert await listed(cluster) == set()

    async def listed(cluster: Clustered) -> set[str]:
        response = await cluster.client.get("/v1/sessions", headers=bearing(TOKEN))
        return {session["id"] for session in (await response.json())["sessions"]}

    run(test())


def test_the_page_and_portraits_come_from_a_replica(tmp_path: Path) -> None:
    async def test() -> None:
        async with clustered(tmp_path) as cluster:
            response = await cluster.client.get("/")
            assert response.status == 503
            assert response.headers["Retry-After"]
            assert (await cluster.client.get("/readyz")).status == 503
            assert (await cluster.client.get("/healthz")).status == 200
            await cluster.start(2)
            assert "<video" in await (await cluster.client.get("/")).text()
            assert (await cluster.client.get("/page/main.js")).content_type.endswith("javascript")
            assert "amara" in (await (await cluster.client.get("/v1/portraits")).json())["portraits"]
            assert (await (await cluster.client.get("/v1/portraits/amara")).read())[:2] == b"\xff\xd8"
            assert await (await cluster.client.get("/readyz")).json() == {"free": 2, "capacity": 2}

    run(test())


def test_a_full_cluster_asks_to_come_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with clustered(tmp_path, 1, 1) as cluster:
            await cluster.create()
            await cluster.create()
            response = await cluster.client.post("/v1/sessions", data=form(), headers=bearing(TOKEN))
            assert response.status == 503
            assert int(response.headers["Retry-After"]) > 0
            assert (await response.json())["error"]["code"] == "limit_sessions"
            text = await (await cluster.client.get("/metrics", headers=bearing(TOKEN))).text()
            assert "flashtalk_cluster_sessions 2.0" in text
            assert 'flashtalk_refused_total{code="limit_sessions"} 1.0' in text

    run(test())


def test_a_replica_that_is_fuller_than_its_report_is_passed_by(tmp_path: Path) -> None:
    async def test() -> None:
        async with clustered(tmp_path, 1, 1) as cluster:
            names = [cluster.front.placement.replicas[name] for name in sorted(cluster.front.placement.replicas)]
            first = next(r for r in cluster.replicas if r.url == names[-1].url)  # which would be taken
            first.sessions.draining = True
            facts = await cluster.create()
            assert cluster.of(facts) is not first

    run(test())


def test_only_replicas_with_the_token_report(tmp_path: Path) -> None:
    async def test() -> None:
        async with clustered(tmp_path, 1) as cluster:
            report = {"replica": "x", "url": "http://x:1", "limit": 1, "fits": 1, "sessions": [], "draining": False}
            for headers in ({}, bearing("wrong")):
                response = await cluster.client.post("/cluster/replicas", json=report, headers=headers)
                assert response.status == 401
            response = await cluster.client.post("/cluster/replicas", data="{}", headers=bearing(TOKEN))
            assert response.status == 400
            targets = await (await cluster.client.get("/cluster/targets", headers=bearing(TOKEN))).json()
            assert [f"http://{target}" for entry in targets for target in entry["targets"]] == [cluster.replicas[0].url]
            assert (await cluster.client.get("/cluster/targets")).status == 401

    run(test())


def test_wrong_keys_count_for_the_client_and_not_for_the_front(tmp_path: Path) -> None:
    """A replica believes the front about addresses, and nobody else."""

    async def test() -> None:
        async with clustered(tmp_path, 1, wrong_tokens_per_minute=2.0) as cluster:
            facts = await cluster.create()
            url = f"{cluster.replicas[0].url}/v1/sessions/{facts['id']}"
            async with aiohttp.ClientSession() as client:

                async def ask(key: str, address: str, token: str) -> int:
                    headers = bearing(key) | {"X-Forwarded-For": address, "X-Flashtalk-Front": token}
                    return (await client.get(url, headers=headers)).status

                assert [await ask("wrong", "10.0.0.1", TOKEN) for _ in range(4)] == [401, 401, 401, 429]
                assert await ask(facts["key"], "10.0.0.2", TOKEN) == 200
                assert [await ask("wrong", f"10.0.1.{k}", "guess") for k in range(4)] == [401, 401, 401, 429]

    run(test())


def test_a_socket_and_a_film_pass(tmp_path: Path) -> None:
    async def test() -> None:
        async with clustered(tmp_path, 1) as cluster:
            facts = await cluster.create()
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await cluster.socket(facts | {"key": "wrong"})
            assert refused.value.status == 401
            talk = await cluster.socket(facts, audio={"rate": 16000}, video="fmp4")
            ready = await talk.until(Ready)
            await talk.say(ready.next_segment, speech(0.6))
            await talk.tell("end")
            finished = await talk.until(PlaybackFinishedMessage)
            assert (finished.segment, finished.interrupted) == (0, False)
            headers = bearing(facts["key"])
            async with cluster.client.get(f"/v1/sessions/{facts['id']}/stream.mp4", headers=headers) as response:
                assert response.headers["Content-Type"] == "video/mp4"
                numbers, _, _ = film(await response.content.readexactly(10_000))
                assert len(numbers) > 10
                assert numbers == sorted(numbers)
            await cluster.client.delete(f"/v1/sessions/{facts['id']}", headers=headers)
            messages = await talk.rest()
            assert isinstance(messages[-1], Bye)
            assert messages[-1].reason == "closed"

    run(test())


def test_a_client_that_goes_away_leaves_its_replica(tmp_path: Path) -> None:
    async def test() -> None:
        async with clustered(tmp_path, 1) as cluster:
            facts = await cluster.create()
            session = cluster.replicas[0].sessions.open[facts["id"]]
            for leave in ("close", "vanish"):
                talk = await cluster.socket(facts, video="fmp4")
                await talk.read_media(3)
                assert len(session.broadcast.viewers) == 1
                if leave == "close":
                    await talk.socket.close()
                else:
                    talk.vanish()
                await eventually(lambda: not session.broadcast.viewers)
            assert not cluster.front._relays

    run(test())


def test_a_recording_ends_when_its_sender_has_gone_from_the_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with clustered(tmp_path, 1, queue=3.0) as cluster:
            facts = await cluster.create()
            session = cluster.replicas[0].sessions.open[facts["id"]]
            saying = asyncio.create_task(cluster.post(facts, "audio", data=wav(60)))
            await eventually(lambda: session.live.stats()["queued_frames"] >= 70)
            saying.cancel()  # which closes its connection
            await eventually(lambda: not session._connections)
            assert session._speaker is None

    monkeypatch.setattr(relay, "LOOK", 0.05)
    run(test())


def test_a_draining_replica_hands_its_sessions_on(tmp_path: Path) -> None:
    """Ray Serve ends a replica: what a viewer sees goes on elsewhere, with no frame lost and none shown twice."""

    async def test() -> None:
        async with clustered(tmp_path, 1, 1) as cluster:
            facts = await cluster.create()
            before, talk = cluster.of(facts), await cluster.socket(facts, video="fmp4")
            status, _ = await cluster.post(facts, "snapshot")
            assert status == 200
            await talk.read_media(15)
            ending = asyncio.create_task(cluster.end(before))
            messages = await talk.rest()
            bye = messages[-1]
            assert isinstance(bye, Bye)
            assert bye.reason == "draining"
            await ending
            status, body = await cluster.post(facts, "resume")
            assert (status, body["position"]) == (201, bye.position)
            assert cluster.of(facts) is not before
            again = await cluster.socket(facts, video="fmp4")
            await again.read_media(10)
            assert_continued(talk.media, again.media)

    run(test())


def test_a_replica_that_dies_hands_its_sessions_on(tmp_path: Path) -> None:
    """The connections break, nothing is written any more, and the speech that was sent is still said."""

    async def test() -> None:
        async with clustered(tmp_path, 1, 1) as cluster:
            facts = await cluster.create()
            talk = await cluster.socket(facts, audio={"rate": 16000}, video="fmp4")
            ready = await talk.until(Ready)
            await talk.say(ready.next_segment, speech(20))
            await talk.read_media(40)
            before = cluster.of(facts)
            live = before.sessions.open[facts["id"]].live
            there = cluster.front.placement.owner(facts["id"])
            assert there is not None
            there.url = "http://127.0.0.1:9"  # nobody answers there
            cluster.front.placement.lose(there)
            messages = await talk.rest()
            bye = messages[-1]
            assert isinstance(bye, Bye)
            assert bye.reason == "lost"
            moment = unpack(talk.media[-1]).moment
            assert bye.position == moment + 1
            status, body = await cluster.post(facts, "resume")
            assert (status, body["position"]) == (201, bye.position), body
            assert cluster.of(facts) is not None
            again = await cluster.socket(facts, audio={"rate": 16000}, video="fmp4")
            ready = await again.until(Ready)
            assert ready.state == "speaking"
            await again.read_media(30)
            assert_continued(talk.media, again.media)
            await eventually(lambda: live.state == "closed")  # the front has told the other one, which still lives

    run(test())


def assert_continued(first: list[bytes], second: list[bytes]) -> None:
    """Two films, one after the other, show the numbers from 1 on, each at least once, none again later."""
    (one, *_), (other, *_) = (film(b"".join(message[8:] for message in media)) for media in (first, second))
    assert sorted(set(one + other)) == list(range(1, other[-1] + 1))
    assert one == sorted(one)
    assert other == sorted(other)
    assert other[0] == one[-1] + 1


def test_a_request_to_a_dead_replica_says_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with clustered(tmp_path, 1) as cluster:
            facts = await cluster.create()
            owner = cluster.front.placement.owner(facts["id"])
            assert owner is not None
            owner.url = "http://127.0.0.1:9"
            status, body = await cluster.post(facts, "interrupt")
            assert (status, body["error"]["code"]) == (503, "lost")
            assert json.dumps(body).count("\\n") == 0

    run(test())


def test_a_session_that_is_still_open_simply_goes_on(tmp_path: Path) -> None:
    """Its replica answers 200; what the front remembers of another replica's death holds no longer."""

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path_qs)
        return web.json_response({"id": "one"})

    async def test() -> None:
        replica = web.Application()
        replica.router.add_post("/v1/sessions/one/resume", answer)
        async with clustered(tmp_path) as cluster, TestServer(replica) as server:
            url = str(server.make_url("")).rstrip("/")
            cluster.front.placement.report(Report("a", url, 1, 1, ["one"], False))
            cluster.front._seen["one"] = 50
            for _ in range(2):
                assert (await cluster.post({"id": "one", "key": "of-one"}, "resume"))[0] == 200
            assert asked == ["/v1/sessions/one/resume?position=51", "/v1/sessions/one/resume"]

    asked: list[str] = []
    run(test())


def test_a_slow_viewer_of_the_old_replica_does_not_hide_where_the_session_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its relay ends after the session has gone on elsewhere."""
    serve, may_end = Relay.serve, asyncio.Event()

    async def serve_slowly(relay: Relay, request: web.Request) -> bool:
        broken = await serve(relay, request)
        await may_end.wait()
        return broken

    monkeypatch.setattr(Relay, "serve", serve_slowly)

    async def test() -> None:
        async with clustered(tmp_path, 1, 1) as cluster:
            facts = await cluster.create()
            before, talk = cluster.of(facts), await cluster.socket(facts, video="fmp4")
            await talk.read_media(3)
            ending = asyncio.create_task(cluster.end(before))
            await talk.until(Bye)
            assert (await cluster.post(facts, "resume"))[0] == 201
            there = cluster.front.placement.owner(facts["id"])
            may_end.set()
            await eventually(lambda: not cluster.front._relays)
            assert there is not None
            assert cluster.front.placement.owner(facts["id"]) is there
            await ending

    run(test())
