"""What a kernel's TTGIR says: the work of one pass of its main loop, and two silent miscompilations.

TTGIR is the last representation in which Triton still has tiles: a matrix product is one operation with the shapes of
its operands. It is read by Triton's own parser (`triton._C`, which is not a public interface; `make test` shows when it
changes).

`execution.py` evaluates masks, branches and trip counts. Bytes count where masks let them through; arithmetic is done
on the whole tile.

*Main loop*: the one with most FLOPs among the innermost loops around matrix products. In a warp-specialised kernel each
partition has its own copy of the loop (loads in one, products in another). These copies are recognised by their place
among the loops of their partition, and count as one loop. Where the loads' partition has other loops, the loads of a
pass are not known. Products outside of any loop form one pass with everything
else outside of loops. Operations under a condition (`scf.if`) that contains no product are left out, since not every
pass executes them.

A kernel without products is one pass from end to end: that of an average program, with all iterations of its loops and
the branches that it takes. Where these depend on loaded values, there is no model.
"""

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import prod
from pathlib import Path
from types import MappingProxyType

from triton._C.libtriton import ir, nvidia

from profiling.audit.execution import by_name, executions

LOOPS = ("scf.for", "scf.while")
PARTITIONS = ("ttg.warp_specialize", "ttg.warp_specialize.partitions")
COMBINES = ("tt.reduce", "tt.scan")
DOTS = ("tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma", "ttng.tc_gen5_mma_scaled")
TMA_LOADS = ("ttng.async_tma_copy_global_to_local", "ttng.async_tma_gather")
TMA_STORES = ("ttng.async_tma_copy_local_to_global", "ttng.async_tma_scatter", "ttng.async_tma_reduce")
LOADS = ("tt.load", "ttg.async_copy_global_to_local")
STORES = ("tt.store", "tt.atomic_rmw")
MUFU = (
    *("math.exp", "math.exp2", "math.log", "math.log2", "math.sqrt", "math.rsqrt", "math.sin", "math.cos"),
    *("math.tanh", "arith.divf", "tt.precise_divf", "tt.precise_sqrt"),
)
MUFU_PTX = re.compile(r"\b(ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh)\.approx")  # in inline assembly
ADDS = ("arith.addf", "arith.subf")
FP32 = (*ADDS, "arith.mulf", "arith.maxnumf", "arith.minnumf", "arith.maximumf", "arith.minimumf", "math.fma")
WORK = (*DOTS, *COMBINES, *TMA_LOADS, *TMA_STORES, *LOADS, *STORES, *MUFU, *FP32)  # what the model counts
DTYPES = {"bf16": "bf16", "f16": "fp16", "f32": "tf32", "f8E4M3FN": "fp8", "f8E5M2": "fp8", "i8": "int8"}

TILE = re.compile(r"(?:tensor|memdesc)<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)")


@dataclass(frozen=True)
class Scope:
    """A region around an operation, and the operation that the region belongs to."""

    name: str
    operation: int  # its index in the walk
    region: int


@dataclass(frozen=True)
class Op:
    """One operation of the TTGIR."""

    name: str
    operands: tuple[str, ...]  # types
    results: tuple[str, ...]
    reads: tuple[int, ...]  # operands and results, as value ids
    makes: tuple[int, ...]
    assembly: str  # text of inline assembly
    scopes: tuple[Scope, ...] = ()  # outermost first
    loop: tuple[int, ...] = ()  # see `parse`
    times: float | None = 1.0  # executions in a program, None if unknown; see `Execution`
    share: float = 1.0  # of its tile that its mask lets through

    @property
    def branches(self) -> set[int]:
        """The branches around it, within its innermost loop."""
        inner = takewhile(lambda scope: scope.name not in LOOPS, reversed(self.scopes))
        return {scope.region for scope in inner if scope.name == "scf.if"}


@dataclass(frozen=True)
class Tile:
    """The work of one pass of the main loop, in one block."""

    flops: dict[str, float]  # on tensor cores, by operand dtype
    fma: float  # multiply-adds of products outside of tensor cores
    load_bytes: float  # from global memory or L2
    store_bytes: float
    mufu: float  # elements of exponentials, divisions, roots ...
    fp32: float  # elements of additions, multiplications, maxima, including reductions and `fma`
    passes: float | None = None  # in an average program, None if unknown
    modelled: bool = True  # else nothing is known of its work, and all of it is 0
    loads_known: bool = True  # else the loads of a pass are in another loop, of which no pass is known to match

    @property
    def products(self) -> float:
        """FLOPs of all matrix products."""
        return sum(self.flops.values()) + 2 * self.fma


