"""The registry under pytest-benchmark: `pytest --benchmark-only`, with its own JSON (`--benchmark-json`) and compare.

`--cases=mine.py` times that file's cases, and not the registry's. Without `--benchmark-only` these are skipped: the
same cases are checked, untimed, in test_bench.py.
"""

from dataclasses import asdict

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from model.errors import UserError
from profiling.cases import Backend, Case, requested_cases
from profiling.measure.bench import set_benchmark_state
from profiling.measure.check import check_backend, reference_outputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark for each back-end of a case that is for this device."""
    try:
        cases = requested_cases([], DEVICE, metafunc.config.getoption("cases"))
    except UserError as error:
        raise pytest.UsageError(str(error)) from error
    pairs = [(case, backend) for case in cases for backend in case.backends if DEVICE.type in backend.devices]
    metafunc.parametrize(("case", "backend"), pairs, ids=[f"{case.name}-{backend.name}" for case, backend in pairs])


@pytest.mark.benchmark
def test_case(benchmark: BenchmarkFixture, case: Case, backend: Backend) -> None:
    if not backend.installed:
        pytest.skip(f"{backend.name}: {backend.needs} is not installed")
    set_benchmark_state()
    with torch.inference_mode():
        inputs = case.inputs(DEVICE, torch.Generator(DEVICE).manual_seed(0))
        expected = reference_outputs(case, inputs, DEVICE)
        assert not check_backend(case, backend, inputs, expected, DEVICE).detail
        call = backend.prepare(*inputs)

        def whole() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        facts = asdict(case.result(()))
        benchmark.group = case.name
        benchmark.extra_info |= {k: v for k, v in facts.items() if k != "measurements"}
        benchmark.extra_info |= {"backend": backend.name, "ours": backend.ours}
        benchmark.pedantic(whole, rounds=10, warmup_rounds=2)
