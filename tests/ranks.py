"""Ranks on a CPU: processes that stay for a module's tests and run functions together, connected by gloo."""

import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from tests.processes import Interpreter

MAX_WORLD = 4
PATIENCE = 600  # seconds until a rank that does not answer fails the test: longer than any test takes on a busy machine
LAYOUTS = tuple(
    (world, ulysses) for world in range(2, MAX_WORLD + 1) for ulysses in range(1, 5) if world % ulysses == 0
)


class RankPool:
    """Processes 0 to MAX_WORLD - 1. `run` lets the first few of them be the ranks of a layout."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        self._pipes = pipes

    def run(self, world: int, ulysses: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of function(ranks, *args) on every rank of a layout; `function` belongs to a module."""
        for pipe in self._pipes[:world]:
            _send(pipe, world, ulysses, function, args)
        results = []
        for rank, pipe in enumerate(self._pipes[:world]):
            assert pipe.poll(PATIENCE), f"rank {rank} does not answer"
            error, result = _receive(pipe)
            assert error is None, f"rank {rank}:\n{error}"
            results.append(result)
        return results


@contextmanager
def rank_pool(python: Interpreter) -> Iterator[RankPool]:
    """A pool, whose processes end with the context."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(MAX_WORLD):
            here, there = Pipe()
            program = f"from tests.ranks import serve; serve({rank}, '{folder}/store')"
            processes.append(python.start("-c", program, stdin=there.fileno(), capture=False))
            there.close()
            pipes.append(here)
        try:
            yield RankPool(pipes)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def serve(rank: int, store: str) -> None:
    """Runs what comes through standard input, which is a pipe to the tests, in the layouts of all ranks."""
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

    from model.parallel.ranks import ProcessGroups, Ranks

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(store, MAX_WORLD), rank=rank, world_size=MAX_WORLD)
    transports = {layout: ProcessGroups(range(layout[0]), layout[1], "cpu") for layout in LAYOUTS}
    pipe = Connection(0)
    while True:
        world, ulysses, function, args = _receive(pipe)
        try:
            _send(pipe, None, function(Ranks(rank, world, ulysses, transports[world, ulysses]), *args))
        except BaseException:
            _send(pipe, traceback.format_exc(), None)


def _send(pipe: Connection, *values: Any) -> None:
    """Sends copies. A pipe itself would send tensors by shared memory, which only relatives can open."""
    pipe.send_bytes(pickle.dumps(values))


def _receive(pipe: Connection) -> tuple[Any, ...]:
    return pickle.loads(pipe.recv_bytes())
