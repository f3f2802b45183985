"""Setup of all tests: threads, options, seeds, skipped markers, no deadlines for property tests; benchmark files."""

import gc
import os
import signal
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from model.machine import CACHE_ENV
from tests.processes import Interpreter, interpreter

gc.disable()  # until all tests are collected; they and what they import are no garbage
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; threads that wait for each other only burn time
    os.environ["OMP_NUM_THREADS"] = "1"  # also in what tests start
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # g++ knows this CPU, which Inductor takes 8 seconds a cache to find out
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
settings.register_profile("tests", deadline=None)  # a verdict must not depend on the machine's load
settings.register_profile("tests-of-seed-0", settings.get_profile("tests"), derandomize=True)


def pytest_configure(config: pytest.Config) -> None:
    """Redirects the user's cache, so that tests neither read nor change it, and lets Ctrl-C interrupt.

    A shell makes what it runs in the background ignore Ctrl-C, which some tests send. pytest-xdist gives its workers a
    width and a name, which what they test must not see.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("COLUMNS", "PYTEST_XDIST_WORKER"):
        os.environ.pop(name, None)
    seed = config.getoption("seed")
    settings.load_profile("tests" if seed else "tests-of-seed-0")
    config.option.hypothesis_seed = seed or None
    folder = tempfile.TemporaryDirectory(prefix="flashtalk-tests-")
    os.environ[CACHE_ENV] = folder.name
    config.add_cleanup(folder.cleanup)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of parity cases (default: tests/golden)",
    )
    parser.addoption(
        "--seed",
        type=int,
        default=0,
        help="decides the random inputs of tests; 0, the default, is what a change is held to",
    )
    parser.addoption(  # pytest takes what follows a blank for a test file
        "--cases", type=Path, help="--cases=FILE: Python file whose CASES --benchmark-only times, not the registry's"
    )


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('seed')}"


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """A test's random tensors follow from its name and the seed, whatever ran before it in the same process."""
    torch.manual_seed(zlib.crc32(f"{request.config.getoption('seed')} {request.node.nodeid}".encode()))


@pytest.fixture(scope="session")
def python() -> Iterator[Interpreter]:
    """Starts Python processes with the command lines' packages imported."""
    ours = "streaming.pipeline", "model.distill.stages", "profiling.measure.campaign"
    encoders = (f"transformers.models.{name}.modeling_{name}" for name in ("clip", "umt5", "wav2vec2"))
    with interpreter(*ours, *encoders) as python:
        yield python


@pytest.fixture(scope="session")
def interpreting_python() -> Iterator[Interpreter]:
    """The same, but Triton, which chooses at its import, interprets kernels instead of compiling them."""
    modules = "hypothesis.extra.pytestplugin", "model.dit", "model.vae", "profiling.measure.tune"
    with interpreter(*modules, "pytest_benchmark.plugin", TRITON_INTERPRET="1") as python:
        yield python


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("benchmark_only"):  # other tests are no part of this run, so they are not skipped one by one
        config.hook.pytest_deselected(items=[item for item in items if "benchmark" not in item.keywords])
        items[:] = [item for item in items if "benchmark" in item.keywords]
    items.sort(key=lambda item: "slow" not in item.keywords)  # first, so that no worker is left with one at the end
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if "benchmark" in item.keywords and not config.getoption("benchmark_only"):
            item.add_marker(pytest.mark.skip(reason="a benchmark: run it with --benchmark-only"))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Puts what `profiling.formats` reads into a benchmark's file, so that two GPUs never pass as one device."""
    from profiling.machine import describe_machine

    machine_info["profiling"] = asdict(describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
