"""Who may do what: the token of the server, tickets for WebSockets, and pages of other sites."""

import hmac
import ipaddress
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from model.errors import UserError
from streaming.serve.errors import RefusedError
from streaming.serve.limits import Bucket, Limits

LEAST_TOKEN = 16  # characters of a token that is to be safe on a network
REMEMBERED = 10_000  # addresses that wrong tokens came from, and tickets that were not used


class Access:
    """Checks requests. Tokens, keys and tickets are compared in constant time, and never written to a log.

    Attributes:
        token: allows sessions to be begun, listed and ended. A session's own key allows everything with that session.
    """

    def __init__(self, token: str, origins: Collection[str], limits: Limits) -> None:
        """`origins` are the sites whose pages may ask, such as "https://example.com", beside the server's own."""
        self.token, self._origins, self._limits = token, frozenset(origins), limits
        self._now = time.monotonic
        self._tickets: dict[str, tuple[str, float]] = {}  # session, and when it is too old
        self._wrong: dict[str, Bucket] = {}  # by address
        self._creations = Bucket(limits.creations_per_minute / 60, limits.creations_per_minute, self._now)

    def check_origin(self, headers: Mapping[str, str]) -> str | None:
        """The origin, if another site's page asks that may. Raises `RefusedError` if it may not."""
        origin = headers.get("Origin")
        if origin is None:
            return None
        with suppress(ValueError):  # it may be no URL
            if urlsplit(origin).netloc == headers.get("Host"):
                return None
        if origin not in self._origins:
            raise RefusedError("forbidden_origin")
        return origin

    def check_token(self, headers: Mapping[str, str], address: str) -> None:
        """Raises `RefusedError` unless the token comes with the request."""
        with self.trying(address):
            if not self.is_token(bearer(headers)):
                raise RefusedError("unauthorised")

    def is_token(self, secret: str) -> bool:
        """Whether this is the token; to be asked within `trying`."""
        return hmac.compare_digest(secret.encode(), self.token.encode())

    @contextmanager
    def trying(self, address: str) -> Iterator[None]:
        """Around a check of a secret: an address that has given too many wrong ones has to wait."""
        bucket = self._wrong.get(address)
        if bucket and not bucket.take():
            raise RefusedError("too_many")
        try:
            yield
        except RefusedError as error:
            if error.code == "unauthorised":
                self._count_wrong(address)
            raise
        self._wrong.pop(address, None)

    def _count_wrong(self, address: str) -> None:
        if len(self._wrong) >= REMEMBERED:
            self._wrong = {other: bucket for other, bucket in self._wrong.items() if not bucket.is_full}
        tries = self._limits.wrong_tokens_per_minute
        if address not in self._wrong and len(self._wrong) < REMEMBERED:
            self._wrong[address] = Bucket(tries / 60, tries, self._now)

    def check_creation(self) -> None:
        """Raises `RefusedError` if sessions are begun too often."""
        if not self._creations.take():
            raise RefusedError("too_many")

    def ticket(self, session: str) -> str:
        """A ticket with which one WebSocket of the session may be opened, soon."""
        now = self._now()
        self._tickets = {ticket: entry for ticket, entry in self._tickets.items() if entry[1] > now}
        if len(self._tickets) >= REMEMBERED:
            raise RefusedError("too_many")
        ticket = secrets.token_urlsafe(24)
        self._tickets[ticket] = session, now + self._limits.ticket
        return ticket

    def use_ticket(self, session: str, ticket: str) -> None:
        """Raises `RefusedError` unless the ticket is this session's, new, and used for the first time."""
        owner, until = self._tickets.pop(ticket, ("", 0.0))
        if owner != session or until < self._now():
            raise RefusedError("unauthorised")


def bearer(headers: Mapping[str, str]) -> str:
    """What `Authorization: Bearer` says; nothing if there is none."""
    scheme, _, value = headers.get("Authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else ""


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_for(host: str, chosen: str) -> str:
    """The token of a server that listens at `host`: the chosen one, or a new one where only this machine reaches it.

    Raises `UserError` where others reach it and none, or a short one, was chosen.
    """
    if is_loopback(host):
        return chosen or secrets.token_urlsafe(24)
    if not chosen:
        raise UserError(f"--host {host} is open to the network: set $FLASHTALK_TOKEN to a long random secret first")
    if len(chosen) < LEAST_TOKEN:
        raise UserError(f"$FLASHTALK_TOKEN has {len(chosen)} characters; --host {host} needs {LEAST_TOKEN} or more")
    return chosen
