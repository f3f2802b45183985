"""The ranks of one run: how they find each other, agree, are led by rank 0, and notice that one is lost.

torchrun starts the same program several times; each process is a rank with a GPU, or without one on a CPU. Rank 0
leads: it alone reads the sound and writes the video. The others follow: they call the same methods of a
`ChunkGenerator` with the arguments that rank 0 sends them. All ranks must have the same options, weights and versions.

    rank 0    open the files -> begin -> prepare -> chunk -> chunk -> ... -> end
                                  |        |         |        |               |
    others                      check   prepare    chunk    chunk           return

Every rank says once a second that it is alive. One that does not while another one does `LOST_AFTER` times, because its
process or machine has stopped, ends all others, which might wait for ever for what it owes them. Signs are counted, not
seconds: where all ranks stand still together, as on a machine that is busy or was suspended, none is lost.
"""

import atexit
import os
import platform
import socket
import sys
import threading
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from model.errors import UserError
from model.machine import package_version
from model.parallel.ranks import ProcessGroups, Ranks, ulysses_degree
from streaming.generator import ChunkGenerator, Conditions, Frames, State, frames_of

BEAT = 1.0  # seconds between signs of life
LOST_AFTER = 10  # signs that a rank gives without a new one of another
FOREVER = timedelta(days=365)  # a live session may be silent for long; lost ranks are found by their signs of life
EXIT_LOST = 3  # exit code of a rank that ends because another one is lost
T = TypeVar("T")


class RankLostError(UserError):
    """Another rank has ended or does not answer, so nothing can be generated any more."""


class RankGroup:
    """All ranks of this run, seen from one of them."""

    def __init__(self, rank: int, world: int) -> None:
        """Use `join`."""
        self.rank, self.world = rank, world
        self.asked = False  # whether the others wait to be told if the chunk in work goes on
        self._ranks: Ranks | None = None
        self._life: SignsOfLife | None = None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def watch(self) -> None:
        """Begins to give signs of life and to look for those of the others."""
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store: Any = TCPStore(*address, is_master=False, wait_for_workers=False)
        store.set_timeout(timedelta(seconds=LOST_AFTER * BEAT))
        self._life = SignsOfLife(store, self.rank, self.world)
        self._life.give()
        dist.barrier()  # so that every rank has given one
        threading.Thread(target=self._life.watch, args=(_end_process,), daemon=True, name="signs of life").start()

    def layout(self, heads: int, device_type: str) -> Ranks:
        """The ranks as the networks see them, in the layout for this number of attention heads."""
        if self._ranks is None:
            degree = ulysses_degree(self.world, heads)
            self._ranks = Ranks(self.rank, self.world, degree, ProcessGroups(range(self.world), degree, device_type))
        return self._ranks

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises a `UserError` of the body on all ranks, if any rank has one: of the lowest of these ranks."""
        mine = None
        try:
            yield
        except UserError as error:
            mine = str(error)
        for rank, message in enumerate(self._gather(mine)):
            if message is not None:
                raise UserError(message if rank == 0 or mine == message else f"rank {rank}: {message}")

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raises `UserError` on all ranks unless those that each has been given are as on rank 0, which has all."""
        everyone = self._gather(dict(facts))
        for rank, theirs in enumerate(everyone[1:], 1):
            for name, value in theirs.items():
                if value != (leading := everyone[0][name]):
                    raise UserError(f"rank {rank} has {name} {value}, rank 0 has {leading}; start all with the same")

    def share(self, value: T) -> T:
        """The value of rank 0, on every rank."""
        if self.leads:
            self.send(value)
            return value
        return self.receive()

    def send(self, message: Any) -> None:
        """On rank 0: gives the message, any picklable value, to all other ranks."""
        with noticing_losses():
            dist.broadcast_object_list([message], src=0, device=torch.device("cpu"))

    def go_on(self, goes_on: bool) -> None:
        """On rank 0: tells the others, if they wait for it, whether the chunk in work goes on."""
        if self.asked:
            self.asked = goes_on
            self.send(goes_on)

    def call(self, message: Any) -> None:
        """On rank 0: gives a message to the others; a chunk that is still in work is given up."""
        self.go_on(False)
        self.send(message)

    def receive(self) -> Any:
        """On another rank: waits for the next message of rank 0."""
        box = [None]
        with noticing_losses():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def leave(self) -> None:
        """Tells the others that this rank has no more to do, and closes its connections."""
        if self._life is not None:
            self._life.stop()
        dist.destroy_process_group()

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        with noticing_losses():
            dist.all_gather_object(values, value)
        return values


