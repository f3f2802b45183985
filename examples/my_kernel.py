"""A kernel of your own, to copy and change: y = RMSNorm(x) * weight * SiLU(gate), row by row, in one pass over memory.

python -m profiling bench --cases examples/my_kernel.py --interpret    is it right? needs no GPU
python -m profiling audit --cases examples/my_kernel.py                registers, spills, what bounds it; no GPU
python -m profiling tune --cases examples/my_kernel.py                 finds the fastest launch parameters, on a GPU
python -m profiling bench --cases examples/my_kernel.py                how fast it is, beside what others would run
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import DTYPE_NAMES
from kernels.tuning import LaunchConfig, launch_config
from profiling.cases import TOLERANCES, Backend, Case, Operation, Shape, compiled, kernel_backend, no_setup

EPS = 1e-6
DEFAULT_CONFIG = {"ROWS": 1, "num_warps": 8}


def reference(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """The definition. It is called with inputs of high precision, so it needs no care about rounding."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS) * weight * F.silu(gate)


@triton.jit
def gated_rms_norm_fwd(x, gate, weight, y, eps, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """ROWS rows of contiguous [rows, columns] tensors; BLOCK columns, a power of two, hold a row."""
    offs_m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_n = tl.arange(0, BLOCK)
    mask = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]
    offs = offs_m[:, None] * columns + offs_n[None, :]
    value = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 1) / columns + eps)[:, None]
    value *= tl.load(weight + offs_n, mask=offs_n < columns, other=0.0).to(tl.float32)[None, :]
    open_by = tl.load(gate + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offs, (value * open_by * tl.sigmoid(open_by)).to(y.dtype.element_ty), mask=mask)


def launch(x: Tensor, gate: Tensor, weight: Tensor, config: LaunchConfig | None = None) -> Tensor:
    """What is timed, audited and tuned. `launch_config` finds what `tune` has found."""
    (rows, columns), y = x.shape, torch.empty_like(x)
    dims, dtype = {"rows": rows, "columns": columns}, DTYPE_NAMES[x.dtype]
    parameters = launch_config("gated_rms_norm", dims, dtype, x.device, default=DEFAULT_CONFIG, given=config)
    grid, block = (triton.cdiv(rows, parameters["ROWS"]),), triton.next_power_of_2(columns)
    gated_rms_norm_fwd[grid](x, gate, weight, y, EPS, rows, columns, BLOCK=block, **parameters)
    return y


def peer(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """What one would run without a kernel."""
    return F.rms_norm(x, x.shape[1:], weight, EPS) * F.silu(gate)


TO_TRY = [{"ROWS": rows, "num_warps": warps} for rows in (1, 2, 4) for warps in (4, 8, 16)]  # by `tune`
BACKENDS = (
    kernel_backend("triton", launch, configs=lambda _dims: TO_TRY),
    Backend("torch", no_setup(peer)),
    Backend("torch-compiled", compiled(peer), devices=("cuda",)),
)
OPERATION = Operation(
    name="gated_rms_norm",
    inputs=lambda d, randn: (randn(d["rows"], d["columns"]), randn(d["rows"], d["columns"]), randn(d["columns"])),
    reference=reference,
    flops=lambda d: 9.0 * d["rows"] * d["columns"],
    bytes=lambda d, item: item * (3.0 * d["rows"] * d["columns"] + d["columns"]),
    backends={"fp32": BACKENDS, "bf16": BACKENDS},
    is_matmul=False,  # so the copy's bandwidth is its ceiling
)
SMALL, LARGE = Shape("small", {"rows": 5, "columns": 300}), Shape("14b", {"rows": 12096, "columns": 5120})
CASES = [Case(OPERATION, shape, dtype, TOLERANCES[dtype]) for shape, dtype in ((SMALL, "fp32"), (LARGE, "bf16"))]
