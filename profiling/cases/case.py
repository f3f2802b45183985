"""The dataclasses that describe a case, and helpers to write its back-ends; the package explains the terms."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.tuning import LaunchConfig, TunedConfig, tuned_config
from model.config import FP8_CAPABILITY, PRECISIONS
from profiling.results import CaseResult, Measurement

TORCH_DTYPES = {"fp32": torch.float32, **dict.fromkeys(("bf16", "fp8", "int8"), torch.bfloat16)}  # of a case's inputs
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1}  # of an element of its matrix operands
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-3, "fp8": 4e-2, "int8": 2e-2}  # default bounds of the relative Frobenius error
PROMPT_TOKENS = 20  # text tokens before the padding; the published example prompt has about as many
FP8_LEVELS = PRECISIONS["fp8-vae"].fp8_vae

Dims = Mapping[str, int]
Output = Tensor | tuple[Tensor, ...]
Call = Callable[[], Output]


@dataclass(frozen=True)
class InputFactory:
    """Makes normally distributed inputs, on the case's device and in its dtype unless told otherwise.

    The audit passes no generator: its inputs are fake tensors, which have shapes but no values.
    """

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator | None = None

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of that shape, of mean 0 and standard deviation `scale`."""
        x = torch.randn(*shape, device=self.device, dtype=torch.float32, generator=self.generator)
        return (x * scale).to(dtype or self.dtype)


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation: a kernel of ours, or what a user would run instead.

    Attributes:
        name: under which results, targets and tuned tables know it.
        prepare: called once with the case's inputs. It does the work that does not count, such as quantising weights
            or changing their layout, and returns the call that is checked and timed. It may raise anything.
        ours: whether model/ runs it; all others are peers.
        devices: the device types that it runs on.
        needs: a module that must be importable, or else it is reported as not installed.
        launcher: of a Triton kernel, what the operation calls on CUDA tensors. The audit compiles what it launches.
        configs: the launch parameters worth trying at given dimensions, for the tuner. `prepare(*inputs, config=...)`
            and `launcher(*inputs, config=...)` must accept each of them.
        gluon: whether its kernel is written in Gluon, which Triton's interpreter cannot run.
    """

    name: str
    prepare: Callable[..., Call]
    _: KW_ONLY
    ours: bool = False
    devices: tuple[str, ...] = ("cuda", "cpu")
    needs: str | None = None
    launcher: Callable[..., object] | None = None
    configs: Callable[[Dims], Iterable[dict[str, Any]]] | None = None
    gluon: bool = False

    @property
    def installed(self) -> bool:
        """Whether the module it needs can be imported."""
        if self.needs is None:
            return True
        try:
            return importlib.util.find_spec(self.needs) is not None
        except ModuleNotFoundError:  # the parent of a dotted name
            return False


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A computation, the right answer, its cost by formula, and the back-ends that compute it.

    Attributes:
        name: of the operation in kernels/, also in tuned tables.
        inputs: the arguments of a call at given dimensions.
        reference: the right answer, computed in the precision of the inputs it gets.
        flops: useful floating-point operations of one call; a multiply-add counts as 2.
        bytes: least bytes of one call, by dimensions and by bytes of an element of a matrix operand.
        backends: by dtype, in the order in which they are shown.
        result: the part of a back-end's output that is held to the reference.
        is_matmul: whether the FLOPs are those of matrix products, whose ceiling is measured.
        tolerances: bounds of the relative error by dtype, where `TOLERANCES` does not suit.
    """

    name: str
    inputs: Callable[[Dims, InputFactory], tuple[Any, ...]]
    reference: Callable[..., Output]
    flops: Callable[[Dims], float]
    bytes: Callable[[Dims, int], float]
    backends: Mapping[str, Sequence[Backend]]
    result: Callable[[Any], Output] = lambda output: output
    is_matmul: bool = True
    tolerances: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """Named dimensions of an operation's inputs, and how often a chunk needs them."""

    name: str
    dims: Dims
    world: int = 1  # GPUs that share the work; the dimensions are one rank's
    calls: float = 0  # by one rank in one chunk, about; 0 where other cases already count this work


