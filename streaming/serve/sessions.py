"""All sessions of a process: begun, resumed, found, ended, counted. Knows no HTTP.

A pipeline makes one session at a time, so there are as many sessions as pipelines. With a folder for snapshots, files
keep a session: the portrait, who may resume it, and its snapshot with a journal. Many servers may share the folder.
So each time that a session is resumed, its snapshots have a new name, with a number that is one higher: what a server
still writes that was taken for dead is not read.
"""

import asyncio
import hashlib
import hmac
import logging
import math
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Protocol
from weakref import WeakValueDictionary

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.config import Config
from model.errors import UserError
from model.files import replacing
from streaming.live.session import LiveSession
from streaming.serve.errors import RefusedError
from streaming.serve.limits import Limits
from streaming.serve.messages import SessionOptions
from streaming.serve.session import Session, on_event

KEPT = 24 * 3600  # seconds for which a session that nobody closed can be resumed
REMEMBERED = 1000  # sessions that have ended
TIDIED = 3600  # seconds after which files of sessions are looked through that nobody has resumed
_ID = re.compile(r"[A-Za-z0-9_-]{16}")

log = logging.getLogger("flashtalk.serve")


class Pipeline(Protocol):
    """What makes live sessions, one at a time: `TalkingHeadPipeline`."""

    @property
    def config(self) -> Config:
        """Of the picture."""
        ...

    @property
    def portrait(self) -> Callable[[Any], NDArray[np.uint8]]:
        """Gives a portrait as it will be seen."""
        ...

    @property
    def live(self) -> Callable[..., LiveSession]:
        """Begins a session."""
        ...


