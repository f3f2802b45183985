"""Which replica has a session, and which one has room for another. Is told the time and what replicas report.

Everything here follows from the reports, so a front that starts anew knows it again as soon as each replica has
reported.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from streaming.serve.errors import RefusedError

EVERY = 1.0  # seconds from report to report
LOST = 5  # sweeps without a report after which a replica is taken for dead
RESERVED = 30.0  # seconds for which a place is kept for a session whose replica has died
SETTLED = 2.0  # seconds in which a report may be older than what the front has seen itself


class Report(msgspec.Struct):
    """What a replica says of itself."""

    replica: str  # its name, another one each time that it starts
    url: str
    limit: int  # sessions for which it has networks
    fits: int  # sessions that keep up, as measured
    sessions: list[str]  # that are open
    draining: bool


@dataclass(eq=False)
class Replica:
    """A replica as its last report has it."""

    name: str
    url: str
    limit: int = 0
    fits: int = 0
    draining: bool = False
    silent: int = 0  # sweeps since its last report
    begun: dict[str, float] = field(default_factory=dict)  # sessions, and since when the front knows them
    pending: int = 0  # sessions that are about to begin

    def room(self, measured: bool) -> int:
        """Sessions that can begin now: that keep up, or that there are networks for."""
        places = min(self.fits, self.limit) if measured else self.limit
        return 0 if self.draining else max(0, places - len(self.begun) - self.pending)


class Placement:
    """The replicas and their sessions.

    Attributes:
        replicas: that are alive, by name.
        on_lost: is called with each replica that is taken for dead.
    """

    def __init__(self, now: Callable[[], float], overcommit: bool = False) -> None:
        """`now` is the clock. With `overcommit`, sessions may begin where not all of them would keep up."""
        self.replicas: dict[str, Replica] = {}
        self.on_lost: Callable[[Replica], None] = lambda _: None
        self._now, self._measured = now, not overcommit
        self._reserved: dict[str, float] = {}  # sessions of replicas that have died, and until when

    # --- What replicas say -------------------------------------------------------------------------------------------

    def report(self, report: Report) -> list[str]:
        """Takes a report. Returns the sessions that the replica has to end: they go on elsewhere.

        That happens to a replica that was taken for dead.
        """
        now = self._now()
        replica = self.replicas.setdefault(report.replica, Replica(report.replica, report.url))
        elsewhere = [session for session in report.sessions if self.owner(session) not in (None, replica)]
        replica.limit, replica.fits, replica.silent = report.limit, report.fits, 0
        replica.draining = report.draining
        for session, since in list(replica.begun.items()):
            if session not in report.sessions and now - since > SETTLED:
                del replica.begun[session]
        for session in report.sessions:
            if session not in elsewhere:
                replica.begun.setdefault(session, -math.inf)
                self._reserved.pop(session, None)
        return elsewhere

    def lose(self, replica: Replica) -> None:
        """The replica is dead. Places are kept for its sessions for a while."""
        if self.replicas.pop(replica.name, None):
            self._reserved |= dict.fromkeys(replica.begun, self._now() + RESERVED)
            self.on_lost(replica)

    def sweep(self) -> None:
        """What is to be done every `EVERY` seconds: loses replicas that have not reported for long.

        Sweeps are counted, not seconds, so that a front that stood still itself takes nobody for dead.
        """
        for replica in list(self.replicas.values()):
            replica.silent += 1
            if replica.silent > LOST:
                self.lose(replica)

    # --- Sessions ----------------------------------------------------------------------------------------------------

    def owner(self, session: str) -> Replica | None:
        """The replica that has the session; None if none has."""
        return next((replica for replica in self.replicas.values() if session in replica.begun), None)

    def opened(self, session: str, replica: Replica) -> None:
        """A session has begun, or goes on, on a replica, and on no other."""
        self.closed(session)
        replica.begun[session] = self._now()
        self._reserved.pop(session, None)

    def closed(self, session: str, replica: Replica | None = None) -> None:
        """A session has ended on a replica, None: on any; it may go on somewhere else."""
        for there in [replica] if replica else self.replicas.values():
            there.begun.pop(session, None)

    @property
    def free(self) -> int:
        """Sessions that can begin now."""
        now = self._now()
        self._reserved = {session: until for session, until in self._reserved.items() if until > now}
        rooms = sum(replica.room(self._measured) for replica in self.replicas.values())
        return max(0, rooms - len(self._reserved))

    @property
    def capacity(self) -> int:
        """Sessions that there are networks for."""
        return sum(replica.limit for replica in self.replicas.values() if not replica.draining)

    @contextmanager
    def placing(self, resumed: str | None = None, but: Sequence[Replica] = ()) -> Iterator[Replica]:
        """A replica for a session, where a place is taken while the body begins it.

        It is the one with the largest share of its places free. A session that is `resumed` had its place, so it may be
        where it does not keep up. Raises `RefusedError` if there is no room outside of `but`.
        """
        measured = self._measured and resumed is None
        free = resumed in self._reserved or self.free
        rooms = {r: r.room(measured) for r in self.replicas.values() if r not in but and r.room(measured)}
        if not rooms or not free:
            raise RefusedError("limit_sessions")
        replica = max(rooms, key=lambda r: (rooms[r] / r.limit, r.name))
        replica.pending += 1
        try:
            yield replica
        finally:
            replica.pending -= 1


def fitting(limit: int, chunks: Sequence[float | None], duration: float) -> int:
    """How many sessions keep up on a replica: those that are open, and as many as their chunks leave time for.

    Sessions of a replica share its device, so with one more of them the chunks of all take longer in proportion. Before
    anything is measured, it is one.

    Args:
        limit: sessions for which there are networks.
        chunks: seconds that a chunk takes, for each open session; None: it has made none.
        duration: seconds that a chunk lasts.
    """
    known, count = [seconds for seconds in chunks if seconds], len(chunks)
    measured = math.floor(len(chunks) * duration / max(known)) if len(known) == count and known else count
    return min(limit, max(1, count, measured))
