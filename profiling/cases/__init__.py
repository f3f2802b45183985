"""Every benchmark case, once: for the command line, pytest-benchmark, the audit, the tuner and the GPU phases alike.

A *case* is an operation at a named shape in a dtype: `chunk_attention/14b-w8/bf16` is the self-attention of one of 8
GPUs that share flashtalk-14b. It knows how its inputs are made, what the right answer is, how many operations and
bytes it needs by formula, and which back-ends compute it: ours (what model/ runs) and *peers* (what a user would run
instead).

    Operation   inputs, reference, FLOPs, bytes, back-ends by dtype
    Shape       name, dimensions, GPUs that share the work, calls a chunk
    Case        an operation at a shape in a dtype; `registry` makes them all

Dimensions come from the model's configuration. A dtype is what matrix products run in: "fp8" cases take bf16 inputs and
are held to the same float reference. FLOPs count a multiply-add as 2; bytes count each operand and result once, those
of products in the case's dtype, the stream between them in at least 16 bits.
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
    once,
)
from profiling.cases.registry import FAMILIES, Family, chosen, own_cases, registry, select

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
    "chosen",
    "once",
    "own_cases",
    "registry",
    "select",
]
