"""Runs that the tests of the report share, which are long."""

import pytest

from profiling.results import Run
from tests.profiling import runs
from tests.profiling.runs import SOME


@pytest.fixture(scope="package")
def whole() -> Run:
    return runs.run(days=9)


@pytest.fixture(scope="package")
def earlier() -> list[Run]:
    return [runs.run(seed=1 + i, patterns=SOME, days=i) for i in range(3)]
