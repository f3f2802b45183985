"""What a case is made of; see the package."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.tuning import LaunchConfig, TunedConfig, tuned_config
from model.config import PRECISIONS

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of a case's inputs
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}  # of its matrix operands
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-3, "fp8": 4e-2}  # relative Frobenius error of one operation
FP8_MAX = 448.0  # largest e4m3 value
PROMPT = 20  # tokens of a prompt like the published one
FP8_LEVELS = PRECISIONS["fp8-vae"].fp8_vae

Dims = Mapping[str, int]
Output = Tensor | tuple[Tensor, ...]
Call = Callable[[], Output]


@dataclass(frozen=True)
class Draw:
    """Makes random inputs: normal, never zeros. Without a generator, under a fake-tensor mode, it makes only shapes."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator | None = None

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values of deviation `scale`."""
        x = torch.randn(*shape, device=self.device, dtype=torch.float32, generator=self.generator)
        return (x * scale).to(dtype or self.dtype)


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation.

    `prepare(*inputs)` does what is done once (quantises weights, changes their layout) and returns the call that is
    timed. It may raise anything; an absent module named in `needs` is noted beforehand.
    """

    name: str
    prepare: Callable[..., Call]
    ours: bool = False
    devices: tuple[str, ...] = ("cuda", "cpu")
    needs: str | None = None
    # Of a Triton kernel: what the operation calls on CUDA tensors, for the audit; and for the tuner, the launch
    # parameters worth trying at given dimensions, any of which `prepare(*inputs, config=...)` takes.
    launcher: Callable[..., object] | None = None
    space: Callable[[Dims], Iterable[dict[str, Any]]] | None = None

    @property
    def installed(self) -> bool:
        """Whether what it needs can be imported."""
        if self.needs is None:
            return True
        try:
            return importlib.util.find_spec(self.needs) is not None
        except ModuleNotFoundError:  # the parent of a dotted name
            return False


@dataclass(frozen=True)
class Operation:
    """What is computed, and by whom."""

    name: str
    inputs: Callable[[Dims, Draw], tuple[Any, ...]]
    reference: Callable[..., Output]  # in the precision of its inputs
    flops: Callable[[Dims], float]
    bytes: Callable[[Dims, int], float]  # dimensions, bytes of a matrix operand
    backends: Mapping[str, Sequence[Backend]]  # dtype -> back-ends
    result: Callable[[Any], Output] = lambda output: output  # what of a back-end's output the reference is held to
    products: bool = True  # whether the FLOPs are matrix products, whose ceiling is measured
    tolerances: Mapping[str, float] = field(default_factory=dict)  # by dtype, where they are not those of TOLERANCES


@dataclass(frozen=True)
class Shape:
    """Named dimensions. `world` GPUs share the work, and one of them makes `calls` such calls in a chunk."""

    name: str
    dims: Dims
    world: int = 1
    calls: float = 0
    stage: str = ""  # of a chunk, that the calls are part of


@dataclass(frozen=True)
class Case:
    """An operation at a shape in a dtype."""

    operation: Operation
    shape: Shape
    dtype: str
    tolerance: float

    @property
    def name(self) -> str:
        """operation/shape/dtype."""
        return f"{self.operation.name}/{self.shape.name}/{self.dtype}"

    @property
    def flops(self) -> float:
        """Useful operations of one call."""
        return self.operation.flops(self.shape.dims)

    @property
    def bytes(self) -> float:
        """Least bytes of one call."""
        return self.operation.bytes(self.shape.dims, ITEM_BYTES[self.dtype])

    @property
    def backends(self) -> Sequence[Backend]:
        """Ours and the peers."""
        return self.operation.backends[self.dtype]

    def inputs(self, device: torch.device, generator: torch.Generator | None) -> tuple[Any, ...]:
        """Fresh random inputs."""
        return self.operation.inputs(self.shape.dims, Draw(device, TORCH_DTYPES[self.dtype], generator))

    def expected(self, inputs: tuple[Any, ...], precision: torch.dtype) -> Output:
        """The reference of these inputs, computed in `precision`."""
        wide = [x.to(precision) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        return self.operation.reference(*wide)


# On the CPU compilation takes seconds a shape; only passes over memory, which it fuses, are worth these.
ANYWHERE = ("cuda", "cpu")
CUDA = ("cuda",)


def once(function: Callable[..., Output]) -> Callable[..., Call]:
    """A `prepare` that has nothing to prepare."""
    return lambda *inputs: partial(function, *inputs)


def compiled(function: Callable[..., Output]) -> Callable[..., Call]:
    """A `prepare` that hands the function to torch.compile."""
    return lambda *inputs: partial(torch.compile(function, dynamic=False), *inputs)


def triton(dtype: str, launcher: Callable[..., Output], space: Callable[[Dims], Iterable[dict[str, Any]]]) -> Backend:
    """A Triton kernel by its launcher, which takes launch parameters. In float32 it is for tests, not to be audited."""

    def prepare(*inputs: Any, config: LaunchConfig | None = None) -> Call:
        return partial(launcher, *inputs, config=config)

    return Backend("triton", prepare, True, CUDA, None, launcher if dtype != "fp32" else None, space)


def eager_and_compiled(
    function: Callable[..., Output], devices: tuple[str, ...] = ("cuda",)
) -> tuple[Backend, Backend]:
    """The arithmetic of model/ as it is and, on some devices, as torch.compile makes it."""
    return Backend("eager", once(function), ours=True), Backend("compiled", compiled(function), devices=devices)


def choose(
    operation: str,
    form: str,
    dims: Dims,
    dtype: str,
    x: Tensor,
    config: LaunchConfig | None,
    match_exactly: Sequence[str] = (),
) -> TunedConfig:
    """One form of an operation on x's device, with those launch parameters, or else as it is tuned."""
    tuned = None if config else tuned_config(operation, dims, dtype, x.device, (form,), match_exactly)
    return tuned or TunedConfig(form, config or {})
