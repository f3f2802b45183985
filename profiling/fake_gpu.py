"""Compiles kernels for a GPU that is not there.

A launcher is called with fake tensors, which have shapes but no memory, while Triton's driver names a GPU. Triton then
compiles for that GPU instead of launching. The audit reads the result; `warm` fills Triton's cache with it.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.tuning import GPU, assume_gpu


@dataclass(frozen=True)
class KernelLaunch:
    """One kernel launch that was compiled but not executed."""

    kernel: str
    grid: tuple[int, ...]
    compiled: Any  # triton's CompiledKernel
    arguments: tuple[tuple[str, int], ...] = ()  # the integers among its arguments, by name


class CompileOnlyDriver:
    """Answers what Triton asks a driver about the GPU when it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        """The key of Triton's cache of compiled kernels; no real device has such a name."""
        return f"audit sm_{self.arch}"

    def get_current_stream(self, _device: object) -> int:
        """A stream that nothing is launched on."""
        return 0


class FakeCudaMode(TorchFunctionMode):
    """While this mode is on, "cuda" tensors can be created and computed with, without memory or a GPU.

    It is PyTorch's fake-tensor mode with one repair. Where PyTorch was built without CUDA, a few methods (indexing,
    `contiguous`) ask for the device and fail. They are called again on the "meta" tensors inside.
    """

    def __enter__(self) -> "FakeCudaMode":
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._fake.__exit__(*raised)

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, on the inner tensors if it fails for lack of CUDA."""
        try:
            return function(*args, **(kwargs or {}))
        except RuntimeError as error:
            if "not linked with support for cuda" not in str(error):
                raise
        with in_kernel_invocation_manager(self._fake):
            inner = function(*args, **(kwargs or {}))
        return FakeTensor(self._fake, inner, args[0].device) if isinstance(inner, Tensor) else inner


class LaunchRecorder:
    """The launches made during `record_launches`."""

    def __init__(self) -> None:
        self.launches: list[KernelLaunch] = []
        self.compiling = ""  # the kernel that is being compiled, if any


@contextlib.contextmanager
def record_launches(arch: int) -> Iterator[LaunchRecorder]:
    """While the body runs, Triton compiles launches for `arch` (90 is sm_90) and executes none."""
    compiler, recorder = CompileOnlyDriver(arch), LaunchRecorder()
    run, active = JITFunction.run, driver._active
    kernels: list[JITFunction[Any]] = []

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, **kwargs: Any) -> Any:
        kernels.append(self)
        recorder.compiling = self.__name__
        compiled = run(self, *args, grid=grid, **(kwargs | {"warmup": True}))
        bound = _bound(self, args, kwargs)
        whole = tuple((name, value) for name, value in bound.items() if type(value) is int)
        sizes: Any = grid(bound) if callable(grid) else grid
        recorder.launches.append(KernelLaunch(self.__name__, tuple(map(int, sizes)), compiled, whole))
        recorder.compiling = ""
        return compiled

    JITFunction.run = compile_only
    driver.set_active(cast(Any, compiler))
    try:
        yield recorder
    finally:
        JITFunction.run = run
        driver.set_active(cast(Any, active))
        for kernel in kernels:
            kernel.device_caches.pop(compiler.get_current_device(), None)


@contextlib.contextmanager
def compiling_for(gpu: GPU) -> Iterator[LaunchRecorder]:
    """While the body runs, whatever it launches on "cuda" tensors is compiled for `gpu`, quietly, and not executed."""
    quiet = contextlib.redirect_stdout(io.StringIO())  # Triton prints the whole PTX that ptxas rejects
    arch = int(gpu.capability.replace(".", ""))
    with record_launches(arch) as recorder, assume_gpu(gpu), FakeCudaMode(), warnings.catch_warnings(), quiet:
        warnings.simplefilter("ignore")  # a fake tensor warns whenever its address is read
        yield recorder


def _bound(kernel: JITFunction[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The launch's arguments by name, without options such as num_warps."""
    bound = kernel.signature.bind_partial(*args, **{k: v for k, v in kwargs.items() if k in kernel.arg_names})
    bound.apply_defaults()
    return bound.arguments
