"""The loop that all trainings share: time budget, progress, resumable checkpoints, curves, and a stop at a bad loss.

A training is described by a `Task`. `train` runs it in a folder, where it writes

    checkpoint.pt   network, averaged weights, optimizer, counters and history: what `resume` continues from
    curves.png      every logged number over the steps
    history.json    the same numbers

The batch of a step, and everything random in it, is a pure function of (seed, step). So a training that was killed and
resumed computes what it would have computed anyway, and ends with the same bits on the same machine, if its length is
given in steps. With a length in minutes the learning rate follows the clock, and two runs differ.

Under torchrun, every process trains a replica on batches of its own (model/distill/replicas.py).
"""

import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from model.distill.replicas import Replicas
from model.errors import UserError
from model.files import replacing

B = TypeVar("B")

CHECKPOINT = "checkpoint.pt"
PREFETCH = 4  # batches that are made ahead of the step that needs them


class Stateful(Protocol):
    """As `torch.distributed.checkpoint` calls what can be saved; the state consists of tensors and plain values."""

    def state_dict(self) -> dict[str, Any]:
        """What is saved."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Takes up what was saved."""
        ...


@dataclass
class Counters:
    """How far a training is. `seconds` counts the time in all runs of a resumed training."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Task(Generic[B]):
    """What is trained, and how.

    Attributes:
        name: for progress lines and plots.
        network: trained in place.
        optimizer: over the network's parameters; the loop scales the learning rate of each group.
        batch: makes the batch of a step from a random generator. It runs in a background thread.
        loss: the loss of a batch, a scalar, and further numbers to log by name.
        evaluate: numbers to log from the network with averaged weights, which is in evaluation mode.
        write: writes the trained network, which has averaged weights by then. Of several replicas, only the first does.
        ema: the share that a step has in the averaged weights.
        clip: the largest norm of the gradient.
        device: where `loss` computes.
        mixed: whether products may be computed in bfloat16, see `mixed_precision`.
        state: what a step leaves for the next one besides the network, if anything.
    """

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Callable[[np.random.Generator], B]
    loss: Callable[[B], tuple[Tensor, dict[str, float]]]
    evaluate: Callable[[nn.Module], dict[str, float]]
    write: Callable[[Counters], None]
    ema: float = 0.005
    clip: float = 1.0
    device: str = "cpu"
    mixed: bool = True
    state: Stateful | None = None


@dataclass(frozen=True)
class Budget:
    """How long a training takes: either a number of steps, or minutes of wall time."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None) or (self.steps or self.minutes or 0) <= 0:
            raise UserError("give one of the two, --minutes or --steps, above zero")

    def progress(self, step: int, seconds: float) -> float:
        """The share of the budget that is used, 0 to 1 and above."""
        return step / self.steps if self.steps is not None else seconds / (60 * (self.minutes or 0))


def learning_rate(progress: float, step: int, warmup: int = 50) -> float:
    """The factor of the learning rate: a linear warm-up, then constant, and over the last 30 % a cosine down to 1 %."""
    decay = 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, progress - 0.7) / 0.3))
    return min(1.0, (step + 1) / warmup) * max(decay, 0.01)


def step_generator(seed: int, step: int, replica: int = 0) -> np.random.Generator:
    """The random generator of a step of a replica, and of nothing else."""
    return np.random.default_rng([seed, step, replica] if replica else [seed, step])


