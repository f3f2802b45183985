"""How often each operation of a kernel is executed, and on how much of its tile, for the programs of one launch.

Masks, branches and trip counts are integer arithmetic on program ids, ranges and the launch's integer arguments. This
module evaluates that arithmetic, as TTGIR's text states it, with NumPy. Kernels treat a grid's last programs
differently, as a tile may reach over the edge, so it evaluates the first and the last program along each axis of the
grid and weights them by the programs that they stand for.

What depends on loaded values is unknown. Such a mask counts as true. In a loop the first iteration stands for all.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NAME = r"%[\w$.-]+(?:#\d+)?"
OPERATION = re.compile(
    rf'^\s*(?:(?P<results>{NAME}(?::\d+)?(?:, {NAME})*) = )?"?(?P<name>[a-z_]+\.[\w.]+)"?(?P<rest>.*)$'
)
FOR = re.compile(rf"({NAME}) = ({NAME}) to ({NAME}) step ({NAME})(?: iter_args\((.*?)\))?")
SHAPE = re.compile(r"(?:tensor|memdesc)<((?:\d+x)+)")
CONSTANT = re.compile(r"(?:dense<)?(true|false|-?\d+)>? : ")
LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
CLOSING = re.compile(r"^\s*\}")

Value = Any  # a NumPy array or number that broadcasts to the tile; None where it is unknown


@dataclass(frozen=True)
class Execution:
    """One operation of the text."""

    name: str
    times: float | None = 1.0  # executions in a program; None where a branch or a loop is unknown
    share: float = 1.0  # of its tile that its mask lets through, where it is executed


def executions(ttgir: str, arguments: Mapping[str, int], grid: Sequence[int]) -> list[Execution]:
    """The operations of a kernel in the order of its text, for an average program of the grid.

    `arguments` are the launch's integer arguments by name.
    """
    lines = [LOCATION.sub("", line) for line in ttgir.splitlines()]
    corners = [(_run(lines, arguments, ids, grid), weight) for ids, weight in _corners(grid)]
    return [_average(same) for same in zip(*([(op, w) for op in ops] for ops, w in corners), strict=True)]


def _corners(grid: Sequence[int]) -> Iterator[tuple[tuple[int, ...], float]]:
    """Program ids of the first and the last program along each axis, with the share of programs they stand for."""
    axes = [[(0, 1.0)] if n == 1 else [(0, (n - 1) / n), (n - 1, 1 / n)] for n in grid]
    for corner in itertools.product(*axes):
        yield tuple(i for i, _ in corner), math.prod(weight for _, weight in corner)


def _average(same: Sequence[tuple[Execution, float]]) -> Execution:
    name = same[0][0].name
    if any(op.times is None for op, _ in same):
        return Execution(name, None, sum(op.share * weight for op, weight in same))
    times = sum((op.times or 0.0) * weight for op, weight in same)
    through = sum((op.times or 0.0) * op.share * weight for op, weight in same)
    return Execution(name, times, through / times if times else 1.0)


# --- One program ----------------------------------------------------------------------------------------------------


@dataclass
class _Scope:
    """A region around the operations that follow."""

    times: float | None  # executions of its body for each one of the region around it
    otherwise: float | None = 0.0  # those of an else branch


@dataclass
class _Program:
    ids: Sequence[int]
    grid: Sequence[int]
    values: dict[str, Value] = field(default_factory=dict)

    def get(self, name: str) -> Value:
        return self.values.get(name)


def _run(
    lines: Sequence[str], arguments: Mapping[str, int], ids: Sequence[int], grid: Sequence[int]
) -> list[Execution]:
    program = _Program(ids, grid, {f"%{name}": value for name, value in arguments.items()})
    scopes: list[_Scope] = []
    found = []
    for line in lines:
        if CLOSING.match(line) and scopes:
            scope = scopes.pop()
            if line.rstrip().endswith("{"):  # } else {
                scopes.append(_Scope(scope.otherwise))
            continue
        if match := OPERATION.match(line):
            name, rest = match["name"], match["rest"]
            found.append(Execution(name, _product(scope.times for scope in scopes), _mask_share(name, rest, program)))
            if match["results"]:
                _define(match["results"], _evaluate(name, rest, program), program)
        if line.rstrip().endswith(("{", "({")):
            scopes.append(_open(match["name"], match["rest"], program) if match else _Scope(1.0))
    return found


def _product(times: Iterator[float | None]) -> float | None:
    total = 1.0
    for each in times:
        if each is None:
            return None
        total *= each
    return total


def _open(name: str, rest: str, program: _Program) -> _Scope:
    """The scope that an operation opens; defines what a loop counts."""
    if name == "scf.if":
        condition = program.get((re.findall(NAME, rest) or [""])[0])
        return _Scope(None, None) if condition is None else _Scope(float(condition), 1.0 - float(condition))
    if name == "scf.for" and (match := FOR.search(rest)):
        low, high, step = (program.get(match[i]) for i in (2, 3, 4))
        program.values[match[1]] = low
        for inside, initial in re.findall(rf"({NAME}) = ({NAME})", match[5] or ""):
            program.values[inside] = program.get(initial)
        if low is None or high is None or not step:
            return _Scope(None)
        return _Scope(float(max(0, -((low - high) // step))))
    return _Scope(None if name == "scf.while" else 1.0)


def _define(results: str, value: Value, program: _Program) -> None:
    program.values[results.partition(":")[0]] = value


def _mask_share(name: str, rest: str, program: _Program) -> float:
    """The share of a load's or store's tile that its mask lets through."""
    operands, _, types = rest.partition(" : ")
    names = re.findall(NAME, operands)
    if name == "ttg.async_copy_global_to_local":
        found = re.findall(rf" mask ({NAME})", operands)
    else:
        found = names[MASKS[name] : MASKS[name] + 1] if name in MASKS else []
    mask = program.get(found[0]) if found else None
    if mask is None:
        return 1.0
    return float(np.broadcast_to(mask, _shape(types)).mean())


MASKS = {"tt.load": 1, "tt.store": 2, "tt.atomic_rmw": 2}  # the place of the mask among the operands


def _shape(types: str) -> tuple[int, ...]:
    """The shape of the first tile among types; empty for a scalar."""
    found = SHAPE.search(types)
    return tuple(map(int, found[1].split("x")[:-1])) if found else ()


# --- Values ---------------------------------------------------------------------------------------------------------


def _quotient(a: Value, b: Value) -> Value:
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))


BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "addi": np.add,
    "subi": np.subtract,
    "muli": np.multiply,
    "divsi": _quotient,
    "divui": _quotient,
    "remsi": np.fmod,
    "remui": np.fmod,
    "andi": np.bitwise_and,
    "ori": np.bitwise_or,
    "xori": np.bitwise_xor,
    "shli": np.left_shift,
    "shrsi": np.right_shift,
    "shrui": np.right_shift,
    "minsi": np.minimum,
    "minui": np.minimum,
    "maxsi": np.maximum,
    "maxui": np.maximum,
}
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    **{f"{sign}{name}": f for sign in "su" for name, f in {
        "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal
    }.items()},
}  # fmt: skip
BOOLEANS = {"true": 1, "false": 0}
UNCHANGED = (  # operations that leave values as they are, as far as broadcasting is concerned
    *("tt.splat", "tt.broadcast", "ttg.convert_layout", "arith.extsi", "arith.extui", "arith.trunci"),
    *("arith.index_cast", "tt.bitcast"),
)


def _evaluate(name: str, rest: str, program: _Program) -> Value:
    """The value of an integer operation; None if it is not one, or an operand is unknown."""
    operands, _, types = rest.partition(" : ")
    if name == "arith.constant":
        found = CONSTANT.match(rest.strip())
        return None if found is None else np.int64(BOOLEANS[found[1]] if found[1] in BOOLEANS else int(found[1]))
    if name in ("tt.get_program_id", "tt.get_num_programs"):
        axis = "xyz".index(operands.strip()[0])
        of = program.ids if name == "tt.get_program_id" else program.grid
        return np.int64(of[axis] if axis < len(of) else int(name == "tt.get_num_programs"))
    if name == "tt.make_range":
        start, end = (int(re.findall(rf"{key} = (\d+)", rest)[0]) for key in ("start", "end"))
        return np.arange(start, end)
    values = [program.get(operand) for operand in re.findall(NAME, operands)]
    if not values or any(value is None for value in values):
        return None
    return _of_known(name, rest, types, values)


def _of_known(name: str, rest: str, types: str, values: Sequence[Value]) -> Value:
    kind = name.partition(".")[2]
    if name in UNCHANGED:
        return values[0]
    if name == "arith.cmpi":
        return COMPARE[rest.split(",")[0].strip()](*values[:2])
    if name == "arith.select":
        return np.where(*values[:3])
    if name.startswith("arith.") and kind in BINARY and len(values) == 2:
        if kind[:3] in ("div", "rem") and not np.all(values[1]):
            return None
        return BINARY[kind](*values)
    if name == "tt.expand_dims":
        return np.expand_dims(values[0], int(re.findall(r"axis = (\d+)", rest)[0])) if np.ndim(values[0]) else values[0]
    if name == "tt.reshape":
        before, after = SHAPE.findall(types)
        full = np.broadcast_to(values[0], _sizes(before))
        return full.reshape(_sizes(after))
    if name == "tt.trans":
        order = [int(n) for n in re.findall(r"order = array<i32: ([\d, ]+)>", rest)[0].split(",")]
        return np.broadcast_to(values[0], _shape(types)).transpose(order)
    return None


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")[:-1]))


def by_name(found: Sequence[Execution]) -> dict[str, list[Execution]]:
    """The executions of each kind of operation, in the order of the text."""
    groups: defaultdict[str, list[Execution]] = defaultdict(list)
    for op in found:
        groups[op.name].append(op)
    return dict(groups)
