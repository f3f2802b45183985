"""Limits: how much, how many and how long; and how often."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from model.files import read_toml

LARGEST = 2**40  # of a limit: a terabyte, or ages


@dataclass(frozen=True)
class Limits:
    """What a server bears from its clients. Sizes are bytes, times seconds.

    A test compares these names and values with the table in docs/serve.md.
    """

    viewers: int = 8  # of a session
    message_bytes: int = 64 * 1024  # of a WebSocket, and of an SDP offer
    portrait_bytes: int = 10 * 2**20
    portrait_pixels: int = 4096 * 4096
    recording_bytes: int = 20 * 2**20
    queue: float = 60.0  # sound that waits to be said; then the server reads no more
    messages_per_second: float = 50.0  # of text, of a socket
    creations_per_minute: float = 30.0  # of sessions, in all
    wrong_tokens_per_minute: float = 10.0  # of an address
    connect: float = 20.0  # until a peer connection is there, or `hello` was said
    heartbeat: float = 20.0  # after which a silent socket is asked whether it lives
    stuck: float = 20.0  # that a viewer may take nothing
    unattended: float = 30.0  # that a session may be without any connection
    idle: float = 300.0  # that a session may be without sound
    ticket: float = 30.0  # that a ticket is good for
    drain: float = 10.0  # that an end may take

    @classmethod
    def read(cls, file: Path) -> "Limits":
        """Those of a TOML file; what it does not name stays as it is. Raises `UserError` for what cannot be a limit."""
        fields, values = {field.name: field.type for field in dataclasses.fields(cls)}, {}
        for name, value in read_toml(file, f"--limits {file}").items():
            if name not in fields:
                raise UserError(f"--limits {file}: {name} is no limit; there are {', '.join(fields)}")
            number = int if fields[name] is int else (int, float)
            if isinstance(value, bool) or not isinstance(value, number) or not 0 < value <= LARGEST:
                what = "a whole number" if number is int else "a number"
                raise UserError(f"--limits {file}: {name} = {value!r:.40}: write {what} above 0")
            values[name] = value
        return cls(**values)

    def told(self) -> dict[str, float]:
        """Those that a client of a session has to know."""
        return {
            "message_bytes": self.message_bytes,
            "recording_bytes": self.recording_bytes,
            "queue": self.queue,
            "viewers": self.viewers,
            "unattended": self.unattended,
            "idle": self.idle,
        }


class Bucket:
    """Lets through so many events a second on average, and a burst of as many as fit in `capacity`, at least one."""

    def __init__(self, rate: float, capacity: float, now: Callable[[], float]) -> None:
        """`now` is the clock."""
        self._rate, self._capacity, self._now = rate, max(1.0, capacity), now
        self._level, self._at = self._capacity, now()

    def take(self) -> bool:
        """Whether one more event may be."""
        now = self._now()
        self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
        self._at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True

    @property
    def is_full(self) -> bool:
        """Whether nothing has happened for long enough to forget everything."""
        return self._level + (self._now() - self._at) * self._rate >= self._capacity