def train(
    task: Task[B],
    folder: Path,
    budget: Budget,
    seed: int = 0,
    resume: bool = False,
    evaluate_every: int = 250,
    save_seconds: float = 120.0,
    clock: Callable[[], float] = time.monotonic,
    report: Callable[[str], None] = print,
) -> Counters:
    """Trains until the budget is used up. Afterwards the network has the averaged weights and is in evaluation mode.

    `clock` gives seconds. `report` gets a line at every evaluation.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when the step is complete and a checkpoint is written.
        UserError: `folder` holds a checkpoint and `resume` is false, or the other way round; the loss is not finite; a
            file cannot be written. The last good checkpoint is kept, and the message names it.
    """
    path, replicas = folder / CHECKPOINT, Replicas()
    with _writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    if path.exists() != resume:
        hint = "resume it, or choose another folder" if path.exists() else "there is nothing to resume"
        raise UserError(f"{path} {'exists' if path.exists() else 'does not exist'}: {hint}")
    average = {name: tensor.detach().clone() for name, tensor in task.network.state_dict().items()}
    counters = Counters()
    if resume:
        counters = _load(path, task, average, seed, replicas)
    start, saved = clock() - counters.seconds, clock()
    rates = [group.setdefault("initial_lr", group["lr"]) for group in task.optimizer.param_groups]
    task.network.train()
    with _signals() as stopped, _batches(task, seed, counters.step, replicas) as batches:
        for step, batch in batches:
            counters.seconds = replicas.first_says(clock() - start)
            progress = budget.progress(step, counters.seconds)
            if progress >= 1:
                break
            for group, rate in zip(task.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(progress, step)
            row = _step(task, batch, seed, step, average, replicas)
            if not math.isfinite(row["loss"]):
                kept = f"{path} holds step {_saved_step(path)}" if path.exists() else "no checkpoint was written yet"
                raise UserError(f"the loss is {row['loss']} for the batch of seed {seed}, step {step}; {kept}")
            counters.step = step + 1
            counters.history.append({"step": step, **row})
            if any(replicas.gathered(stopped())):
                _save(path, task, average, counters, seed, replicas)
                raise KeyboardInterrupt
            if counters.step % evaluate_every == 0 and replicas.is_first:
                counters.history[-1] |= _evaluate(task, average)
                left = (clock() - start) * (1 / max(progress, 1e-9) - 1) / 60
                report(f"{task.name} {_line(counters.history[-1])}, {left:.1f} min left")
            if replicas.first_says(clock() - saved) >= save_seconds:
                _save(path, task, average, counters, seed, replicas)
                saved = clock()
    if counters.history and replicas.is_first:
        counters.history[-1] |= _evaluate(task, average)
        report(f"{task.name} {_line(counters.history[-1])}, done in {counters.seconds / 60:.1f} min")
    _save(path, task, average, counters, seed, replicas)
    task.network.load_state_dict(average)
    task.network.eval()
    if replicas.is_first:
        with _writing(path):
            task.write(counters)
    return counters


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came, which must not cut a step in the middle. A second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def note(number: int, _: FrameType | None) -> None:
        came.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _batches(task: Task[B], seed: int, first: int, replicas: Replicas) -> Iterator[Iterator[tuple[int, B]]]:
    """Steps from the first one and their batches, which one background thread makes ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:

        def steps() -> Iterator[tuple[int, B]]:
            def submit(step: int) -> Future[B]:
                return pool.submit(task.batch, step_generator(seed, step, replicas.index))

            pending = [submit(first + i) for i in range(PREFETCH)]
            for step in itertools.count(first):
                pending.append(submit(step + PREFETCH))
                yield step, pending.pop(0).result()

        try:
            yield steps()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _step(
    task: Task[B], batch: B, seed: int, step: int, average: dict[str, Tensor], replicas: Replicas
) -> dict[str, float]:
    """One update of the network and of the averaged weights, which stay as they are if the loss is not finite."""
    torch.manual_seed(int(step_generator(seed, step, replicas.index).integers(2**62)))
    with mixed_precision(task.device) if task.mixed else nullcontext():
        loss, numbers = task.loss(batch)
    mean_loss = loss.detach().clone()
    replicas.average([mean_loss])
    row = {"loss": mean_loss.item(), **numbers}
    if not math.isfinite(row["loss"]):
        return row
    task.optimizer.zero_grad()
    loss.backward()
    replicas.average_gradients(task.network)
    row["gradient"] = float(nn.utils.clip_grad_norm_(task.network.parameters(), task.clip))
    task.optimizer.step()
    share = max(task.ema, 1 / (step + 1))
    for name, tensor in task.network.state_dict().items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, share)
        else:
            average[name].copy_(tensor)
    return row


def mixed_precision(device: str) -> Any:
    """Autocast to bfloat16 where it has instructions of its own: on a GPU, and on CPUs with AMX or AVX-512 BF16."""
    if device != "cpu" or torch.cpu._is_avx512_bf16_supported():
        return torch.autocast(device, torch.bfloat16)
    return nullcontext()


def _evaluate(task: Task[B], average: dict[str, Tensor]) -> dict[str, float]:
    """The task's numbers for the averaged weights. The network has its own weights again afterwards."""
    own = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    task.network.load_state_dict(average)
    task.network.eval()
    with torch.no_grad():
        numbers = task.evaluate(task.network)
    task.network.load_state_dict(own)
    task.network.train()
    return numbers


def _save(
    path: Path, task: Task[B], average: dict[str, Tensor], counters: Counters, seed: int, replicas: Replicas
) -> None:
    states = replicas.gathered(task.state.state_dict() if task.state else {})
    if not replicas.is_first:
        return
    state = {
        "network": task.network.state_dict(),
        "average": average,
        "optimizer": task.optimizer.state_dict(),
        "counters": vars(counters),
        "seed": seed,
        "states": states,
    }
    with _writing(path):
        with replacing(path) as temporary:
            torch.save(state, temporary)
        with replacing(path.with_name("history.json")) as temporary:
            temporary.write_text(json.dumps(counters.history))
        with replacing(path.with_name("curves.png")) as temporary:
            plot_history(counters.history, temporary, task.name)


def _load(path: Path, task: Task[B], average: dict[str, Tensor], seed: int, replicas: Replicas) -> Counters:
    state = torch.load(path, weights_only=True, map_location=task.device)
    if state["seed"] != seed:
        raise UserError(f"{path} was trained with seed {state['seed']}, not {seed}")
    if len(state["states"]) != replicas.count:
        raise UserError(f"{path} was trained by {len(state['states'])} processes, not {replicas.count}")
    task.network.load_state_dict(state["network"])
    task.optimizer.load_state_dict(state["optimizer"])
    if task.state:
        task.state.load_state_dict(state["states"][replicas.index])
    for name, tensor in state["average"].items():
        average[name].copy_(tensor)
    return Counters(**state["counters"])


def _saved_step(path: Path) -> int:
    return torch.load(path, weights_only=True, map_location="cpu")["counters"]["step"]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns a full disk or a folder that cannot be written into one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError that does not say why
        reason = error if isinstance(error, OSError) else "PyTorch could not write all of it; is the disk full?"
        kept = f"; {path} is the last good checkpoint" if path.exists() else ""
        raise UserError(f"cannot write to {path.parent}: {reason}{kept}") from error


def _line(row: dict[str, float]) -> str:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in ("step", "gradient"))
    return f"step {row['step'] + 1:.0f}: {numbers}"


def plot_history(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Draws every logged number over the steps, one small plot each, with a running mean where points are many."""
    from matplotlib.figure import Figure  # imported here because only trainings draw

    names = sorted({name for row in history for name in row if name != "step"})
    columns = min(4, max(1, len(names)))
    rows = -(-len(names) // columns) or 1
    width, height = 4 * columns, 2.6 * rows + 0.3  # inches
    figure = Figure(figsize=(width, height))
    figure.suptitle(title)
    # To measure all labels for the margins would double the time of drawing.
    figure.subplots_adjust(0.75 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.75 / height, wspace=0.25, hspace=0.55)
    for i, name in enumerate(names):
        steps, values = np.array([(row["step"], row[name]) for row in history if name in row]).T
        axes = figure.add_subplot(rows, columns, i + 1, title=name, xlabel="step")
        many = len(values) > 200
        axes.plot(steps, values, linewidth=0.4 if many else 1.2, color="lightsteelblue" if many else "tab:blue")
        if many:
            width = len(values) // 50
            smooth = np.convolve(values, np.ones(width) / width, "valid")
            axes.plot(steps[width // 2 :][: len(smooth)], smooth, color="tab:blue")
        if values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=80, format="png")
