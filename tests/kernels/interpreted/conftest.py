"""Every kernel that the interpreter runs finds NaN in the memory that it must write."""

from collections.abc import Iterator

import pytest
import torch

from profiling.measure.check import poisoned_memory


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        yield
