"""A replica of two ranks, in a process of its own: a session of both, and no rank outlives the other one."""

import signal
from functools import partial
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from model.errors import UserError
from streaming.cluster.group import leading
from streaming.pipeline import TalkingHeadPipeline
from streaming.ranks import EXIT_LOST
from tests.processes import Interpreter, Process

SHOWN = 30  # moments, of two chunks
PORTRAIT = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
load = partial(TalkingHeadPipeline.from_pretrained, "tiny", device="cpu", size=(64, 64), steps=1)


def shown(pipeline: TalkingHeadPipeline) -> NDArray[np.int16]:
    """The first frames of a silent session."""
    with pipeline.live(PORTRAIT) as session:
        moments = session.moments()
        return np.stack([next(moments).rgb for _ in range(SHOWN)]).astype(np.int16)


def be_replica(address: str) -> None:
    """The program of rank 0: tells the test the processes of the others, then its frames as often as it is asked."""
    with leading(load, 2) as pipeline, Client(address) as test:
        test.send([child.pid for child in psutil.Process().children()])
        for _ in range(test.recv()):
            test.send(shown(pipeline))


def fail_on_another_rank() -> TalkingHeadPipeline:
    """Fails before the ranks have found each other."""
    import os

    if os.environ["RANK"] == "1":
        raise UserError("rank 1 has no GPU")
    return load()


def replica(python: Interpreter, folder: Path) -> tuple[Process, Any]:
    with Listener(str(folder / "test")) as listener:
        program = f"from tests.streaming.cluster.test_group import be_replica; be_replica({listener.address!r})"
        process = python.start("-c", program)
        return process, listener.accept()


@pytest.fixture(scope="module")
def alone() -> NDArray[np.int16]:
    return shown(load())


def test_two_ranks_have_the_session_of_one(python: Interpreter, tmp_path: Path, alone: NDArray[np.int16]) -> None:
    process, told = replica(python, tmp_path)
    (other,) = told.recv()
    told.send(2)
    for _ in range(2):
        assert np.abs(told.recv() - alone).max() <= 1
    assert process.communicate() == ("", "")
    assert process.returncode == 0
    assert not psutil.pid_exists(other)


@pytest.mark.parametrize("killed", [0, 1])
def test_no_rank_outlives_the_other(python: Interpreter, tmp_path: Path, killed: int) -> None:
    process, told = replica(python, tmp_path)
    other = psutil.Process(told.recv()[0])  # from now on the replica waits for nothing but this test
    if killed == 0:
        process.kill()
        process.wait()
        other.wait()
    else:
        other.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        assert process.returncode == EXIT_LOST
        assert said == "error: rank 1 has ended; a replica cannot go on without it\n"


def test_a_rank_that_cannot_begin_ends_the_replica(python: Interpreter) -> None:
    name = fail_on_another_rank.__name__
    program = f"from tests.streaming.cluster.test_group import *; leading({name}, 2).__enter__()"
    done = python.run("-c", program)
    assert done.returncode == EXIT_LOST
    assert done.stderr.splitlines() == [
        "error: rank 1 has no GPU", "error: rank 1 has ended; a replica cannot go on without it",
    ]  # fmt: skip
