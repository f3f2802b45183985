"""Records what code calls on meta tensors, which have shapes but neither values nor memory.

    an operation of kernels/    at its shape, as `profiling.analyse.calls` describes it
    a matrix product            of PyTorch, with its FLOPs
    any other kernel            the bytes that it reads and writes
    an exchange between GPUs    the bytes that this rank sends or receives, and what is computed in the meantime

In what is compiled, PyTorch's operations between two of ours are fused: together they read what they get from outside
and write what is used outside. Everywhere else each is a kernel of its own.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from profiling.analyse.calls import EAGER_PASS, FUSED_PASS, MATMUL, Call, calls_of, dtype_of

META = torch.device("meta")
_OVERWRITES = {torch.ops.aten.copy_.default, torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default}
_NO_KERNEL = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_RESULTS: dict[Hashable, Any] = {}  # of functions by their arguments, without values as those


@dataclass(frozen=True)
class Exchange:
    """An exchange between GPUs, as one rank takes part in it."""

    group: str  # of ranks, as in `model.parallel.ranks.Group`
    bytes: float  # that the rank sends or receives, whichever is more
    behind: tuple[Call, ...] = ()  # what the rank computes in the meantime


@dataclass
class Recorded:
    """What was called in one call of a stage."""

    stage: str
    calls: Counter[Call] = field(default_factory=Counter)
    exchanges: Counter[Exchange] = field(default_factory=Counter)


_Memory = Mapping[int, int]  # bytes by the number of a storage


@dataclass(frozen=True)
class _Event:
    """One kernel: what it counts as, and the memory that it reads and writes."""

    calls: "Sequence[Call | _Event] | None"  # None for an operation that may be fused, or that is a pass of its own
    reads: _Memory
    writes: _Memory
    fusible: bool = False
    ticket: int | None = None  # of the exchange that it begins, or else waits for
    begins: Exchange | None = None


class WithoutValues(TorchDispatchMode):
    """Lets meta tensors do what tensors on a GPU do.

    Where a number is read from one, it is 1. A convolution of channels-last memory returns such memory.
    """

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, unless it would read a value."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
            return 1.0
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and args[0].is_contiguous(memory_format=torch.channels_last):
            return torch.empty_like(out, memory_format=torch.channels_last)
        return out


class Recorder(TorchDispatchMode):
    """Notes every call on meta tensors, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self._stages: list[tuple[str, list[_Event]]] = []
        self.begin("")
        self._fusing = False
        self._alive: list[Any] = []  # all tensors, as a storage's number may be used again once it is freed

    def begin(self, stage: str) -> None:
        """All that follows belongs to this call of a stage."""
        self._events: list[_Event] = []
        self._stages.append((stage, self._events))

    def recorded(self) -> list[Recorded]:
        """What was recorded, in order."""
        return [_counted(stage, events) for stage, events in self._stages if events]

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function and notes it."""
        kwargs = kwargs or {}
        own = func.namespace == "flashtalk"
        if not own and func._overloadpacket not in flop_registry:
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = _results_of(func, args, kwargs) if own or _makes_new(func) else func(*args, **kwargs)
        self._alive.append((args, kwargs, out))
        reads, writes = _memory_of(args[1:] if func in _OVERWRITES else (args, kwargs)), _memory_of(out)
        is_view = not func._schema.is_mutable and writes.keys() <= reads.keys()
        if writes and not is_view and func not in _NO_KERNEL:  # without any, it runs on the CPU
            calls = _calls(func, args, kwargs, out, float(sum(reads.values()) + sum(writes.values())))
            self._events.append(_Event(calls, reads, writes, self._fusing and calls is None))
        return out

    @contextmanager
    def repeating(self, modules: Sequence[nn.Module], compiled: bool) -> Iterator[None]:
        """A module that is called like one of these was before is not run, but repeats what happened then.

        If they are compiled, operations in one call of a module are fused.
        """
        happened: dict[Hashable, tuple[list[Call | _Event], Any]] = {}  # calls and results, by arguments
        for module in modules:
            module.forward = self._repeating_forward(module, compiled, happened)
        try:
            yield
        finally:
            for module in modules:
                del module.forward  # the class has it

    def _repeating_forward(self, module: nn.Module, compiled: bool, happened: dict[Hashable, Any]) -> Any:
        forward, own = module.forward, _like([*module.parameters(), *module.buffers()])

        def run(*args: Any, **kwargs: Any) -> Any:
            key = type(module), own, _like((args, kwargs))
            if key in happened:
                calls, out = happened[key]
                self._events.append(_Event(calls, {}, {}))
                return _empty(out)
            before, self._fusing = len(self._events), compiled
            self._events.append(_Event((), {}, {}))  # no kernel: nothing is fused across a module's borders,
            out = forward(*args, **kwargs)
            self._events.append(_Event((), _memory_of(out), {}))  # and its results are used outside
            self._fusing = False
            happened[key] = list(_fused(self._events[before:])), out
            return out

        return run

    # --- Exchanges between GPUs ---------------------------------------------------------------------------------------

    def start_exchange(self, group: str, sent: Tensor, received: Tensor, count: float) -> None:
        """Notes that an exchange of so many bytes begins, which sends some of `sent` and fills `received`."""
        self._alive.append((sent, received))
        event = _Event((), _memory_of(sent), _memory_of(received), ticket=id(received), begins=Exchange(group, count))
        self._events.append(event)

    def wait_for(self, received: Tensor) -> None:
        """Notes that the exchange which fills `received` must be over."""
        self._events.append(_Event((), _memory_of(received), {}, ticket=id(received)))


@cache
def _makes_new(func: Any) -> bool:
    """Whether the function overwrites nothing and makes no views."""
    return not func._schema.is_mutable and all(result.alias_info is None for result in func._schema.returns)


def _results_of(func: Any, args: Any, kwargs: Any) -> Any:
    """Results of a function: if they are new meta tensors, then like those that it had for such arguments."""
    key = func, _like((args, kwargs))
    if key not in _RESULTS:
        out = func(*args, **kwargs)
        memory = _memory_of(out).keys()
        if not memory or memory & _memory_of((args, kwargs)).keys():  # values, or an argument as it was
            return out
        _RESULTS[key] = out
    return _empty(_RESULTS[key])


def _calls(func: Any, args: Any, kwargs: Any, out: Any, moved: float) -> Sequence[Call] | None:
    """What a function counts as; None for one that is neither an operation of kernels/ nor a product."""
    if func.namespace == "flashtalk":
        name, names = func._overloadpacket.__name__, [argument.name for argument in func._schema.arguments]
        described = calls_of(name, dict.fromkeys(names) | dict(zip(names, args, strict=False)) | kwargs)
        return [Call(name, (), "bf16", 0.0, moved)] if described is None else described
    if func._overloadpacket in flop_registry:
        flops = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
        operand = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return [Call(MATMUL, (), dtype_of(operand), flops, moved)]
    return None


def _like(tree: Any) -> Hashable:
    """What decides about the shapes that a function of these arguments returns."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype, tree.device
    if isinstance(tree, (tuple, list)):
        return tuple(_like(x) for x in tree)
    if isinstance(tree, dict):
        return tuple((name, _like(x)) for name, x in tree.items())
    try:
        hash(tree)
    except TypeError:
        return id(tree)
    return type(tree), tree  # 1 and 1.0 are equal, but results differ