def join(device_type: str) -> RankGroup | None:
    """Joins the ranks that torchrun has started with this one; None if it has not, or only this one.

    Raises `UserError` if a rank lacks a GPU, or PyTorch lacks what connects GPUs.
    """
    world, rank, local = (int(os.environ.get(name, 0)) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if world < 2:
        return None
    if device_type == "cuda":
        if not dist.is_nccl_available():
            raise UserError(f"{world} GPUs: this PyTorch lacks NCCL, which connects them; install one with it")
        if local >= torch.cuda.device_count():
            raise UserError(
                f"rank {rank} needs a GPU of its own, and this machine has {torch.cuda.device_count()}; start fewer"
            )
        torch.cuda.set_device(local)
    group = _joined.get(os.getpid())
    if group is None:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=FOREVER)
        group = _joined[os.getpid()] = RankGroup(rank, world)
        group.watch()
        atexit.register(group.leave)
    return group


def environments(world: int) -> list[dict[str, str]]:
    """The variables that torchrun would set for each of so many ranks on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


_joined: dict[int, RankGroup] = {}  # by process: torch.distributed has one default group in each


@contextmanager
def noticing_losses() -> Iterator[None]:
    """Raises `RankLostError` where the body fails because another rank is gone."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        reason = str(error)
        if not isinstance(error, dist.DistError) and not any(sign in reason for sign in _SIGNS_OF_LOSS):
            raise
        with _ending:
            _noticed.set()
        rank = os.environ.get("RANK")
        raise RankLostError(f"rank {rank}: another rank has ended; what was made so far is kept") from error


_ending = threading.Lock()  # kept by a thread that says why this process ends, so that no other one says it too
_noticed = threading.Event()  # a loss, which the error that is on its way will say
_SIGNS_OF_LOSS = ("Connection closed by peer", "Connection reset", "gloo/transport", "NCCL error", "Broken pipe")


def check_sessions(sessions: int, ranks: int) -> None:
    """Raises `UserError` if so many ranks cannot have so many sessions at once: one, if there are several ranks."""
    if ranks > 1 and sessions > 1:
        raise UserError(f"--sessions {sessions}: {ranks} ranks generate one session together; name 1")


def facts_of_machine() -> dict[str, str]:
    """Versions that all ranks must share."""
    names = ("torch", "triton", "flashtalk-triton")
    return {"python": platform.python_version()} | {name: str(package_version(name)) for name in names}


# --- Leading and following ------------------------------------------------------------------------------------------


class LeadingGenerator:
    """A `ChunkGenerator` on rank 0 whose calls the other ranks repeat.

    A chunk goes on everywhere only while it is asked for here, so it may be given up between any two of its units.
    """

    def __init__(self, generator: ChunkGenerator, group: RankGroup, key: Hashable) -> None:
        """`key` names the generator; the other ranks have one of the same name."""
        self.config, self.models, self.audio_stream = generator.config, generator.models, generator.audio_stream
        self._generator, self._group, self._key = generator, group, key
        self._last: State | None = None  # what the last chunk returned, here and on the other ranks

    def prepare(self, image: Tensor, ids: Tensor) -> Conditions:
        """As `ChunkGenerator.prepare`. Chunks that follow are of these conditions."""
        return self._called("prepare", image, ids)

    def start(self, conditions: Conditions, seed: int) -> State:
        """As `ChunkGenerator.start`."""
        return self._generator.start(conditions, seed)

    def chunk(self, conditions: Conditions, state: State, window: Tensor) -> Generator[Frames, None, State]:
        """As `ChunkGenerator.chunk`."""
        return (yield from frames_of(self.stepwise(conditions, state, window)))

    def stepwise(self, conditions: Conditions, state: State, window: Tensor) -> Generator[Frames | None, None, State]:
        """As `ChunkGenerator.stepwise`."""
        plain = None if state is self._last else (state.seed, state.chunk, state.motion.cpu())
        self._group.call(("stepwise", self._key, plain, window.cpu()))
        self._group.asked = True
        units = self._generator.stepwise(conditions, state, window)
        while True:
            with noticing_losses():
                try:
                    unit = next(units)
                except StopIteration as end:
                    self._group.asked, self._last = False, end.value
                    return end.value
            try:
                yield unit
            except GeneratorExit:
                self._group.go_on(False)
                raise
            self._group.go_on(True)

    def motion_of(self, rgb: Tensor) -> Tensor:
        """As `ChunkGenerator.motion_of`."""
        return self._called("motion_of", rgb)

    def _called(self, method: str, *arguments: Tensor) -> Any:
        self._group.call((method, self._key, *(x.cpu() for x in arguments)))
        with noticing_losses():
            return getattr(self._generator, method)(*arguments)


