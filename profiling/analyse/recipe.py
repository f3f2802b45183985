"""What a chunk computes, recorded from the model itself: every operation of every stage, without weights or a GPU.

`record` runs one chunk of `ChunkGenerator` on meta tensors, which have shapes but no values, and notes what is called:

    an operation of kernels/    at its shape, as `profiling.analyse.calls` describes it
    a matrix product            of PyTorch, with its FLOPs
    any other kernel            the bytes that it reads and writes

The student's blocks are compiled on a GPU. There, PyTorch's operations between two of ours are fused: together they
read what they get from outside and write what is used outside. Everywhere else each is a kernel of its own.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from model.config import PRECISIONS, TINY, Config
from model.weights.checkpoint import Models, random_models
from profiling.analyse.calls import EAGER_PASS, FUSED_PASS, MATMUL, Call, calls_of, dtype_of
from profiling.cases.case import PROMPT_TOKENS
from streaming.generator import ChunkGenerator, Conditions
from streaming.timers import StageTimer

META = torch.device("meta")
BETWEEN = "between stages"
AUDIO, STEP, DECODE, COLOR, MOTION = (
    "audio",
    "denoise/step",
    "decode",
    "color",
    "motion",
)  # stages, as `streaming.timers` names them


@dataclass(frozen=True)
class Exchange:
    """One collective between GPUs, as the rank that sends or receives most takes part in it."""

    name: str
    bytes: float  # that this rank sends or receives, whichever is more
    behind: Call | None = None  # what the GPU computes in the meantime


@dataclass(frozen=True)
class StageWork:
    """What one call of a stage computes and exchanges, on one rank."""

    stage: str
    calls: Counter[Call]
    beside: bool = False  # whether it runs beside the denoising steps, on a stream of its own
    exchanges: Counter[Exchange] = field(default_factory=Counter)


Recipe = tuple[StageWork, ...]  # of a chunk, in the order in which its stages are called


def meta_models(config: Config, precision: str) -> Models:
    """The networks of `config` without weights; the encoders, which no chunk runs, are those of `tiny`."""
    small = replace(config, text=TINY.text, image=TINY.image, audio=TINY.audio)
    with WithoutValues():
        return replace(random_models(small, META, PRECISIONS[precision], offload_device=META), config=config)


def record(models: Models) -> Recipe:
    """What a steady chunk of these networks computes, on meta tensors, as `meta_models` makes them."""
    recorder = Recorder()
    with torch.inference_mode(), WithoutValues():
        timer = RecordingTimer(recorder)
        generator = ChunkGenerator(models, timer)
        conditions, window = _inputs(models)
        state = replace(generator.start(conditions, seed=0), chunk=1, motion=_motion(models.config))
        compiled = _compiled_blocks(models, recorder)
        with recorder, compiled:
            for _ in generator.chunk(conditions, state, window):
                pass
    return _beside(recorder.stages())


def _inputs(models: Models) -> tuple[Conditions, Tensor]:
    """Conditions and window of features of a chunk, with the shapes and dtypes that a session has."""
    config, dit = models.config, models.dit
    frames, channels, rows, columns = config.latent_shape
    text = torch.empty(PROMPT_TOKENS, config.dit.text_dim, device=META)
    context = dit.embed_context(text, torch.empty(config.dit.img_tokens, config.dit.img_dim, device=META))
    dtype = next(models.vae.parameters()).dtype
    condition = torch.empty(frames, config.dit.in_dim - channels, rows, columns, device=META, dtype=dtype)
    statistics = torch.empty(1, 3, 1, 1, device=META)
    conditions = Conditions(context, condition, (statistics, statistics), condition[:1, :channels])
    window = (config.chunk.frame_num, config.dit.audio_window, config.dit.audio_blocks, config.dit.audio_channels)
    return conditions, torch.empty(window, device=META)


def _motion(config: Config) -> Tensor:
    """The motion latents that all chunks but the first begin with."""
    count = (config.chunk.motion_frames_num - 1) // config.vae.temporal_stride + 1
    return torch.empty(count, *config.latent_shape[1:], device=META)


@contextmanager
def _compiled_blocks(models: Models, recorder: "Recorder") -> Iterator[None]:
    """Tells the recorder when the student's blocks run."""
    hooks = []
    for block in models.dit.blocks:
        hooks.append(block.register_forward_pre_hook(lambda *_: recorder.compiled(True)))
        hooks.append(block.register_forward_hook(lambda *_: recorder.compiled(False)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _beside(stages: Sequence[StageWork]) -> Recipe:
    """The stages, where what is called between denoising steps is marked as running beside them."""
    steps = [i for i, work in enumerate(stages) if work.stage == STEP]
    return tuple(replace(work, beside=work.stage != STEP and steps[0] < i < steps[-1]) for i, work in enumerate(stages))


# --- The recorder ---------------------------------------------------------------------------------------------------


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


@dataclass
class Event:
    """One kernel: what it counts as, and the memory that it reads and writes, as bytes by storage."""

    calls: Sequence[Call] | None  # None for an operation that the compiler may fuse, or that is a pass of its own
    reads: Mapping[int, int]
    writes: Mapping[int, int]
    fusible: bool = False


@dataclass
class _Stage:
    name: str
    events: list[Event] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Notes every call on meta tensors, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self._stages: list[_Stage] = [_Stage(BETWEEN)]
        self._fusing = False
        self._alive: list[Any] = []  # all tensors, as a storage's number may be used again once it is freed
        self._known: dict[Hashable, Any] = {}  # results of operations of kernels/ by their arguments

    def begin(self, stage: str) -> None:
        """All that follows belongs to this call of a stage."""
        self._stages.append(_Stage(stage))

    def compiled(self, on: bool) -> None:
        """Whether what follows is compiled."""
        self._fusing = on

    def stages(self) -> list[StageWork]:
        """What was recorded, in order; passes that the compiler fuses count as one."""
        return [StageWork(s.name, Counter(_fused(s.events))) for s in self._stages if s.events]

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function and notes it."""
        kwargs = kwargs or {}
        own = func.namespace == "flashtalk"
        if not own and func._overloadpacket not in flop_registry:
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = self._operation(func, args, kwargs) if own else func(*args, **kwargs)
        self._alive.append((args, kwargs, out))
        self._note(func, args, kwargs, out)
        return out

    def _operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation of kernels/, whose results have the shapes that they had for the same arguments."""
        leaves = (_like(x) if isinstance(x, Tensor) else x for x in tree_leaves((args, kwargs)))
        key = func, *leaves
        if key not in self._known:
            self._known[key] = func(*args, **kwargs)
        empty = torch.empty_strided
        return tree_map(lambda x: empty(x.shape, x.stride(), dtype=x.dtype, device=META), self._known[key])

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        reads, writes = _bytes_of((args, kwargs)), _bytes_of(out)
        if not writes or (not func._schema.is_mutable and writes.keys() <= reads.keys()) or func in _NO_KERNEL:
            return  # on a CPU, or a view
        if func in _OVERWRITES:
            reads = _bytes_of(args[1:])
        if func.namespace == "flashtalk":
            arguments = {a.name: None for a in func._schema.arguments} | dict(
                zip((a.name for a in func._schema.arguments), args, strict=False)
            )
            name = func._overloadpacket.__name__
            described = calls_of(name, arguments | kwargs)
            moved = float(sum(reads.values()) + sum(writes.values()))
            calls = [Call(name, (), "bf16", 0.0, moved)] if described is None else described
            self._stages[-1].events.append(Event(calls, reads, writes))
        elif func._overloadpacket in flop_registry:
            flops = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
            moved = float(sum(reads.values()) + sum(writes.values()))
            dtype = dtype_of(next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)))
            self._stages[-1].events.append(Event((Call(MATMUL, (), dtype, flops, moved),), reads, writes))
        else:
            self._stages[-1].events.append(Event(None, reads, writes, self._fusing))


