"""The Triton kernels themselves, run by Triton's interpreter on the CPU: the files in `interpreted/`.

Triton decides at import whether it compiles or interprets, so each file has a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(file for file in (Path(__file__).parent / "interpreted").glob("*.py") if file.name != "conftest.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