class FollowingGenerator:
    """A `ChunkGenerator` on another rank, which repeats what rank 0 does with its own."""

    def __init__(self, generator: ChunkGenerator, group: RankGroup) -> None:
        self._generator, self._group = generator, group
        self._conditions: Conditions | None = None
        self._state: State | None = None

    def repeat(self, method: str, *arguments: Any) -> None:
        """Does what a message of `LeadingGenerator` says."""
        with noticing_losses():
            if method == "prepare":
                self._conditions = self._generator.prepare(*arguments)
            elif method == "motion_of":
                self._generator.motion_of(*arguments)
            else:
                self._chunk(*arguments)

    def _chunk(self, plain: tuple[int, int, Tensor] | None, window: Tensor) -> None:
        state = self._state if plain is None else State(*plain)
        assert self._conditions is not None
        assert state is not None
        units = self._generator.stepwise(self._conditions, state, window)
        goes_on = True
        while goes_on:
            try:
                next(units)
            except StopIteration as end:
                self._state = end.value
                return
            goes_on = self._group.receive()
        units.close()


# --- Signs of life --------------------------------------------------------------------------------------------------


class Store(Protocol):
    """Values that all ranks see, such as `torch.distributed.TCPStore`."""

    def set(self, key: str, value: str) -> None:
        """Sets a value."""
        ...

    def multi_get(self, keys: Sequence[str]) -> Sequence[bytes]:
        """Values, all of which have been set before."""
        ...


class SignsOfLife:
    """Says regularly that this rank is alive, and finds out which others have stopped saying so."""

    GONE = "gone"  # the last sign of a rank that has no more to do

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self._store, self._rank = store, rank
        self._others = [other for other in range(world) if other != rank]
        self._count = 0
        self._seen: dict[int, tuple[bytes, int]] = {}  # the last sign of each other rank, and the own one when it came
        self._stopped = threading.Event()

    def give(self) -> None:
        """Gives a sign."""
        self._count += 1
        self._store.set(f"alive/{self._rank}", str(self._count))

    def lost(self) -> list[int]:
        """The ranks without a new sign for more than `LOST_AFTER` of this one's; all others if the store is silent."""
        try:
            signs = self._store.multi_get([f"alive/{other}" for other in self._others])
        except (dist.DistError, RuntimeError):
            return self._others
        for other, sign in zip(self._others, signs, strict=True):
            if self._seen.get(other, (b"",))[0] != sign:
                self._seen[other] = sign, self._count
        return [
            other
            for other, (sign, since) in self._seen.items()
            if sign != self.GONE.encode() and self._count - since > LOST_AFTER
        ]

    def watch(self, on_loss: Callable[[Sequence[int]], None]) -> None:
        """Gives signs until `stop`, or until a rank is lost, which `on_loss` is told."""
        while not self._stopped.is_set():
            try:
                self.give()
                lost = self.lost()
            except (dist.DistError, RuntimeError):
                lost = self._others
            if lost and not self._stopped.is_set():
                on_loss(lost)
                return
            self._stopped.wait(BEAT)

    def stop(self) -> None:
        """Gives the last sign: from now on nobody expects another."""
        self._stopped.set()
        try:
            self._store.set(f"alive/{self._rank}", self.GONE)
        except (dist.DistError, RuntimeError):
            return  # the one who keeps the signs has left already


def _end_process(lost: Sequence[int]) -> None:
    """Ends this process, whose main thread may wait for ever for the lost ranks, even once it has noticed the loss."""
    names, seconds = ", ".join(map(str, lost)), LOST_AFTER * BEAT
    with _ending:
        if not _noticed.is_set():
            print(
                f"error: rank {os.environ.get('RANK')}: no sign of life from rank {names} for {seconds:g} s; stopped."
                " The frames made so far are kept; an unfinished video is NAME.part.mp4",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_LOST)
    threading.Event().wait(seconds)
    os._exit(EXIT_LOST)