def parse(ttgir: str) -> list[Op]:
    """Parses all operations, in the order of the text; an operation with regions comes after their contents.

    `Op.loop` identifies the innermost loop around it: first the partitioned operation that contains it (or -1), then
    the index of each loop among its siblings, outermost first. Copies of a loop in several partitions have the same
    identity. Outside of any loop there is no index.
    """
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttgir"
        path.write_text(ttgir)
        module = ir.parse_mlir_module(str(path), context)
    ops: list[Op] = []
    around: list[int | None] = []  # region of each operation
    owners: dict[int, int] = {}  # region -> the operation it belongs to

    def visit(op: ir.operation) -> None:
        owners.update((op.get_region(i).id(), len(ops)) for i in range(op.get_num_regions()))
        block = op.get_block()
        around.append(block.get_parent().id() if block else None)
        reads = [op.get_operand(i) for i in range(op.get_num_operands())]
        makes = [op.get_result(i) for i in range(op.get_num_results())]
        ops.append(
            Op(
                op.get_name(),
                tuple(str(value.get_type()) for value in reads),
                tuple(str(value.get_type()) for value in makes),
                tuple(value.id() for value in reads),
                tuple(value.id() for value in makes),
                op.get_str_attr("asm_string") or "",
            )
        )

    def scopes(region: int | None) -> tuple[Scope, ...]:
        if region not in owners:
            return ()
        owner = owners[region]
        return (*scopes(around[owner]), Scope(ops[owner].name, owner, region))

    module.walk(visit)
    ops = [replace(op, scopes=scopes(region)) for op, region in zip(ops, around, strict=True)]
    return _with_loops(ops)


def _with_loops(ops: Sequence[Op]) -> list[Op]:
    numbers: dict[int, int] = {}  # a loop's index in the walk -> its index among its siblings
    siblings: Counter[int] = Counter()
    for place, op in enumerate(ops):
        if op.name in LOOPS:
            parent = next((s.region for s in reversed(op.scopes) if s.name in (*LOOPS, *PARTITIONS)), -1)
            numbers[place] = siblings[parent]
            siblings[parent] += 1

    def loop(op: Op) -> tuple[int, ...]:
        name = [-1]
        for scope in op.scopes:
            if scope.name == PARTITIONS[0]:
                name = [scope.operation]
            elif scope.name in LOOPS:
                name.append(numbers[scope.operation])
        return tuple(name)

    return [replace(op, loop=loop(op)) for op in ops]


def executed(
    ops: Sequence[Op], ttgir: str, arguments: Mapping[str, int] = MappingProxyType({}), grid: Sequence[int] = (1,)
) -> list[Op]:
    """The operations of `parse(ttgir)` as a launch with these integer arguments executes them.

    Those of one kind come in the same order in the text as in `ops`.
    """
    groups = by_name(executions(ttgir, arguments, grid))
    place: Counter[str] = Counter()
    result = []
    for op in ops:
        if op.name in WORK:
            found = groups[op.name][place[op.name]]
            place[op.name] += 1
            op = replace(op, times=found.times, share=found.share)
        result.append(op)
    if missed := {name for name in WORK if place[name] != len(groups.get(name, ()))}:
        raise ValueError(f"ttgir: its text has other operations than its module: {', '.join(sorted(missed))}")
    return result


def tile(ops: Sequence[Op]) -> Tile:
    """The work of one pass of the main loop. Without `executed`, all masks are full and nothing is repeated."""
    flops: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for op in ops:
        if op.name in DOTS:
            flops[op.loop] += _flops(op)
    loops = [loop for loop in flops if len(loop) > 1]  # a pipeline's first iterations may stand before its loop
    main = max(loops or flops, key=lambda loop: flops[loop], default=None)
    inside = [op for op in ops if main is None or op.loop == main]
    if main is None:
        if any(op.times is None for op in inside if op.name in WORK):
            return Tile({}, 0.0, 0.0, 0.0, 0.0, 0.0, modelled=False)
        return replace(_work(inside, lambda op: op.times or 0.0), passes=1.0)
    needed = {region for op in inside if op.name in DOTS for region in op.branches}
    passes = [op.times for op in inside if op.name in DOTS]
    known = [times for times in passes if times is not None]
    work = _work([op for op in inside if op.branches <= needed], lambda _: 1.0)
    elsewhere = any(op.name in (*TMA_LOADS, *LOADS) and len(op.loop) > 1 for op in ops)
    return replace(
        work,
        passes=max(known) if len(known) == len(passes) else None,
        loads_known=bool(work.load_bytes) or not elsewhere,
    )