def _empty(tree: Any) -> Any:
    """New tensors like those of the tree."""

    def empty(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)

    return empty(tree) if isinstance(tree, Tensor) else tree_map(empty, tree)


def _memory_of(tree: Any) -> dict[int, int]:
    """The memory of the meta tensors of a tree; what is seen several times is read once."""
    found: dict[int, int] = {}
    for x in tree_leaves(tree):
        if isinstance(x, Tensor) and x.device == META and x.numel():
            storage = x.untyped_storage()
            size = min(x.numel() * x.itemsize, storage.nbytes())
            found[storage._cdata] = min(found.get(storage._cdata, 0) + size, storage.nbytes())
    return found


# --- Counting -------------------------------------------------------------------------------------------------------


def _counted(stage: str, events: Sequence[_Event]) -> Recorded:
    """The calls and exchanges of events; each exchange with what is called between its start and its end."""
    found = Recorded(stage)
    under_way: dict[int, tuple[Exchange, list[Call]]] = {}
    for item in _fused(events):
        if isinstance(item, Call):
            found.calls[item] += 1
            for _, behind in under_way.values():
                behind.append(item)
        elif item.ticket is not None and item.begins is not None:
            under_way[item.ticket] = item.begins, []
        elif item.ticket in under_way:
            exchange, behind = under_way.pop(item.ticket)
            found.exchanges[replace(exchange, behind=tuple(behind))] += 1
    return found


def _fused(events: Sequence[_Event]) -> Iterator[Call | _Event]:
    """The calls of events, where fusible ones between others are one pass over memory, and the exchanges."""
    group: list[_Event] = []
    last_read = {key: i for i, event in enumerate(events) for key in event.reads}
    for i, event in enumerate(events):
        if event.fusible:
            group.append(event)
            continue
        yield from _pass(group, {key for event in group for key in event.writes if last_read.get(key, 0) >= i})
        group = []
        if event.ticket is not None:
            yield event
        elif event.calls is not None:
            yield from event.calls
        else:
            yield Call(EAGER_PASS, (), "fp32", 0.0, float(sum(event.reads.values()) + sum(event.writes.values())))
    yield from _pass(group, set())


def _pass(group: Sequence[_Event], used_later: Set[int]) -> Iterator[Call]:
    """The kernel that fused events are: it reads what comes from outside and writes what is used outside."""
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    inside: set[int] = set()
    for event in group:
        reads |= {key: size for key, size in event.reads.items() if key not in writes}
        inside |= {key for key in event.reads if key in writes}
        writes |= event.writes
    kept = {key: size for key, size in writes.items() if key in used_later or key not in inside}
    if group:
        yield Call(FUSED_PASS, (), "bf16", 0.0, float(sum(reads.values()) + sum(kept.values())))
