"""What a kernel's TTGIR says: the work of one pass of its main loop, and two faults that compile in silence.

TTGIR is the last form in which Triton still knows tiles: a matrix product is one operation with the shapes of its
operands. Triton's own parser reads it (`triton._C`, which is not a public interface: `make test` says when it moves).

*Main loop*: of the innermost loops around matrix products the one with most FLOPs. In a warp-specialised kernel each
partition has its own copy of the loop (loads in one, products in others): the copies, found by their place among the
loops of their partition, are one loop. A kernel without products is one pass from end to end, a loop in it counted as
one turn; products outside of any loop are one pass with all that is outside of loops.

What stands under a condition (`scf.if`) without a product is left out: it need not happen in every pass.
"""

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import prod
from pathlib import Path

from triton._C.libtriton import ir, nvidia

LOOPS = ("scf.for", "scf.while")
PARTITIONS = ("ttg.warp_specialize", "ttg.warp_specialize.partitions")
COMBINES = ("tt.reduce", "tt.scan")
DOTS = ("tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma", "ttng.tc_gen5_mma_scaled")
TMA_LOADS = ("ttng.async_tma_copy_global_to_local", "ttng.async_tma_gather")
TMA_STORES = ("ttng.async_tma_copy_local_to_global", "ttng.async_tma_scatter", "ttng.async_tma_reduce")
STORES = ("tt.store", "tt.atomic_rmw")
MUFU = (
    *("math.exp", "math.exp2", "math.log", "math.log2", "math.sqrt", "math.rsqrt", "math.sin", "math.cos"),
    *("math.tanh", "arith.divf", "tt.precise_divf", "tt.precise_sqrt"),
)
MUFU_PTX = re.compile(r"\b(ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh)\.approx")  # in inline assembly
ADDS = ("arith.addf", "arith.subf")
FP32 = (*ADDS, "arith.mulf", "arith.maxnumf", "arith.minnumf", "arith.maximumf", "arith.minimumf", "math.fma")
DTYPES = {"bf16": "bf16", "f16": "fp16", "f32": "tf32", "f8E4M3FN": "fp8", "f8E5M2": "fp8", "i8": "int8"}

TILE = re.compile(r"(?:tensor|memdesc)<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)")


@dataclass(frozen=True)
class Scope:
    """A region that an operation stands in, and the operation the region belongs to."""

    name: str
    operation: int  # its place in the walk
    region: int


@dataclass(frozen=True)
class Op:
    """One operation."""

    name: str
    operands: tuple[str, ...]  # types
    results: tuple[str, ...]
    reads: tuple[int, ...]  # operands and results as values, by number
    makes: tuple[int, ...]
    assembly: str  # of inline assembly
    scopes: tuple[Scope, ...] = ()  # outermost first
    loop: tuple[int, ...] = ()  # see `parse`

    @property
    def branches(self) -> set[int]:
        """The branches it stands in, within its innermost loop."""
        inner = takewhile(lambda scope: scope.name not in LOOPS, reversed(self.scopes))
        return {scope.region for scope in inner if scope.name == "scf.if"}


@dataclass(frozen=True)
class Tile:
    """The work of one pass of the main loop, in one block."""

    flops: dict[str, float]  # on tensor cores, by the dtype of the operands
    fma: float  # multiply-adds of products that do not run on tensor cores
    load_bytes: float  # from global memory, so at least from L2
    store_bytes: float
    mufu: float  # elements of exponentials, divisions, roots ...
    fp32: float  # elements of additions, multiplications, maxima; those of reductions and `fma` among them

    @property
    def products(self) -> float:
        """FLOPs of all matrix products."""
        return sum(self.flops.values()) + 2 * self.fma


def parse(ttgir: str) -> list[Op]:
    """All operations in the order of the text, each after those in its regions.

    `Op.loop` names the innermost loop around it: the partitioned operation it is in (or -1), then the number of the
    loop among its siblings, outermost loop first. Copies of a loop in several partitions have the same name; what is
    in no loop has no number.
    """
    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttgir"
        path.write_text(ttgir)
        module = ir.parse_mlir_module(str(path), context)
    ops: list[Op] = []
    around: list[int | None] = []  # the region of each
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
    numbers: dict[int, int] = {}  # a loop's place in the walk -> its number among its siblings
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


def tile(ops: Sequence[Op]) -> Tile:
    """The work of one pass of the main loop."""
    flops: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for op in ops:
        if op.name in DOTS:
            flops[op.loop] += _flops(op)
    loops = [loop for loop in flops if len(loop) > 1]  # before a loop there may stand the first turns of a pipeline
    main = max(loops or flops, key=lambda loop: flops[loop], default=None)
    inside = [op for op in ops if main is None or op.loop == main]
    needed = {region for op in inside if op.name in DOTS for region in op.branches}
    return _work([op for op in inside if op.branches <= needed])


