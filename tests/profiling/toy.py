"""A small operation with good and bad back-ends, for tests of everything that runs cases. Also a `--cases` file."""

import os
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from profiling.cases import Backend, Call, Case, Operation, Shape, no_setup

WATCHED = "TOY_WATCHED"  # environment variable: whether a watchdog was set that would end a task that hangs


def double(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    return torch.mul(x, 2, out=out)


def double_but_the_tail(x: Tensor) -> Tensor:
    """Leaves its last element unwritten, as a kernel with a wrong mask does."""
    out = torch.empty_like(x)
    torch.mul(x[:-1], 2, out=out[:-1])
    return out


def raises(_: Tensor) -> Tensor:
    raise RuntimeError("no such kernel\nand a long story")


def slower(x: Tensor) -> Tensor:
    time.sleep(0.002)
    return double(x)


def hangs(x: Tensor) -> Tensor:
    if os.environ.get(WATCHED) == "True":
        os._exit(1)  # as faulthandler ends a process
    time.sleep(600)
    return x


def compile_for_ten_minutes(*_: object) -> str:
    """In the place of a compiler."""
    time.sleep(600)
    return ""


def crashes(_: Tensor) -> Tensor:
    os._exit(3)


def operation(name: str, *backends: Backend) -> Operation:
    return Operation(
        name=name,
        inputs=lambda d, randn: (randn(d["n"]),),
        reference=lambda x: x * 2,
        flops=lambda d: float(d["n"]),
        bytes=lambda d, item: 2.0 * item * d["n"],
        backends={"fp32": backends},
        is_matmul=False,
    )


def case(name: str, *backends: Backend, n: int = 1000, calls: float = 1) -> Case:
    return Case(operation(name, *backends), Shape("toy", {"n": n}, 1, calls), "fp32", 1e-5)


def ours(function: Callable[[Tensor], Tensor], name: str = "ours") -> Backend:
    return Backend(name, no_setup(function), ours=True)


def launched(x: Tensor, config: dict[str, int] | None = None) -> Call:
    """A back-end with launch parameters: `wait` milliseconds."""
    wait = (config or {"wait": 4})["wait"]

    def call() -> Tensor:
        if wait < 0:
            return torch.zeros_like(x)
        time.sleep(wait / 1000)
        return double(x)

    return call


PEER = Backend("peer", no_setup(partial(torch.mul, 2.0)))
CASES = [
    case("toy_good", ours(double), PEER),
    case("toy_wrong", ours(double_but_the_tail), PEER),
    case("toy_raises", ours(raises), PEER),
    case("toy_hangs", ours(hangs), PEER),
    case("toy_crashes", ours(crashes), PEER),
    case("toy_last", ours(slower), PEER),
]
