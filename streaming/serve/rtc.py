"""WebRTC: peers that get a session's packets as they are, encoded once for all. The offer comes as WHEP has it."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from functools import partial

import aioice.ice
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCIceServer,
    RTCPeerConnection,
    RTCRtpSender,
    RTCSessionDescription,
)
from aiortc.clock import current_ntp_time
from aiortc.mediastreams import MediaStreamError
from av import Packet

from streaming.serve.encoder import OPUS_SAMPLES, Encoded
from streaming.serve.errors import RefusedError
from streaming.serve.session import Session
from streaming.serve.viewer import WAITING, Viewer
from streaming.sources import SOUND_RATE

VIDEO_CLOCK = 90_000  # ticks a second of RTP timestamps of video
REPORTED_TIME = "_RTCRtpSender__ntp_timestamp"  # of aiortc's senders: when the last packet was sent, in NTP's format

log = logging.getLogger("flashtalk.serve")


def stay_on_loopback() -> None:
    """Lets peer connections of this process use the loopback interface only.

    aioice leaves that interface out, and has no option for it.
    """
    aioice.ice.get_host_addresses = lambda use_ipv4, use_ipv6: ["127.0.0.1"] if use_ipv4 else []  # noqa: ARG005


class PacketTrack(MediaStreamTrack):
    """A track of packets that are encoded already; aiortc only packs them into RTP."""

    def __init__(self, kind: str) -> None:
        """`kind` is "video" or "audio"."""
        super().__init__()
        self.kind = kind
        self.on_sent: Callable[[float], None] = lambda _: None  # is called with the time of each packet that was sent
        self._packets: asyncio.Queue[Packet | None] = asyncio.Queue(2 * WAITING)
        self._last: float | None = None

    async def put(self, data: bytes, pts: int, clock: int) -> None:
        """Adds a packet; waits while many wait."""
        packet = Packet(data)
        packet.pts = packet.dts = pts
        packet.time_base = Fraction(1, clock)
        await self._packets.put(packet)

    async def recv(self) -> Packet:
        """The next packet; that it is asked for says that the one before was sent."""
        if self._last is not None:
            self.on_sent(self._last)
        packet = await self._packets.get()
        if packet is None:
            self.stop()
            raise MediaStreamError
        self._last = float((packet.pts or 0) * (packet.time_base or 0))
        return packet

    def end(self) -> None:
        """Ends the track for its sender."""
        with suppress(asyncio.QueueFull):
            self._packets.put_nowait(None)


class Peer:
    """A peer connection that shows a session to one viewer."""

    def __init__(self, session: Session, ice_servers: list[RTCIceServer], on_end: Callable[["Peer"], None]) -> None:
        """Counts as a viewer at once. Raises `RefusedError` if there are too many."""
        self._session, self._on_end = session, on_end
        self._viewer: Viewer = session.join("webrtc")
        self._video, self._sound = PacketTrack("video"), PacketTrack("audio")
        self._connection = RTCPeerConnection(RTCConfiguration(iceServers=ice_servers))
        self._ended = False
        self._epoch = current_ntp_time()  # when tick 0 is said to have been; the same for sound and picture
        self._pump: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._connection.on("connectionstatechange", self._changed)
        session.attend()

    async def answer(self, offer: str) -> str:
        """The answer to an SDP offer. Raises `RefusedError`, and ends the peer, if it cannot be answered."""
        try:
            self._send(self._sound, "audio/opus")
            self._send(self._video, "video/H264")
            await self._connection.setRemoteDescription(RTCSessionDescription(offer, "offer"))
            if any(transceiver.mid is None for transceiver in self._connection.getTransceivers()):
                raise ValueError("the offer lacks sound or video")
            await self._connection.setLocalDescription(await self._connection.createAnswer())
        except Exception as error:  # aiortc parses with asserts, int() and indexing
            await self.end()
            raise RefusedError("bad_request", "the offer is no SDP that would receive H.264 and Opus") from error
        asyncio.get_running_loop().call_later(self._session.limits.connect, self._give_up)
        return self._connection.localDescription.sdp

    def _send(self, track: PacketTrack, codec: str) -> None:
        """Sends a track in no other codec than this."""
        transceiver = self._connection.addTransceiver(track, "sendonly")
        known = RTCRtpSender.getCapabilities(track.kind).codecs
        transceiver.setCodecPreferences([c for c in known if c.mimeType.lower() == codec.lower()])
        track.on_sent = partial(self._stamp, transceiver.sender)

    def _stamp(self, sender: RTCRtpSender, seconds: float) -> None:
        """Lets the next sender report say when a packet is to be shown.

        By its reports a browser brings sound and picture together. aiortc says there when a packet was sent, which on a
        busy machine is some time or other, and has no way to say anything else.
        """
        setattr(sender, REPORTED_TIME, self._epoch + int(seconds * 2**32))

    def _changed(self) -> None:
        state = self._connection.connectionState
        if state in ("failed", "closed") or self._viewer.closed:
            self.end_soon()
        elif state == "connected" and self._pump is None:
            self._session.broadcast.leave(self._viewer)  # what it has collected is too old
            self._viewer = self._session.broadcast.join("webrtc")
            self._pump = asyncio.create_task(self._run())

    def _give_up(self) -> None:
        if self._pump is None:
            self.end_soon()

    async def _run(self) -> None:
        """Carries packets from the viewer's queue to the tracks."""
        fps = self._session.chunk.tgt_fps
        while item := await self._viewer.next():
            await self._put(item, fps)
        self.end_soon()

    async def _put(self, item: Encoded, fps: int) -> None:
        await self._video.put(item.h264, item.tick * VIDEO_CLOCK // fps, VIDEO_CLOCK)
        for index, packet in enumerate(item.opus):
            await self._sound.put(packet, item.tick * SOUND_RATE // fps + index * OPUS_SAMPLES, SOUND_RATE)

    def end_soon(self) -> None:
        """Begins to end the peer."""
        if not self._ended and self._ending is None:
            self._ending = asyncio.ensure_future(self.end())

    async def end(self) -> None:
        """Closes the connection."""
        if self._ended:
            return
        self._ended = True
        self._session.broadcast.leave(self._viewer)
        self._session.leave()
        if self._pump:
            self._pump.cancel()
        self._video.end()
        self._sound.end()
        await self._connection.close()
        self._on_end(self)
