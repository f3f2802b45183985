"""A model of Hopper for machines without one: Gluon kernels run on a CPU, and whatever is asynchronous happens late.

`fake_hopper` executes the Python source of a kernel with PyTorch tensors in place of Triton's. The partitions of
a program take turns. Before each operation on a barrier it is drawn, from a seed, which one goes on, or which copy
arrives; in half of the programs copies arrive only when nobody can go on without them. So a run finds what a GPU would
show only at times:

    a deadlock           no partition can go on, and no copy is on its way
    a missing wait       a tile in shared memory is NaN from the beginning of a copy until the copy arrives
    a missing release    an operand of a product, or the source of a store, changes before that has ended
    a missing fence      a store by TMA of what a partition wrote without a `fence_async_shared` of its own

Rounding is that of the kernel: products of 16 and of 8 bits are summed in float32, not as the tensor cores do. Layouts
are ignored, so that nothing is learned about registers or bank conflicts; the audit compiles the same source for that.
Only where a kernel sees shared memory as a tile of another shape, the swizzles must agree.
"""

import math
import random
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import constexpr
from triton.runtime.jit import JITFunction

from kernels import sm90
from kernels.common import FP8, FP8_MAX
from kernels.tuning import GPU, assume_gpu


@dataclass(frozen=True)
class ElementType:
    """The dtype of what is in memory, with what kernels ask of it."""

    dtype: torch.dtype

    @property
    def primitive_bitwidth(self) -> int:
        """Bits of an element."""
        return 8 * self.dtype.itemsize

    def __eq__(self, other: object) -> bool:
        return torch_dtype(other) == self.dtype

    def __hash__(self) -> int:
        return hash(self.dtype)


def torch_dtype(dtype: Any) -> Any:
    """The dtype of PyTorch that is meant."""
    return dtype.dtype if isinstance(dtype, ElementType) else dtype


class Value(Tensor):
    """A tensor or a number in registers, of which assignments such as `x += 1` leave other names alone."""

    @property
    def type(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The type of a tensor in Triton, whose layout is ignored."""
        return SimpleNamespace(layout=None)

    __iadd__, __isub__, __imul__ = Tensor.__add__, Tensor.__sub__, Tensor.__mul__
    __ixor__, __ior__, __iand__ = Tensor.__xor__, Tensor.__or__, Tensor.__and__

    def to(self, dtype: Any) -> "Value":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Converted to another dtype."""
        return value(self.as_subclass(Tensor).to(torch_dtype(dtype)))


def value(x: Any, dtype: torch.dtype | None = None) -> Value:
    """x, a tensor or a number, in registers."""
    return torch.as_tensor(x, dtype=dtype).as_subclass(Value)


@dataclass(frozen=True)
class Pointer:
    """An address in global memory, or a tensor of addresses."""

    base: Tensor
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        """As `pointer.dtype.element_ty` in a kernel."""
        return SimpleNamespace(element_ty=ElementType(self.base.dtype))

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.base, self.offset + offset)

    def memory(self) -> Tensor:
        """All elements from the base to the end of its storage."""
        elements = self.base.untyped_storage().nbytes() // self.base.itemsize - self.base.storage_offset()
        return self.base.as_strided((elements,), (1,))


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
    memory, at = pointer.memory(), torch.as_tensor(pointer.offset)
    mask, at = torch.broadcast_tensors(torch.as_tensor(True if mask is None else mask), at)
    at = torch.where(mask, at, 0)
    assert (at >= 0).all(), "a load before the beginning of its memory"
    return value(torch.where(mask, memory[at], other).to(memory.dtype))


def store(pointer: Pointer, x: Any, mask: Any = None) -> None:
    at, x = torch.broadcast_tensors(torch.as_tensor(pointer.offset), torch.as_tensor(x).as_subclass(Tensor))
    kept = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.as_tensor(mask).expand_as(at)
    at = at[kept].as_subclass(Tensor)
    assert (at >= 0).all(), "a store before the beginning of its memory"
    pointer.memory()[at] = x[kept].to(pointer.base.dtype)


# --- Shared memory and what is asynchronous -------------------------------------------------------------------------


@dataclass
class Barrier:
    """An mbarrier: a phase is over when all arrivals and bytes that it expects are there."""

    count: int
    arrivals: int = 0
    bytes: int = 0
    phases: int = 0

    def change(self, arrivals: int = 0, nbytes: int = 0) -> None:
        """Some arrive; or bytes are expected, or, if negative, have arrived."""
        self.arrivals += arrivals
        self.bytes += nbytes
        assert self.arrivals <= self.count, "more arrivals than a phase has"
        if self.arrivals == self.count and not self.bytes:
            self.arrivals, self.phases = 0, self.phases + 1

    def over(self, parity: int) -> bool:
        """Whether the last phase of that parity is over."""
        return self.phases % 2 != parity


