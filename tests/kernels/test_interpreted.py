"""The Triton kernels themselves, run by Triton's interpreter on the CPU: the files in `interpreted/`.

Triton decides at import whether it compiles or interprets. So one process imports it to interpret, and what all files
import, and each file runs in a fork of it.
"""

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

FILES = sorted(file for file in (Path(__file__).parent / "interpreted").glob("*.py") if file.name != "conftest.py")
IMPORTED = [
    "hypothesis.extra.pytestplugin",
    "model.dit",
    "model.vae",
    "profiling.measure.check",
    "pytest_benchmark.plugin",
]


@pytest.fixture(scope="module")
def interpreting() -> ForkServerContext:
    """Starts processes in which Triton interprets. Nothing else in the tests forks from multiprocessing's server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def run(file: Path, log: Path) -> None:
    """Runs the tests of a file, as the process's only work."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", str(file)]))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path, interpreting: ForkServerContext, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = interpreting.Process(target=run, args=(file, log), daemon=True)
    process.start()
    process.join()
    assert process.exitcode == 0, log.read_text()[-7000:]
