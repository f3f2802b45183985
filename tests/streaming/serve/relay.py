"""A bad network on loopback: UDP datagrams between a page and the server come late, not in order, or not at all."""

import asyncio
from typing import Any

import numpy as np


class Relay(asyncio.DatagramProtocol):
    """Stands between a page, whose first datagram says where it is, and a server's port.

    Attributes:
        port: for the page.
        lost, passed: datagrams.
    """

    def __init__(self, server: tuple[str, int], delay: float, jitter: float, loss: float) -> None:
        self._server, self._delay, self._jitter, self._loss = server, delay, jitter, loss
        self._random = np.random.default_rng(0)
        self._page: tuple[str, int] | None = None
        self.port = self.lost = self.passed = 0

    async def open(self) -> None:
        loop, relay = asyncio.get_running_loop(), self

        class Back(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, addr: Any) -> None:  # noqa: ARG002
                relay._later(relay._front, data, relay._page)

        self._front, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        self._back, _ = await loop.create_datagram_endpoint(Back, local_addr=("127.0.0.1", 0))
        self.port = self._front.get_extra_info("sockname")[1]

    def close(self) -> None:
        self._front.close()
        self._back.close()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._page = addr
        self._later(self._back, data, self._server)

    def _later(self, out: asyncio.DatagramTransport, data: bytes, to: tuple[str, int] | None) -> None:
        if to is None or self._random.random() < self._loss:
            self.lost += 1
            return
        self.passed += 1
        wait = max(0.0, self._random.normal(self._delay, self._jitter))
        asyncio.get_running_loop().call_later(wait, lambda: out.is_closing() or out.sendto(data, to))


async def through_relay(answer: str, delay: float, jitter: float, loss: float) -> tuple[str, Relay]:
    """An SDP answer whose candidates lead to a relay, and the relay. Media are bundled: there is one port."""
    words = next(line for line in answer.split("\r\n") if line.startswith("a=candidate")).split()
    relay = Relay((words[4], int(words[5])), delay, jitter, loss)
    await relay.open()
    return answer.replace(f" {words[4]} {words[5]} typ", f" 127.0.0.1 {relay.port} typ"), relay


def without_candidates(offer: str) -> str:
    """An SDP offer from which the server cannot know where the page is, and so only answers the relay."""
    return "\r\n".join(line for line in offer.split("\r\n") if not line.startswith("a=candidate"))
