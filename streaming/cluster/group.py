"""A replica of several GPUs: processes that generate together, as `streaming.ranks` has it, without torchrun.

The replica is rank 0. It starts the other ranks on its machine. They load the same networks and follow it until it has
no more to do, or until it dies, which closes their standard input.
"""

import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Event, Thread

from model.errors import UserError
from streaming.pipeline import TalkingHeadPipeline
from streaming.ranks import EXIT_LOST, environments

Load = Callable[[], TalkingHeadPipeline]  # with networks, on a machine of a replica

FOLLOWER = "import gc; gc.disable(); from streaming.cluster.group import follow; follow()"
GRACE = 2.0  # seconds in which rank 0 may end by itself, for the same reason as another rank


@contextmanager
def leading(load: Load, ranks: int) -> Iterator[TalkingHeadPipeline]:
    """The pipeline of rank 0, which this process is from now on; the other ranks follow it while the body runs.

    A rank that ends before it should ends this process as well: nothing can be generated without it.

    Args:
        load: gives a pipeline with its networks; can be pickled.
        ranks: how many generate together, each with a GPU of those that this process sees, or without one on the CPU.
    """
    done = Event()
    own, *others = environments(ranks)
    with ExitStack() as stack:
        for rank, environment in enumerate(others, 1):
            follower = stack.enter_context(_started(load, environment))
            Thread(target=_watch, args=(follower, rank, done), daemon=True, name=f"rank {rank}").start()
        stack.callback(done.set)
        os.environ.update(own)
        pipeline = load()
        with pipeline.leading():
            yield pipeline


@contextmanager
def _started(load: Load, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Another rank, which has ended when the body has."""
    command = [sys.executable, "-c", FOLLOWER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | environment) as process:
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((sys.path, load)))
        process.stdin.flush()
        yield process


def _watch(follower: subprocess.Popen[bytes], rank: int, done: Event) -> None:
    follower.wait()
    if not done.wait(GRACE):
        print(f"error: rank {rank} has ended; a replica cannot go on without it", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST)


def follow() -> None:
    """What another rank does: loads what standard input names, and follows rank 0."""
    sys.path, load = pickle.load(sys.stdin.buffer)
    gc.freeze()  # to look for garbage while modules are imported, and among them at the end, takes seconds
    gc.enable()
    Thread(target=_end_with_rank_0, daemon=True, name="rank 0").start()
    try:
        load().follow()
    except UserError as error:
        sys.exit(f"error: {error}")


def _end_with_rank_0() -> None:
    while os.read(0, 1):  # returns nothing once rank 0 has closed it, which the system does for one that was killed
        pass
    os._exit(EXIT_LOST)
