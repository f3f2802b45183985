"""What the audit says of the attention kernel that the tests of profiling share; and a kernel without products."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from profiling.audit.audit import BUDGETS, Budgets, audit_case
from profiling.cases import Backend, Case, Shape
from profiling.devices import of_target
from profiling.results import AuditResult
from tests.profiling import attention_kernel
from tests.profiling.attention_kernel import OPERATION, PRODUCTION

H100 = of_target("sm_90")
PRODUCTION_FLOPS = 4 * 12096**2 * 40 * 128
KERNELS = Path(attention_kernel.__file__)


def no_call(*_: object) -> Any:
    raise AssertionError("an audit runs nothing")


def audited(
    *launchers: Callable[..., object],
    shape: Shape = PRODUCTION,
    dtype: str = "bf16",
    target: str = "sm_90",
    budget: Path = BUDGETS,
) -> list[AuditResult]:
    """What the audit says of the attention case with these launchers."""
    backends = [Backend(f"back-end {i}", no_call, ours=True, launcher=f) for i, f in enumerate(launchers)]
    case = Case(replace(OPERATION, backends={dtype: backends}), shape, dtype, 0.0)
    return audit_case(case, of_target(target), Budgets(budget))


@triton.jit
def scaled(x, y, n, factor, BLOCK: tl.constexpr, EVEN: tl.constexpr):  # noqa: N803
    """y = exp(factor x) + 1."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(y + i, tl.exp(tl.load(x + i) * factor) + 1)
    else:
        tl.store(y + i, tl.exp(tl.load(x + i, mask=i < n) * factor) + 1, mask=i < n)


heuristic = triton.heuristics({"EVEN": lambda arguments: arguments["n"] % arguments["BLOCK"] == 0})(scaled)


def scale_rows(q: Tensor, *_: Tensor) -> None:
    x, y = q.float(), torch.empty_like(q, dtype=torch.float32)
    heuristic[lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)](x, y, x.numel(), 2.0, BLOCK=1024)
