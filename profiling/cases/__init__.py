"""The benchmark cases: defined once, then checked, timed, audited, tuned, compared and drawn.

A *case* is an operation at a named shape in a dtype: `chunk_attention/14b-w8/bf16` is the self-attention of one of 8
GPUs that share flashtalk-14b. It knows how its inputs are made, what the right answer is, how many operations and
bytes it needs by formula, and which back-ends compute it: ours (what model/ runs) and *peers* (what a user would run
instead).

    Operation   inputs, reference, FLOPs, bytes, back-ends by dtype
    Shape       name, dimensions, GPUs that share the work, calls in a chunk
    Case        an operation at a shape in a dtype; `registry` makes them all

Dimensions come from the model's configuration. A dtype is that of the matrix products: "fp8" cases take bf16 inputs and
are held to the same float reference. FLOPs count a multiply-add as 2. Bytes count each operand and result once: matrix
operands in the case's dtype, the residual stream in at least 16 bits.

Adding an operation takes five files; docs/adding-an-operation.md walks through an example:

    kernels/NAME.py                     reference, kernel, launcher, custom op, public function
    tests/kernels/test_NAME.py          the operation on a CPU, as torch sees it, and on a GPU
    tests/kernels/interpreted/NAME.py   the kernel in Triton's interpreter
    profiling/cases/KIND.py             an `Operation` with our back-ends and their peers
    profiling/cases/shapes.py           the shapes that a preset needs, and their calls in a chunk

Bounds on its registers and spills (budgets.toml) and goals for its speed (targets.toml) are optional.
"""

from profiling.cases.case import (
    TOLERANCES,
    TORCH_DTYPES,
    Backend,
    Call,
    Case,
    Dims,
    Operation,
    Output,
    Shape,
    compiled,
    kernel_backend,
    no_setup,
)
from profiling.cases.registry import FAMILIES, Family, load_cases, registry, requested_cases, select

__all__ = [
    "FAMILIES",
    "TOLERANCES",
    "TORCH_DTYPES",
    "Backend",
    "Call",
    "Case",
    "Dims",
    "Family",
    "Operation",
    "Output",
    "Shape",
    "compiled",
    "kernel_backend",
    "load_cases",
    "no_setup",
    "registry",
    "requested_cases",
    "select",
]
