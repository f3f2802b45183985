"""WebRTC without a browser: aiortc on both sides, frames read from decoded pixels."""

import asyncio
from typing import Any

import aioice.ice
import numpy as np
import pytest
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from streaming.serve.rtc import REPORTED_TIME, PacketTrack, Peer, stay_on_loopback
from tests.streaming.serve.kit import Serving, bearing, eventually, number_of, run, serving, speech

SDP = {"Content-Type": "application/sdp"}


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aioice.ice, "get_host_addresses", aioice.ice.get_host_addresses)
    stay_on_loopback()


class Watcher:
    """A peer that receives a session."""

    def __init__(self) -> None:
        self.connection = RTCPeerConnection()
        self.numbers: list[int] = []
        self.peak = 0.0
        self.connection.on("track", lambda track: self._tasks.append(asyncio.ensure_future(self._eat(track))))
        self._tasks: list[asyncio.Future[None]] = []

    async def _eat(self, track: Any) -> None:
        try:
            while True:
                frame = await track.recv()
                if track.kind == "video":
                    self.numbers.append(number_of(frame.to_ndarray(format="rgb24")))
                else:
                    self.peak = max(self.peak, float(np.abs(frame.to_ndarray()).max()) / 32768)
        except MediaStreamError:
            pass

    async def join(self, serve: Serving, facts: dict[str, Any], kinds: tuple[str, ...] = ("audio", "video")) -> int:
        for kind in kinds:
            self.connection.addTransceiver(kind, direction="recvonly")
        await self.connection.setLocalDescription(await self.connection.createOffer())
        path = f"/v1/sessions/{facts['id']}/whep"
        response = await serve.client.post(
            path, data=self.connection.localDescription.sdp, headers=bearing(facts["key"]) | SDP
        )
        if response.status == 201:
            assert response.content_type == "application/sdp"
            self.location = response.headers["Location"]
            answer = await response.text()
            assert all("127.0.0.1" in line for line in answer.split("\r\n") if line.startswith("a=candidate"))
            await self.connection.setRemoteDescription(RTCSessionDescription(answer, "answer"))
        return response.status

    async def leave(self) -> None:
        await self.connection.close()
        await asyncio.gather(*self._tasks)


def test_two_viewers_see_the_same_frames_and_hear_what_is_said() -> None:
    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            session = serve.sessions.open[facts["id"]]
            one, other = Watcher(), Watcher()
            assert await one.join(serve, facts) == await other.join(serve, facts) == 201
            await eventually(lambda: one.numbers and other.numbers)
            talk = await serve.socket(facts, audio={"rate": 16000})
            await talk.say(0, speech(1.0))
            await talk.tell("end")
            await eventually(lambda: one.peak > 0.2 and other.peak > 0.2)
            await eventually(lambda: len(set(one.numbers) & set(other.numbers)) > 20)
            for watcher in (one, other):
                assert watcher.numbers == sorted(watcher.numbers)
            assert (await serve.client.delete(one.location, headers=bearing(facts["key"]))).status == 204
            await other.leave()  # without a word
            await eventually(lambda: not session.broadcast.viewers)
            await eventually(lambda: session._connections == 1)  # the socket
            await one.leave()

    run(test())


def test_sender_reports_bring_sound_and_picture_together() -> None:
    """Whenever they are read, both say the same time for the same tick, however late its packets were sent."""

    async def test() -> None:
        async with serving() as serve:
            facts, watcher = await serve.create(), Watcher()
            assert await watcher.join(serve, facts) == 201
            await eventually(lambda: len(watcher.numbers) > 10)
            ((_, peer),) = serve.server._peers.values()
            for sender in peer._connection.getSenders():
                assert hasattr(sender, REPORTED_TIME), "aiortc has renamed it"
                assert isinstance(sender.track, PacketTrack)
                told = (getattr(sender, REPORTED_TIME) - peer._epoch) / 2**32
                assert told == pytest.approx(sender.track._last, abs=1e-6)
            await watcher.leave()

    run(test())


def test_a_peer_that_never_connects_is_given_up() -> None:
    async def test() -> None:
        async with serving(connect=0.3, viewers=1) as serve:
            facts = await serve.create()
            session, lost = serve.sessions.open[facts["id"]], Watcher()
            for kind in ("audio", "video"):
                lost.connection.addTransceiver(kind, direction="recvonly")
            await lost.connection.setLocalDescription(await lost.connection.createOffer())
            offer = lost.connection.localDescription.sdp
            assert (await serve.post(facts, "whep", data=offer, headers=SDP))[0] == 201
            assert (await serve.post(facts, "whep", data=offer, headers=SDP))[0] == 429
            await eventually(lambda: not session.broadcast.viewers and not serve.server._peers)
            await lost.leave()

    run(test())


@pytest.mark.parametrize("kinds", [("audio",), ("video",)])
def test_an_offer_without_sound_or_without_picture_is_refused(kinds: tuple[str, ...]) -> None:
    async def test() -> None:
        async with serving() as serve:
            facts, watcher = await serve.create(), Watcher()
            assert await watcher.join(serve, facts, kinds) == 400
            assert not serve.sessions.open[facts["id"]].broadcast.viewers
            await watcher.leave()

    run(test())


def test_a_peer_that_connects_after_the_end_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving() as serve:
            facts, ended = await serve.create(), []
            session = serve.sessions.open[facts["id"]]
            peer = Peer(session, [], ended.append)
            await serve.sessions.close(session)
            monkeypatch.setattr(RTCPeerConnection, "connectionState", "connected")
            peer._changed()
            await eventually(lambda: ended == [peer])
            assert session.broadcast.viewers == set()

    run(test())


def test_an_end_closes_peers() -> None:
    async def test() -> None:
        async with serving() as serve:
            facts, watcher = await serve.create(), Watcher()
            assert await watcher.join(serve, facts) == 201
            await eventually(lambda: watcher.numbers)
            await serve.client.delete(f"/v1/sessions/{facts['id']}", headers=bearing(facts["key"]))
            await eventually(lambda: watcher.connection.connectionState == "closed")
            assert serve.server._peers == {}
            await watcher.leave()

    run(test())