SWIZZLE_ROWS = 8  # after so many rows, the pattern of a swizzle begins again


def swizzle(shape: Sequence[int], layout: Any) -> tuple[int, int]:
    """What says where the bytes of a tile are: the bytes of a swizzled row, and how many such rows are a panel.

    A tile with longer rows consists of several panels, one behind the other. Where there is one panel, its rows do not
    matter, and 0 stands for them.
    """
    width = max(layout.swizzle_byte_width, 16)
    panels = shape[-1] * layout.element_bitwidth // 8 // width
    return width, math.prod(shape[-layout.rank : -1]) if panels > 1 else 0


class Shared:
    """A tile in shared memory, or a stack of them; NaN at first."""

    def __init__(self, memory: Tensor, state: dict[Any, Any], layout: Any = None) -> None:
        self.memory, self.state, self.layout = memory, state, layout  # the state is common to all views

    @classmethod
    def new(cls, dtype: Any, shape: Sequence[int], layout: Any, program: "FakeProgram") -> "Shared":
        """A new allocation, filled with NaN, or with the least integer."""
        state = {"program": program, "unfenced": set()}
        shared = cls(torch.zeros([int(n) for n in shape], dtype=torch_dtype(dtype)), state, layout)
        shared.poison()
        return shared

    @property
    def dtype(self) -> ElementType:
        """The element type of the memory."""
        return ElementType(self.memory.dtype)

    @property
    def shape(self) -> list[int]:
        """The lengths of the axes."""
        return list(self.memory.shape)

    @property
    def place(self) -> tuple[int, tuple[int, ...]]:
        """The key of a tile: address and shape."""
        return self.memory.data_ptr(), tuple(self.memory.shape)

    def index(self, i: Any) -> "Shared":
        """Tile i."""
        assert 0 <= int(i) < len(self.memory)
        return Shared(self.memory[int(i)], self.state, self.layout)

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        """The part of `length` elements from `start` on."""
        return Shared(self.memory.narrow(dim, start, length), self.state)

    def permute(self, order: Sequence[int]) -> "Shared":
        """A view with permuted axes."""
        return Shared(self.memory.permute(*order), self.state)

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> "Shared":
        """A tile of any dtype and shape that begins where this one does, and may end behind it.

        One of the same dtype has the same contents: for that, the bytes must be swizzled alike.
        """
        dtype, shape = torch_dtype(dtype), [int(n) for n in shape]
        start, rest = divmod(self.memory.storage_offset() * self.memory.itemsize, dtype.itemsize)
        assert not rest, "a tile that begins within an element"
        if dtype == self.memory.dtype:
            assert swizzle(shape, layout) == swizzle(self.shape, self.layout), "a view with another swizzle"
            pattern = SWIZZLE_ROWS * swizzle(shape, layout)[0]
            assert start * dtype.itemsize % pattern == 0, "a view that begins within the pattern of its swizzle"
        whole = torch.empty(0, dtype=dtype).set_(self.memory.untyped_storage())
        return Shared(whole[start : start + math.prod(shape)].view(shape), self.state, layout)

    def bits(self) -> Tensor:
        """A copy of its bytes."""
        return self.memory.contiguous().view(torch.uint8).clone()

    def load(self, _layout: Any) -> Value:
        """Its contents."""
        return value(self.memory.clone())

    def store(self, x: Tensor) -> None:
        """Overwrites it, which TMA sees after a fence."""
        assert x.shape == self.memory.shape
        assert x.dtype == self.memory.dtype
        self.memory.copy_(x)
        self.state["unfenced"].add((id(self.state["program"].current), self.memory.data_ptr()))

    def poison(self) -> None:
        """Makes it NaN, or the least integer."""
        if self.memory.dtype == FP8:
            self.memory.view(torch.uint8).fill_(0x7F)
        else:
            floating = self.memory.is_floating_point()
            self.memory.fill_(torch.nan if floating else torch.iinfo(self.memory.dtype).min)