class Kept(msgspec.Struct):
    """What is written beside a snapshot."""

    options: SessionOptions
    key_hash: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Sessions:
    """The sessions of one process. All methods are called in one event loop.

    Attributes:
        open: sessions by their id.
        capacity: how many there can be.
        draining: whether no new ones may be begun.
        on_begin, on_end: are called with each session that begins and that has ended.
    """

    def __init__(self, pipelines: Sequence[Pipeline], limits: Limits, folder: Path | None = None) -> None:
        """Takes pipelines that have loaded their networks.

        Args:
            pipelines: each makes one session at a time.
            limits: of sessions.
            folder: where snapshots are kept; None: nowhere.
        """
        self.open: dict[str, Session] = {}
        self.capacity, self.draining, self.limits = len(pipelines), False, limits
        self.on_begin: Callable[[Session], None] = lambda _: None
        self.on_end: Callable[[Session], None] = lambda _: None
        self._free, self._folder = list(pipelines), folder
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = deque[tuple[str, str]](maxlen=REMEMBERED)  # the last ones: id, and hash of the key
        self._tidied = -math.inf  # when files were looked through
        self._resuming: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of those being resumed

    @property
    def free(self) -> int:
        """How many more sessions can begin now."""
        return 0 if self.draining else len(self._free)

    # --- Begin -------------------------------------------------------------------------------------------------------

    async def create(self, image: Image.Image | Path, options: SessionOptions) -> Session:
        """Begins a session with a portrait. Raises `RefusedError` if there is no room or it cannot begin."""
        identifier, key = secrets.token_urlsafe(12), secrets.token_urlsafe(32)
        pipeline = self._take()
        with self._given_back(pipeline, "bad_portrait"):
            portrait = await asyncio.to_thread(pipeline.portrait, image)
            if self._folder:
                await asyncio.to_thread(_keep, self._folder / identifier, portrait, options, key)
        return await self._begin(pipeline, portrait, options, identifier, key, resume=None)

    async def resume(
        self, identifier: str, key: str, position: int | None = None, admit: Callable[[], None] = lambda: None
    ) -> tuple[Session, bool]:
        """The session with this id and key, and whether it was open: then it goes on, and whoever spoke has stopped.

        One that has ended goes on from its snapshot. Its moments count on: `session.live.position` is the next one, the
        one after the last that was handed over, or `position` if that can be shown again. `admit` is called before
        that, and raises if sessions are begun too often. Raises `RefusedError` if there is no such session, or no room.
        """
        if not _ID.fullmatch(identifier):
            raise RefusedError("not_found")
        lock = self._resuming.setdefault(identifier, asyncio.Lock())
        async with lock:  # two who resume at once get one session
            if there := self.open.get(identifier):
                self.find(identifier, key)
                if not there.ended:
                    there.release_all()
                    return there, True
                await there.close(there.ended)
            return await self._go_on(identifier, key, position, admit), False

    async def _go_on(self, identifier: str, key: str, position: int | None, admit: Callable[[], None]) -> Session:
        """Opens a session that has ended, from its snapshot."""
        if self._folder is None:
            raise RefusedError("not_found")
        kept, portrait = await asyncio.to_thread(_kept, self._folder / identifier, key)
        admit()
        resume = await asyncio.to_thread(_last, self._folder / identifier)  # None if it ended before it had begun
        session = await self._begin(self._take(), portrait, kept.options, identifier, key, resume, position)
        if resume:
            await asyncio.to_thread(_remove_snapshot, resume)  # the session has written another one
        return session

    def _take(self) -> Pipeline:
        if self.draining:
            raise RefusedError("draining")
        if not self._free:
            raise RefusedError("limit_sessions")
        return self._free.pop()

    @contextmanager
    def _given_back(self, pipeline: Pipeline, code: str) -> Iterator[None]:
        """Gives the pipeline back if the body fails; a user's mistake becomes a refusal with this code."""
        try:
            yield
        except BaseException as error:
            self._free.append(pipeline)
            if isinstance(error, UserError):
                raise RefusedError(code, str(error)) from error
            raise

    async def _begin(
        self,
        pipeline: Pipeline,
        portrait: NDArray[np.uint8],
        options: SessionOptions,
        identifier: str,
        key: str,
        resume: Path | None,
        position: int | None = None,
    ) -> Session:
        """Opens a live session, which may take seconds, and serves it."""

        def opened() -> LiveSession:
            return pipeline.live(
                portrait,
                **msgspec.structs.asdict(options),
                max_queued=self.limits.queue,
                on_event=on_event(loop, lambda: self.open.get(identifier)),
                snapshots=self._folder and self._folder / f"{identifier}.{_number(resume) + 1}.session",
                resume=resume,
                position=position,
            )

        loop = asyncio.get_running_loop()
        keep, chunk = self.snapshot if self._folder else None, pipeline.config.chunk
        with self._given_back(pipeline, "bad_request"):
            live = await asyncio.to_thread(opened)
            try:
                session = Session(identifier, key, live, chunk, self.limits, keep, resumed=resume is not None)
            except BaseException:  # it opens encoders
                await asyncio.to_thread(live.close)
                raise
        self.open[identifier] = session
        self.on_begin(session)
        task = asyncio.create_task(self._serve(session, pipeline))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        log.info("session %s begins", identifier, extra={"session": identifier, "kind": options.kind})
        if self.draining:  # it was being opened when the end came
            await self.close(session, "draining")
            raise RefusedError("draining")
        return session

    async def _serve(self, session: Session, pipeline: Pipeline) -> None:
        try:
            await session.run()
        finally:
            del self.open[session.id]
            self._ended.append((session.id, _hash(session.key)))
            self._free.append(pipeline)
            self.on_end(session)
            log.info("session %s ends: %s", session.id, session.ended, extra={"session": session.id})

    # --- Find, keep, end ---------------------------------------------------------------------------------------------

    def there(self, identifier: str) -> Session:
        """The open session with this id, for whoever needs no key. Raises `RefusedError` if there is none."""
        if identifier not in self.open:
            raise RefusedError("not_found")
        return self.open[identifier]

    def find(self, identifier: str, key: str) -> Session:
        """The open session with this id and key. Raises `RefusedError`, the same for either being wrong.

        Whoever has the key of one that ended lately learns that it is no longer there.
        """
        session = self.open.get(identifier)
        expected = session.key if session else secrets.token_urlsafe(32)  # takes as long for an id that is unknown
        if not hmac.compare_digest(expected.encode(), key.encode()) or session is None:
            raise RefusedError("not_found" if (identifier, _hash(key)) in self._ended else "unauthorised")
        return session

    async def snapshot(self, session: Session) -> int:
        """Writes a session's snapshot now; returns the index of its next moment.

        Raises `RefusedError` if it cannot be written.
        """
        if session.live.snapshots is None:
            raise RefusedError("no_snapshots")
        try:
            await asyncio.to_thread(session.live.snapshot, session.live.snapshots)
        except UserError as error:
            log.error("session %s: %s", session.id, error)
            raise RefusedError("failed", "the snapshot cannot be written") from error
        return session.live.position

    async def close(self, session: Session, reason: str = "closed") -> None:
        """Ends a session. One that its client has closed cannot be resumed."""
        await session.close(reason)
        if reason == "closed" and self._folder:
            await asyncio.to_thread(_remove, self._folder / session.id)

    async def sweep(self) -> None:
        """What is to be done each second: ends what is idle or left alone, tells figures, removes old files."""
        now = time.monotonic()
        if self._folder and now - self._tidied > TIDIED:
            self._tidied = now
            await asyncio.to_thread(_remove_old, self._folder, list(self.open))
        for session in list(self.open.values()):
            if session.ended:
                continue
            if reason := session.overdue(now):
                await self.close(session, reason)
            else:
                session.each_second(now)

    async def drain(self) -> None:
        """Ends all sessions, each with a snapshot, and begins no new ones."""
        self.draining = True
        await asyncio.gather(*(self.close(session, "draining") for session in list(self.open.values())))
        if self._tasks:
            await asyncio.wait(self._tasks)