@dataclass(frozen=True)
class Case:
    """An operation at a shape in a dtype."""

    operation: Operation
    shape: Shape
    dtype: str
    tolerance: float  # of the relative Frobenius error

    @property
    def name(self) -> str:
        """Its unique name, operation/shape/dtype."""
        return f"{self.operation.name}/{self.shape.name}/{self.dtype}"

    @property
    def flops(self) -> float:
        """Useful floating-point operations of one call."""
        return self.operation.flops(self.shape.dims)

    @property
    def bytes(self) -> float:
        """Least bytes of one call."""
        return self.operation.bytes(self.shape.dims, ITEM_BYTES[self.dtype])

    @property
    def backends(self) -> Sequence[Backend]:
        """Ours and the peers."""
        return self.operation.backends[self.dtype]

    def lacks(self, backend: Backend, kind: str, capability: str | None) -> str:
        """Why a back-end cannot run on such a device, "cpu" or a GPU of this compute capability; empty if it can.

        Gluon kernels are for Hopper; of ours in FP8, none is for a GPU without e4m3.
        """
        if kind not in backend.devices:
            return f"not for {kind}"
        if capability is None:
            return ""
        has_fp8 = tuple(map(int, capability.split("."))) >= FP8_CAPABILITY
        if (backend.gluon and capability != "9.0") or (backend.ours and self.dtype == "fp8" and not has_fp8):
            return f"not for compute capability {capability}"
        return ""

    def inputs(self, device: torch.device, generator: torch.Generator | None) -> tuple[Any, ...]:
        """Fresh random inputs."""
        return self.operation.inputs(self.shape.dims, InputFactory(device, TORCH_DTYPES[self.dtype], generator))

    def expected(self, inputs: tuple[Any, ...], precision: torch.dtype) -> Output:
        """The right answer for these inputs, computed in `precision`."""
        wide = [x.to(precision) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        return self.operation.reference(*wide)

    def result(self, measurements: tuple[Measurement, ...]) -> CaseResult:
        """The case as results files describe it, with these measurements."""
        shape = self.shape
        return CaseResult(
            self.name,
            self.operation.name,
            shape.name,
            self.dtype,
            self.flops,
            self.bytes,
            shape.world,
            shape.calls,
            self.operation.is_matmul,
            dict(shape.dims),
            measurements,
        )


# Compiling for a CPU takes seconds a shape. It pays off for elementwise passes, which are fused: these are compiled
# ANYWHERE, all others only on CUDA.
ANYWHERE = ("cuda", "cpu")
CUDA = ("cuda",)


def no_setup(function: Callable[..., Output]) -> Callable[..., Call]:
    """A `prepare` with nothing to set up: the timed call is the function on the inputs as they are."""
    return lambda *inputs: partial(function, *inputs)


def compiled(function: Callable[..., Output]) -> Callable[..., Call]:
    """A `prepare` that compiles the function with torch.compile."""
    return lambda *inputs: partial(torch.compile(function, dynamic=False), *inputs)


def kernel_backend(
    name: str,
    launcher: Callable[..., Output],
    configs: Callable[[Dims], Iterable[dict[str, Any]]] | None = None,
    operands: Callable[..., tuple[Any, ...]] = lambda *inputs: inputs,
    empty_operands: Callable[..., tuple[Any, ...]] | None = None,
    audited: bool = True,
) -> Backend:
    """The back-end of a kernel of ours whose launcher takes operands and `config`.

    `operands` makes them of the case's inputs, before the timed call. `empty_operands` makes tensors like them where
    `operands` reads values, which the audit's inputs lack.
    """

    def prepare(*inputs: Any, config: LaunchConfig | None = None) -> Call:
        return partial(launcher, *operands(*inputs), config=config)

    def launch(*inputs: Any, config: LaunchConfig | None = None) -> Output:
        return launcher(*(empty_operands or operands)(*inputs), config=config)

    audit = launch if audited else None
    return Backend(name, prepare, ours=True, devices=CUDA, launcher=audit, configs=configs, gluon=name == "gluon")


def kernel_and_library(
    public: Callable[..., Output],
    launcher: Callable[..., Output],
    configs: Callable[[Dims], Iterable[dict[str, Any]]],
    library: Callable[..., Output],
    name: str = "torch",
    compiled_on: tuple[str, ...] = ANYWHERE,
) -> dict[str, tuple[Backend, ...]]:
    """The back-ends of an operation with one Triton kernel, in float32 and bfloat16.

    The operation itself on a CPU, its kernel on a GPU, and as peers `library`, called `name`, as it is and compiled.
    Float32 is for tests, and no GPU runs it: it is not audited.
    """
    return {
        dtype: (
            Backend("eager", no_setup(public), ours=True, devices=("cpu",)),
            kernel_backend("triton", launcher, configs, audited=dtype != "fp32"),
            Backend(name, no_setup(library)),
            Backend(f"{name}-compiled", compiled(library), devices=compiled_on),
        )
        for dtype in ("fp32", "bf16")
    }


def eager_and_compiled(
    function: Callable[..., Output], devices: tuple[str, ...] = ("cuda",)
) -> tuple[Backend, Backend]:
    """Our function as it is, and compiled on the given devices."""
    return Backend("eager", no_setup(function), ours=True), Backend("compiled", compiled(function), devices=devices)


def resolve_config(
    operation: str,
    backend: str,
    dims: Dims,
    dtype: str,
    x: Tensor,
    config: LaunchConfig | None,
    match_exactly: Sequence[str] = (),
) -> TunedConfig:
    """The configuration that one back-end is launched with on x's device.

    It has the launch parameters `config` if there are any, else those in the tuned table, else the kernel's own.
    """
    tuned = None if config else tuned_config(operation, dims, dtype, x.device, (backend,), match_exactly)
    return tuned or TunedConfig(backend, config or {})
