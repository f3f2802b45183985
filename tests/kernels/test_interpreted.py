"""The Triton kernels themselves, run by Triton's interpreter on the CPU: the files in `interpreted/`.

Triton decides at import whether it compiles or interprets, so each file has a process of its own; as many run at a time
as there are cores, one thread each.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(file for file in FOLDER.glob("*.py") if file.name != "conftest.py")
Runs = dict[Path, "Future[subprocess.CompletedProcess[str]]"]


def interpret(file: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """Of the files that are asked for."""
    wanted = [item.name for item in request.session.items]
    files = [file for file in FILES if f"test_interpreted[{file.stem}]" in wanted]
    with ThreadPoolExecutor(os.cpu_count()) as cores:
        yield {file: cores.submit(interpret, file) for file in files}
        cores.shutdown(cancel_futures=True)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path, runs: Runs) -> None:
    done = runs[file].result()
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
