"""The Triton kernels themselves, run by Triton's interpreter on the CPU: the files in `interpreted/`."""

from pathlib import Path

import pytest

from tests.processes import Interpreter

FILES = sorted(file for file in (Path(__file__).parent / "interpreted").glob("*.py") if file.name != "conftest.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path, interpreting_python: Interpreter, request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("seed")
    done = interpreting_python.run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--seed={seed}", file)
    assert done.returncode == 0, done.stdout[-7000:] + done.stderr