@dataclass(frozen=True)
class Descriptor:
    """A TMA descriptor of a tensor."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    layout: Any = None

    @property
    def dtype(self) -> ElementType:
        """The element type of the memory."""
        return ElementType(self.base.dtype)

    @property
    def block_type(self) -> Any:
        """Shape and bytes of a box."""
        return SimpleNamespace(shape=list(self.block), nbytes=math.prod(self.block) * self.base.itemsize)

    def box(self, coords: Sequence[Any]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of a box that lies in the tensor, and where in the box that is."""
        covered, inside = [], []
        for start, length, size in zip(map(int, coords), self.block, self.shape, strict=True):
            begin = max(start, 0)
            end = max(begin, min(start + length, size))
            covered.append(slice(begin, end))
            inside.append(slice(begin - start, end - start))
        return self.base.as_strided(self.shape, self.strides)[tuple(covered)], tuple(inside)


@dataclass
class Product:
    """A wgmma in flight: the product at its beginning, and what it reads from shared memory until it ends."""

    result: Tensor
    reads: list[tuple[Shared, Tensor]]

    @property
    def type(self) -> Any:
        """A type with a layout, as tensors in registers have."""
        return SimpleNamespace(layout=None)

    def end(self) -> Value:
        """The result; what it has read must not have changed."""
        for tile, bits in self.reads:
            assert torch.equal(tile.bits(), bits), "an operand of a product was overwritten while it was read"
        return value(self.result)


def taken_lock() -> threading.Lock:
    """A lock that the next one who wants it waits for."""
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass
class Partition:
    """One partition of a program, in a thread that goes on when it is told to."""

    work: Callable[[], None]
    ready: Callable[[], bool] = lambda: True
    turn: threading.Lock = field(default_factory=taken_lock)
    products: list[Product] = field(default_factory=list)  # in flight, the oldest first
    stores: list[tuple[Shared, Tensor, Callable[[], None]]] = field(default_factory=list)  # by TMA, in flight
    over: bool = False
    error: BaseException | None = None


class Stopped(BaseException):
    """Ends a partition after an error in another one."""