_OVERWRITES = {torch.ops.aten.copy_.default, torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default}
_NO_KERNEL = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}


class RecordingTimer(StageTimer):
    """A timer that tells the recorder which stage runs."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(META)
        self._recorder = recorder

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Counts what the body calls as one call of the stage `name`."""
        self._recorder.begin(name)
        yield
        self._recorder.begin(BETWEEN)


def _like(x: Tensor) -> Hashable:
    return x.shape, x.stride(), x.dtype, x.device


def _bytes_of(tree: Any) -> dict[int, int]:
    """Bytes of the meta tensors of a tree, by storage; what is seen several times is read once."""
    found: dict[int, int] = {}
    for x in tree_leaves(tree):
        if isinstance(x, Tensor) and x.device == META and x.numel():
            storage = x.untyped_storage()
            size = min(x.numel() * x.itemsize, storage.nbytes())
            found[storage._cdata] = min(found.get(storage._cdata, 0) + size, storage.nbytes())
    return found


def _fused(events: Sequence[Event]) -> Iterator[Call]:
    """The calls of events, where fusible ones between others are one pass over memory."""
    group: list[Event] = []
    last_read = {key: i for i, event in enumerate(events) for key in event.reads}
    for i, event in enumerate(events):
        if event.fusible:
            group.append(event)
            continue
        yield from _pass(group, {key for event in group for key in event.writes if last_read.get(key, 0) >= i})
        group = []
        if event.calls is not None:
            yield from event.calls
        else:
            moved = float(sum(event.reads.values()) + sum(event.writes.values()))
            yield Call(EAGER_PASS, (), "fp32", 0.0, moved)
    yield from _pass(group, set())


def _pass(group: Sequence[Event], used_later: Set[int]) -> Iterator[Call]:
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