def _work(ops: Sequence[Op], times: Callable[[Op], float]) -> Tile:
    tensor: defaultdict[str, float] = defaultdict(float)
    fma = load = store = mufu = 0.0
    for op in ops:
        n = times(op)
        if op.name in DOTS:
            dtype = _dtype(op.operands[0])
            if "nvidia_mma" in "".join(op.results) or op.name != "tt.dot":
                tensor[DTYPES.get(dtype, dtype)] += n * _flops(op)
            else:  # a blocked layout: ordinary multiply-adds
                fma += n * _flops(op) / 2
        elif op.name in TMA_LOADS or op.name in TMA_STORES:
            size = n * _bytes(_buffer(op))
            load, store = (load + size, store) if op.name in TMA_LOADS else (load, store + size)
        elif op.name in LOADS:
            load += n * op.share * _bytes(op.operands[0])  # a tile of pointers: its type states what they point to
        elif op.name in STORES:
            store += n * op.share * _bytes(op.operands[0])
        elif op.name in MUFU or MUFU_PTX.search(op.assembly):
            mufu += n * _elements(op.results[0])
    return Tile(dict(tensor), fma, load, store, mufu, fma + _fp32(ops, times))


def _fp32(ops: Sequence[Op], times: Callable[[Op], float]) -> float:
    """Elements of float32 arithmetic. A product used only by one sum is fused with it; two 16-bit elements are one."""
    uses = Counter(value for op in ops for value in op.reads)
    single = {value for op in ops if op.name == "arith.mulf" for value in op.makes if uses[value] == 1}
    total = 0.0
    for op in ops:
        if op.name in COMBINES and _dtype(op.operands[0]).startswith(("f", "bf")):
            total += times(op) * _elements(op.operands[0]) * _lane_fraction(op.operands[0])
        elif op.name in FP32 and not (op.name in ADDS and single.intersection(op.reads)):
            total += times(op) * _elements(op.results[0]) * _lane_fraction(op.results[0])
    return total


def miscompilations(ttgir: str, ops: Sequence[Op]) -> list[str]:
    """What Triton 3.6 compiles wrongly when it splits a block's rows between two warp groups."""
    return list(dict.fromkeys((*_overruns(ops), *_shifted_twice(ttgir))))  # each consumer partition reports the same


def _overruns(ops: Sequence[Op]) -> Iterator[str]:
    """TMA loads whose box differs in size from their buffer.

    The split halves the buffer of the row operand, and also the box of a descriptor made in the kernel. A descriptor
    from the host keeps its whole box and writes past the buffer.
    """
    for op in ops:
        if op.name == TMA_LOADS[0]:
            box, buffer = _shape(op.operands[0]), _shape(_buffer(op))
            if prod(box) != prod(buffer):
                advice = "make its descriptor in the kernel"
                yield f"a TMA load of {list(box)} overruns its buffer of {list(buffer)}: {advice}"


def _shifted_twice(ttgir: str) -> Iterator[str]:
    """Row numbers of the second warp group to which the offset of its half is added twice.

    The split adds the offset to the scalar row of a descriptor load outside the loop. Row numbers made from the same
    scalar get it too, although their range already begins at the half.
    """
    for part in re.split(r"\n\s*(?:partition\d+\(|default \{)", ttgir)[1:]:
        for half in {start for start in re.findall(r"tt\.make_range \{.*?start = (\d+) : i32", part) if start != "0"}:
            halves = set(re.findall(rf"(%\S+) = arith\.constant (?:\{{.*?\}} )?{half} : i32", part)) | {f"%c{half}_i32"}
            for out, a, b in re.findall(r"(%\S+) = arith\.addi (%\S+), (%\w+).* : i32", part):
                if halves & {a, b} and re.search(rf"tt\.splat {out}\b", part):
                    yield f"rows of the second half are shifted by {half} twice: do not share a load's row with a store"
                    return


def _shape(type_: str) -> tuple[int, ...]:
    """The shape of a tile; empty for a scalar."""
    found = TILE.search(type_)
    return tuple(map(int, found[1].split("x")[:-1])) if found else ()


def _dtype(type_: str) -> str:
    """The element type of a tile, or of what its pointers point to."""
    found = TILE.search(type_)
    return found[2] if found else ""


def _elements(type_: str) -> float:
    """The number of elements of a tile; 0 for a scalar, which all threads share."""
    return prod(_shape(type_)) if _shape(type_) else 0


def _bits(type_: str) -> int:
    return int(re.sub(r"\D*(\d+).*", r"\1", _dtype(type_) or "0"))


def _bytes(type_: str) -> float:
    return _elements(type_) * max(_bits(type_), 8) / 8


def _lane_fraction(type_: str) -> float:
    """How much of a 32-bit lane an element takes: two 16-bit elements share one."""
    return min(_bits(type_), 32) / 32


def _flops(op: Op) -> float:
    """FLOPs of a product of [.., M, K] and [.., K, N]."""
    return 2.0 * prod(_shape(op.operands[0])) * _shape(op.operands[1])[-1]


def _buffer(op: Op) -> str:
    """The type of the shared memory that a copy fills or empties; its other memory operand is a barrier."""
    return next(t for t in op.operands if t.startswith("!ttg.memdesc") and _dtype(t) != "i64")