class FakeProgram:
    """One program of a kernel on a multiprocessor, and the operations of Gluon that its partitions call."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.program, self.programs, self.random = program, programs, random.Random(seed)
        self.late = self.random.random() < 0.5  # whether copies arrive only when no partition can go on
        self.barriers: dict[Any, Barrier] = {}
        self.tiles: list[Shared] = []
        self.copies: list[Callable[[], None]] = []  # on their way
        self.current: Partition | None = None
        self.yielded = taken_lock()
        self.stopping = False

    # --- Taking turns ---

    def specialize(self, functions: Sequence[tuple[Callable[..., None], Sequence[Any]]], *_: Any) -> None:
        """Runs all partitions until they have ended."""
        partitions = [Partition(lambda function=f, arguments=a: function(*arguments)) for f, a in functions]
        for partition in partitions:
            threading.Thread(target=self._run, args=(partition,), daemon=True).start()
        try:
            while waiting := [p for p in partitions if not p.over]:
                able = [p for p in waiting if p.ready()]
                choices = able if able and self.late else [*able, *range(len(self.copies))]
                assert choices, f"deadlock: {len(waiting)} partitions wait for barriers for ever"
                choice = self.random.choice(choices)
                if isinstance(choice, int):
                    self.copies.pop(choice)()
                else:
                    self._resume(choice)
        finally:
            self.stopping = True
            for partition in partitions:
                if not partition.over:
                    self._resume(partition)
        assert not self.copies, "copies into shared memory that nobody waits for"

    def _run(self, partition: Partition) -> None:
        partition.turn.acquire()
        try:
            if not self.stopping:
                partition.work()
                assert not partition.stores, "the program ends while a store reads its shared memory"
        except Stopped:
            pass
        except BaseException as error:
            partition.error = error
        partition.over = True
        self.yielded.release()

    def _resume(self, partition: Partition) -> None:
        self.current = partition
        partition.turn.release()
        self.yielded.acquire()
        if partition.error is not None:
            raise partition.error

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Lets others go on, at least until `ready` is true."""
        partition = self.current
        if partition is None:  # before the partitions begin
            assert ready()
            return
        partition.ready = ready
        self.yielded.release()
        partition.turn.acquire()
        if self.stopping:
            raise Stopped

    # --- Barriers ---

    def init(self, bar: Shared, count: int) -> None:
        self.barriers[bar.place] = Barrier(count)

    def wait(self, bar: Shared, phase: Any) -> None:
        barrier, parity = self.barriers[bar.place], int(phase)
        self.wait_until(lambda: barrier.over(parity))

    def arrive(self, bar: Shared, *, pred: Any = True) -> None:
        self.wait_until(lambda: True)
        if bool(pred):
            self.barriers[bar.place].change(arrivals=1)

    def expect(self, bar: Shared, nbytes: int) -> None:
        self.wait_until(lambda: True)
        self.barriers[bar.place].change(nbytes=nbytes)
        self.barriers[bar.place].change(arrivals=1)

    # --- TMA ---

    def copy_to_shared(self, desc: Descriptor, coords: Sequence[Any], bar: Shared, tile: Shared) -> None:
        assert tuple(tile.memory.shape) == desc.block
        part, inside = desc.box(coords)
        tile.poison()

        def arrives() -> None:
            tile.memory.zero_()
            tile.memory[inside] = part
            self.barriers[bar.place].change(nbytes=-desc.block_type.nbytes)

        self.copies.append(arrives)

    def copy_to_global(self, desc: Descriptor, coords: Sequence[Any], tile: Shared) -> None:
        unfenced = {address for _partition, address in tile.state["unfenced"]}
        assert tile.memory.data_ptr() not in unfenced, "stored by TMA without a fence"
        part, inside = desc.box(coords)

        def arrives() -> None:
            part.copy_(tile.memory[inside])

        assert self.current is not None
        self.current.stores.append((tile, tile.bits(), arrives))

    def store_wait(self, pending: int) -> None:
        assert self.current is not None
        stores = self.current.stores
        while len(stores) > pending:
            tile, bits, arrives = stores.pop(0)
            assert torch.equal(tile.bits(), bits), "the source of a store was overwritten while it was read"
            arrives()

    def fence(self) -> None:
        for tile in self.tiles:
            tile.state["unfenced"] = {written for written in tile.state["unfenced"] if written[0] != id(self.current)}

    # --- Products ---

    def mma(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        assert self.current is not None
        tiles = [x for x in (a, b) if isinstance(x, Shared)]
        left, right = (x.memory if isinstance(x, Shared) else x.as_subclass(Tensor) for x in (a, b))
        assert left.dtype == right.dtype
        wide = torch.int32 if left.dtype == torch.int8 else torch.float32
        result = (left.to(wide) @ right.to(wide)).to(wide)
        reads = [(tile, tile.bits()) for tile in tiles]
        if isinstance(acc, Product):
            acc = acc.result
        if use_acc:
            result = acc.as_subclass(Tensor) + result
        product = Product(result, reads)
        self.current.products.append(product)
        return product

    def mma_wait(self, pending: int, deps: Sequence[Product]) -> Any:
        self.wait_until(lambda: True)
        assert self.current is not None
        products = self.current.products
        over = [products.pop(0) for _ in range(len(products) - pending)]
        for product in over:
            product.end()
        results = tuple(dep if any(dep is product for product in products) else dep.end() for dep in deps)
        return results[0] if len(results) == 1 else results

    def allocate(self, dtype: Any, shape: Sequence[int], layout: Any = None) -> Shared:
        self.tiles.append(Shared.new(dtype, shape, layout, self))
        return self.tiles[-1]


# --- The language ---------------------------------------------------------------------------------------------------


def exp2(x: Tensor) -> Value:
    """2^x, with denormal results as zero."""
    y = torch.exp2(x)
    return value(torch.where(y < torch.finfo(torch.float32).tiny, 0.0, y))


def to_e4m3(x: Tensor) -> Value:
    """x rounded to e4m3, saturating."""
    return value(x.as_subclass(Tensor).clamp(-FP8_MAX, FP8_MAX).to(FP8))


def split_columns(x: Tensor) -> tuple[Value, ...]:
    """The left and the right half of the columns."""
    return tuple(value(half.clone()) for half in x.chunk(2, 1))


def default_layout(shape: Sequence[int], dtype: Any) -> Any:
    """The layout in shared memory of a tile of that shape."""
    return sm90.smem_layout(tuple(shape), torch_dtype(dtype))


def language(program: FakeProgram) -> SimpleNamespace:
    """What kernels call `gl`."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return SimpleNamespace(
        constexpr=lambda x: x, static_range=range, convert_layout=lambda x, *_, **__: x, thread_barrier=nothing,
        NVMMADistributedLayout=nothing, SliceLayout=nothing, DotOperandLayout=nothing,
        float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16, int32=torch.int32, int64=torch.int64,
        int8=torch.int8, float8e4nv=FP8,
        program_id=lambda _axis: value(program.program), num_programs=lambda _axis: value(program.programs),
        arange=lambda start, end, *_: value(torch.arange(start, end)),
        full=lambda shape, x, dtype, *_: value(torch.full([int(n) for n in shape], x, dtype=dtype)),
        zeros=lambda shape, dtype, *_: value(torch.zeros([int(n) for n in shape], dtype=dtype)),
        zeros_like=lambda x: value(torch.zeros_like(x)),
        where=lambda mask, x, y: value(torch.where(torch.as_tensor(mask), torch.as_tensor(x), torch.as_tensor(y))),
        maximum=lambda x, y: value(torch.maximum(*map(torch.as_tensor, (x, y)))),
        minimum=lambda x, y: value(torch.minimum(*map(torch.as_tensor, (x, y)))),
        max=lambda x, axis: value(x.amax(axis)), sum=lambda x, axis: value(x.sum(axis)),
        log2=lambda x: value(torch.log2(x)), exp2=lambda x: value(torch.exp2(x)), cdiv=lambda x, y: -(-x // y),
        exp=torch.exp, sqrt=torch.sqrt, NVMMASharedLayout=SimpleNamespace(get_default_for=default_layout),
        load=load, store=store, allocate_shared_memory=program.allocate, warp_specialize=program.specialize,
    )  # fmt: skip


def namespace(module: ModuleType, program: FakeProgram) -> dict[str, Any]:
    """The globals of a kernel's module with its device functions and Gluon's replaced by those of the model."""
    own = module.__dict__ if module is sm90 else {**sm90.__dict__, **module.__dict__}
    names = dict(own)
    for name, x in own.items():
        if isinstance(x, constexpr):
            names[name] = x.value
        elif isinstance(x, JITFunction):
            function = x.fn
            names[name] = types.FunctionType(
                function.__code__, names, name, function.__defaults__, function.__closure__
            )
        elif getattr(x, "__triton_aggregate__", False):
            names[name] = _aggregate(x)
    names |= {
        "gl": language(program), "exp2": exp2, "tanh": torch.tanh, "to_e4m3_x4": to_e4m3,
        "split_columns": split_columns, "thread_barrier": lambda: None, "fence_async_shared": program.fence,
        "warpgroup_mma": program.mma, "warpgroup_mma_wait": program.mma_wait,
        "mbarrier": SimpleNamespace(
            init=program.init, wait=program.wait, arrive=program.arrive, expect=program.expect,
            MBarrierLayout=lambda: None,
        ),
        "tma": SimpleNamespace(
            async_copy_global_to_shared=program.copy_to_shared, async_copy_shared_to_global=program.copy_to_global,
            store_wait=program.store_wait,
        ),
    }  # fmt: skip
    return names


def _aggregate(aggregate: Any) -> Callable[..., SimpleNamespace]:
    """Makes what stands for an aggregate, with the fields that its constructor sets."""
    init = aggregate.hash_attrs[0]
    function = getattr(init, "fn", init)

    def construct(*values: Any) -> SimpleNamespace:
        fields = SimpleNamespace()
        function(fields, *values)
        return SimpleNamespace(**{k: x.value if isinstance(x, constexpr) else x for k, x in vars(fields).items()})

    return construct


def argument(x: Any) -> Any:
    """An argument of a launch as the kernel sees it."""
    if isinstance(x, TensorDescriptor):
        shape, strides, block = (tuple(map(int, numbers)) for numbers in (x.shape, x.strides, x.block_shape))
        return Descriptor(x.base, shape, strides, block, x.layout)
    if isinstance(x, Tensor):
        return Pointer(x)
    return None if x is None else value(x, torch.float32 if isinstance(x, float) else None)


class FakeKernel:
    """Stands in for a kernel: a launch runs its programs one after another."""

    def __init__(self, module: ModuleType, name: str, seed: int) -> None:
        self.module, self.name, self.seed = module, name, seed
        self.function = getattr(module, name).fn
        self.launches = 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        code, annotations = self.function.__code__, self.function.__annotations__
        names = code.co_varnames[: code.co_argcount]
        constants = {name for name, kind in annotations.items() if "constexpr" in str(kind)}

        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches += 1
            given = dict(zip(names, args, strict=False)) | kwargs
            values = {name: x if name in constants else argument(x) for name, x in given.items() if name in names}
            for i in range(grid[0]):
                program = FakeProgram(i, grid[0], self.seed + i)
                types.FunctionType(code, namespace(self.module, program))(**values)

        return launch


@contextmanager
def fake_hopper(module: ModuleType, kernel: str, multiprocessors: int, seed: int) -> Iterator[FakeKernel]:
    """While the body runs, the kernel of that name runs on a model of Hopper with so many multiprocessors.

    Its launcher is called on CPU tensors. `seed` decides in which order partitions go on and copies arrive.
    """
    fake = FakeKernel(module, kernel, seed)
    with mock.patch.object(module, kernel, fake), assume_gpu(GPU("a model of Hopper", "9.0", multiprocessors)):
        yield fake
