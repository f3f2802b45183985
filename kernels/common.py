"""What every operation of kernels/ is built from: dtypes, e4m3 rounding, argument checks, and `torch.library` ops.

An operation's file is ordered: reference (the definition, in PyTorch), kernel, launcher, op, public function. The op is
one node to `torch.compile`; `define_op` makes it from a CPU and a CUDA implementation with the same signature. The
public function checks its arguments with `check` and calls the op.
"""

import functools
import importlib.util
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.errors import CompilationError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest finite e4m3 value
INT8_MAX = 127.0  # of symmetric int8, which leaves -128 out
MIN_SCALE = 1e-12  # the smallest quantisation scale, so that rows of zeros can be divided by theirs
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}  # as in cases and tuned tables
QUANTIZED_NAMES = {FP8: "fp8", torch.int8: "int8"}  # of operands with scales

P = ParamSpec("P")
T = TypeVar("T")
Layout = Literal["rows", "tokens", "contiguous", "channels_last"]

OPS: dict[str, "Op"] = {}  # all operations that `define_op` has made, by name


@triton.jit
def to_e4m3(x, out):
    """x in the dtype that `out` points to, after clamping it to the range of e4m3."""
    return tl.clamp(x, -448.0, 448.0).to(out.dtype.element_ty)


@triton.jit
def e4m3_scale(largest):
    """The quantisation scale of values of at most `largest` in magnitude: `largest` / 448, and at least 1e-12."""
    return tl.maximum(largest / 448.0, 1e-12)


@functools.cache
def installed(module: str) -> bool:
    """Whether a module can be imported, which may be inside a package that is not there."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package
        return False


def without_autocast(implementation: Callable[P, T]) -> Callable[P, T]:
    """The implementation with the same results under `torch.autocast`, which would change dtypes inside it."""

    @functools.wraps(implementation)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):  # 1 us; disabling takes 16 us
            return implementation(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return implementation(*args, **kwargs)

    return run


def explaining_missing_fp8(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation, with one line of error in place of Triton's where a GPU lacks e4m3, as an A100 does."""

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        try:
            return implementation(*args)
        except CompilationError as error:
            reason: BaseException = error
            while reason.__cause__ is not None:
                reason = reason.__cause__
            if "fp8e4nv not supported" not in str(reason):
                raise
            raise ValueError(
                f"{name}: e4m3, which GPUs multiply from compute capability 8.9 on, not this one"
            ) from None

    return run


class Op:
    """A `torch.library` operation `flashtalk::NAME`: one node to `torch.compile`, without a gradient."""

    def __init__(
        self,
        name: str,
        cpu: Callable[..., Any],
        cuda: Callable[..., Any],
        fake: Callable[..., Any] | None,
        mutates_args: Sequence[str],
    ) -> None:
        self.name = name
        self.cpu, self.cuda, self.fake = map(without_autocast, (cpu, explaining_missing_fp8(name, cuda), fake or cpu))
        self.library_op = torch.library.custom_op(
            f"flashtalk::{name}", self.cpu, mutates_args=mutates_args, device_types="cpu"
        )
        self.library_op.register_kernel("cuda")(self.cuda)
        self.library_op.register_fake(self.fake)

    def __call__(self, *args: Any) -> Any:
        """Runs the implementation for the tensors' device."""
        return self.library_op(*args)


def define_op(
    name: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    mutates_args: Sequence[str] = (),
) -> Op:
    """Registers the op `flashtalk::NAME`, with the schema that the annotations of `cpu` give.

    Args:
        name: the public function's name.
        cpu: the implementation for CPU tensors. Its results must not alias its arguments.
        cuda: the implementation for CUDA tensors, with the same arguments, and results of the same shapes, dtypes and
            strides.
        fake: returns results without values under `FakeTensorMode`. None uses `cpu`; pass another where `cpu` reads
            values, makes tensors from host data, or costs too much to trace.
        mutates_args: the arguments that are written to.

    Returns:
        The operation, to be called with positional arguments.
    """
    OPS[name] = Op(name, cpu, cuda, fake, mutates_args)
    return OPS[name]


def check(
    name: str,
    x: Tensor,
    *,
    shape: Sequence[int | str] | None = None,
    dtype: torch.dtype | Collection[torch.dtype] | None = None,
    device: torch.device | None = None,
    layout: Layout | None = None,
) -> None:
    """Raises a one-line ValueError that begins with `name` unless x is as described and requires no gradient.

    Args:
        name: the argument's name in the caller's signature.
        x: the tensor.
        shape: a number fixes the length of an axis; a word stands for any length of at least 1, as in
            `("tokens", heads, head_dim)`.
        dtype: the allowed dtype, or several.
        device: the device that x must be on.
        layout: "rows" is stride 1 along the last axis; "tokens" is contiguous memory of every x[i]; "contiguous" is
            row-major; "channels_last" is `torch.channels_last` of [frame, channel, row, column].
    """
    if shape is not None and not _fits(x.shape, shape):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: shape {list(x.shape)}, wanted [{wanted}]")
    if dtype is not None:
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if x.dtype not in allowed:
            raise ValueError(f"{name}: {x.dtype}, wanted {' or '.join(map(str, allowed))}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: on {x.device}, wanted {device}")
    if layout is not None and not _laid_out(x, layout):
        raise ValueError(f"{name}: strides {x.stride()} for shape {list(x.shape)}, wanted {_LAYOUTS[layout]}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, and there is none: use torch.no_grad()")


def _fits(actual: Sequence[int], wanted: Sequence[int | str]) -> bool:
    return len(actual) == len(wanted) and all(
        length >= 1 if isinstance(want, str) else length == want for length, want in zip(actual, wanted, strict=True)
    )


_LAYOUTS = {
    "rows": "stride 1 along the last axis",
    "tokens": "contiguous memory of each token",
    "contiguous": "contiguous memory",
    "channels_last": "channels-last memory",
}


def _laid_out(x: Tensor, layout: Layout) -> bool:
    if layout == "rows":
        return not x.ndim or x.shape[-1] <= 1 or x.stride(-1) == 1
    if layout == "tokens":
        return x[0].is_contiguous()
    return x.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
