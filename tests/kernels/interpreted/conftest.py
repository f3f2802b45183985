"""Every kernel that the interpreter runs finds NaN in the memory that it must write."""

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from triton.language import core
from triton.runtime import interpreter

from profiling.measure.check import poisoned_memory


@cache
def operations(package: object) -> list[str]:
    """The names of what a package or class of Triton's language has the compiler do."""
    return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]


def patch_operations(package: object, builder: object, scope: Any) -> None:
    for name in operations(package):
        if core.is_builtin(member := getattr(package, name)):
            interpreter._patch_attr(package, name, member, builder, scope)


@pytest.fixture(scope="session", autouse=True)
def language_searched_once() -> Iterator[None]:
    """At each call of a function, Triton searches its language for what it must replace: a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_operations)
        yield


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        yield