# --- Files -----------------------------------------------------------------------------------------------------------


def _keep(path: Path, portrait: NDArray[np.uint8], options: SessionOptions, key: str) -> None:
    """Writes what is kept of a session beside its snapshots. Raises `RefusedError` if that fails."""
    try:
        with replacing(path.with_suffix(".png")) as temporary:
            Image.fromarray(portrait).save(temporary, "PNG")
        with replacing(path.with_suffix(".json")) as temporary:
            temporary.write_bytes(msgspec.json.encode(Kept(options, _hash(key))))
    except OSError as error:
        raise RefusedError("internal", f"snapshots cannot be written: {error.strerror}") from error


def _kept(path: Path, key: str) -> tuple[Kept, NDArray[np.uint8]]:
    """What is kept beside the snapshots at `path`. Raises `RefusedError` if there is nothing, or the key is wrong."""
    try:
        kept = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=Kept)
        if not hmac.compare_digest(kept.key_hash, _hash(key)):
            raise RefusedError("not_found")
        with Image.open(path.with_suffix(".png")) as file:
            return kept, np.asarray(file.convert("RGB"))
    except (OSError, msgspec.MsgspecError) as error:
        raise RefusedError("not_found") from error


def _last(path: Path) -> Path | None:
    """The snapshot of a session that was begun last; `path` lacks its ending."""
    return max(path.parent.glob(f"{path.name}.*.session"), key=_number, default=None)


def _remove_old(folder: Path, open_here: Collection[str]) -> None:
    """Removes the files of sessions of which nothing was written for `KEPT`; of an open one, something always is."""
    newest: dict[str, float] = {}
    for file in folder.iterdir():
        name = file.name.partition(".")[0]
        with suppress(OSError):  # another server may have removed it
            newest[name] = max(newest.get(name, 0.0), file.stat().st_mtime)
    for name, written in newest.items():
        if _ID.fullmatch(name) and name not in open_here and time.time() - written > KEPT:
            _remove(folder / name)


def _remove(path: Path) -> None:
    """Removes all files of a session; `path` lacks their endings."""
    for file in path.parent.glob(f"{path.name.partition('.')[0]}.*"):
        with suppress(OSError):
            file.unlink()


def _remove_snapshot(path: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        with suppress(OSError):
            file.unlink()


def _number(snapshot: Path | None) -> int:
    """How often a session had been resumed when this snapshot of it was begun."""
    middle = snapshot.name.split(".")[1] if snapshot else "-1"
    return int(middle) if middle.lstrip("-").isdecimal() else -1


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