def _work(ops: Sequence[Op]) -> Tile:
    tensor: defaultdict[str, float] = defaultdict(float)
    fma = load = store = mufu = 0.0
    for op in ops:
        if op.name in DOTS:
            dtype = _dtype(op.operands[0])
            if "nvidia_mma" in "".join(op.results) or op.name != "tt.dot":
                tensor[DTYPES.get(dtype, dtype)] += _flops(op)
            else:  # a blocked layout: every thread multiplies and adds
                fma += _flops(op) / 2
        elif op.name in TMA_LOADS or op.name in TMA_STORES:
            size = _bytes(_buffer(op))
            load, store = (load + size, store) if op.name in TMA_LOADS else (load, store + size)
        elif op.name in ("tt.load", "ttg.async_copy_global_to_local"):
            load += _bytes(op.operands[0])  # a tile of pointers names what they point to
        elif op.name in STORES:
            store += _bytes(op.operands[0])
        elif op.name in MUFU or MUFU_PTX.search(op.assembly):
            mufu += _elements(op.results[0])
    return Tile(dict(tensor), fma, load, store, mufu, fma + _fp32(ops))


def _fp32(ops: Sequence[Op]) -> float:
    """Elements of float32 arithmetic; a product that only one sum reads is fused with it, and 16-bit pairs are one."""
    uses = Counter(value for op in ops for value in op.reads)
    single = {value for op in ops if op.name == "arith.mulf" for value in op.makes if uses[value] == 1}
    total = 0.0
    for op in ops:
        if op.name in COMBINES and _dtype(op.operands[0]).startswith(("f", "bf")):
            total += _elements(op.operands[0]) * _lane_fraction(op.operands[0])
        elif op.name in FP32 and not (op.name in ADDS and single.intersection(op.reads)):
            total += _elements(op.results[0]) * _lane_fraction(op.results[0])
    return total


def miscompilations(ttgir: str, ops: Sequence[Op]) -> list[str]:
    """What Triton 3.6 compiles wrongly when it splits the rows of a block between two groups of warps."""
    return list(dict.fromkeys((*_overruns(ops), *_shifted_twice(ttgir))))  # every consumer says the same


def _overruns(ops: Sequence[Op]) -> Iterator[str]:
    """TMA loads whose box is not the size of their buffer.

    The split halves the buffer of the row operand, and the box of a descriptor that the kernel makes; one that comes
    from the host keeps its whole box and writes past the buffer.
    """
    for op in ops:
        if op.name == TMA_LOADS[0]:
            box, buffer = _shape(op.operands[0]), _shape(_buffer(op))
            if prod(box) != prod(buffer):
                advice = "make its descriptor in the kernel"
                yield f"a TMA load of {list(box)} overruns its buffer of {list(buffer)}: {advice}"


def _shifted_twice(ttgir: str) -> Iterator[str]:
    """Row numbers of the second group that have the offset of its half added twice.

    The split adds the half to the scalar row of a descriptor load outside the loop. Row numbers made from the same
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
    """The shape of a tile; of a scalar, none."""
    found = TILE.search(type_)
    return tuple(map(int, found[1].split("x")[:-1])) if found else ()


def _dtype(type_: str) -> str:
    """What a tile, or what its pointers point to, is made of."""
    found = TILE.search(type_)
    return found[2] if found else ""


def _elements(type_: str) -> float:
    """Elements of a tile; a scalar, which is the same in all threads, counts nothing."""
    return prod(_shape(type_)) if _shape(type_) else 0


def _bits(type_: str) -> int:
    return int(re.sub(r"\D*(\d+).*", r"\1", _dtype(type_) or "0"))


def _bytes(type_: str) -> float:
    return _elements(type_) * max(_bits(type_), 8) / 8


def _lane_fraction(type_: str) -> float:
    """Lanes that an element takes: two 16-bit ones share one."""
    return min(_bits(type_), 32) / 32


def _flops(op: Op) -> float:
    """Of a product of [.., M, K] and [.., K, N]."""
    return 2.0 * prod(_shape(op.operands[0])) * _shape(op.operands[1])[-1]


def _buffer(op: Op) -> str:
    """The type of the shared memory that a copy fills or empties; the other one is a barrier."""
    return next(t for t in op.operands if t.startswith("!ttg.memdesc") and _dtype(t) != "i64")
