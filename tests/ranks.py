"""Ranks on a CPU: processes that stay for a test session and run functions together, connected by gloo."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_WORLD = 4
PATIENCE = 600  # seconds until a rank that does not answer fails the test: longer than any test takes on a busy machine
LAYOUTS = tuple(
    (world, ulysses) for world in range(2, MAX_WORLD + 1) for ulysses in range(1, 5) if world % ulysses == 0
)


class RankPool:
    """Processes 0 to MAX_WORLD - 1. `run` lets the first few of them be the ranks of a layout."""

    def __init__(self, pipes: Sequence[Any]) -> None:
        self._pipes = pipes

    def run(self, world: int, ulysses: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of function(ranks, *args) on every rank of a layout; `function` belongs to a module."""
        for pipe in self._pipes[:world]:
            pipe.send((world, ulysses, function, args))
        results = []
        for rank, pipe in enumerate(self._pipes[:world]):
            assert pipe.poll(PATIENCE), f"rank {rank} does not answer"
            error, result = pipe.recv()
            assert error is None, f"rank {rank}:\n{error}"
            results.append(result)
        return results


@contextmanager
def rank_pool() -> Iterator[RankPool]:
    """A pool, whose processes end with the context."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pairs = [context.Pipe() for _ in range(MAX_WORLD)]
        processes = [
            context.Process(target=_serve, args=(rank, Path(folder) / "store", there), daemon=True)
            for rank, (_, there) in enumerate(pairs)
        ]
        for process in processes:
            process.start()
        try:
            yield RankPool([here for here, _ in pairs])
        finally:
            for process in processes:
                process.kill()
                process.join()


def _serve(rank: int, store: Path, pipe: Any) -> None:
    """Runs what comes through the pipe, in the layouts of all ranks."""
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

    from model.parallel.ranks import ProcessGroups, Ranks

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(str(store), MAX_WORLD), rank=rank, world_size=MAX_WORLD)
    transports = {layout: ProcessGroups(range(layout[0]), layout[1], "cpu") for layout in LAYOUTS}
    while True:
        world, ulysses, function, args = pipe.recv()
        try:
            pipe.send((None, function(Ranks(rank, world, ulysses, transports[world, ulysses]), *args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
