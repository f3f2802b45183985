"""Time-boxed, resumable benchmark campaign: phases of tasks, the most important first, every result saved at once.

    check   every back-end of ours against its reference, at production shapes      OUT/check.json
    bench   cases with their peers                                                  OUT/bench.json
    tune    launch parameters                                                       OUT/tuned/DEVICE.json
    e2e     whole chunks of flashtalk-14b with random weights, by variant           OUT/e2e.json, OUT/VARIANT.json.gz
    bench and e2e together, to be kept, reported and projected                      OUT/run.json

A child process works through the tasks and notes each one in OUT/progress before it begins. A watchdog ends the child
if a kernel hangs. If a child dies, of that or of a lost CUDA context, the next child records it as the task's result
and continues with the next task. A second call with the same OUT continues where the first one stopped. Nothing
outlasts the budget: a task that may not fit is not begun, and the child is killed when the budget is spent.
"""

import ctypes
import dataclasses
import faulthandler
import gc
import hashlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

from model.config import FLASHTALK_14B, TINY
from model.errors import UserError
from profiling.cases import Case, requested_cases
from profiling.formats import load
from profiling.machine import NvmlMonitor, concatenate, describe_machine, resolve_device
from profiling.measure.bench import bench_case, measure_ceilings, set_benchmark_state
from profiling.measure.check import check_case, one_line, raise_if_gpu_lost
from profiling.measure.e2e import VARIANTS, Variant, chunk_models, run_variant, trace_chunk
from profiling.measure.tune import tune_case, tuning_table, write_table
from profiling.results import (
    ERROR,
    SKIPPED,
    WRONG,
    CaseResult,
    Measurement,
    Run,
    VariantResult,
    as_json_text,
    now,
    save,
    to_json,
    write,
)
from profiling.tables import measurement_rows, measurement_table, terminal, variant_rows, variant_table

ROUNDS = 20
CONFIGS = {"cuda": FLASHTALK_14B, "cpu": TINY}
PROGRESS = "progress"  # no .json suffix, so that it is not taken for a results file
USER_ERROR_EXIT = 2  # exit code of a `UserError`
STDERR = 2
LOST = "hung, crashed or ran out of time"
KILL_SECONDS = 5.0
CHILD_START_SECONDS = 15.0  # a child takes that long to start; none is started with less time left


@dataclass(frozen=True)
class TimeLimits:
    """Limits of one task in seconds: what must be left to begin it, and after how long it counts as hung."""

    to_begin: float
    hung_after: float


TIME_LIMITS = {
    "check": TimeLimits(4, 60),
    "bench": TimeLimits(12, 90),
    "tune": TimeLimits(25, 300),
    "e2e": TimeLimits(0, 400),  # each variant states itself what it needs
}
MARGIN = 4.0  # seconds between the deadline a task is given and its limit


@dataclass
class CampaignProgress:
    """The state of a campaign, shared through OUT/progress by parent, children and later calls."""

    seed: int
    deadline: float  # on the system's clock
    phase: str = ""  # of the running task; empty if none is
    task: str = ""
    backend: str = ""
    code: str = ""  # digest of the code that is measured
    done: dict[str, list[str]] = field(default_factory=dict)  # phase -> tasks
    lost: dict[str, list[str]] = field(default_factory=dict)  # case -> back-ends that killed a child

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return self.deadline - time.time()

    def record(self, out: Path, phase: str = "", task: str = "", backend: str = "") -> None:
        """Saves what has just begun; without arguments, that nothing is running."""
        self.phase, self.task, self.backend = phase, task, backend
        write(out / PROGRESS, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, out: Path) -> "CampaignProgress":
        """Reads the saved state; raises `UserError` if it cannot be read."""
        try:
            return cls(**json.loads((out / PROGRESS).read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{out / PROGRESS} cannot be read ({error}); use another --out") from error


@dataclass(frozen=True)
class TaskLists:
    """The tasks of each phase, the most important first."""

    cases: dict[str, list[Case]]  # phase -> cases
    variants: list[Variant]

    def names(self, phase: str) -> list[str]:
        """The names of a phase's tasks."""
        return [v.name for v in self.variants] if phase == "e2e" else [c.name for c in self.cases[phase]]


def plan_tasks(device: torch.device, patterns: Sequence[str], extra: Path | None) -> TaskLists:
    """Lists the tasks of each phase. A pattern is the name of a variant, or selects cases.

    Shapes of one GPU come first, then those of the largest world size, since scaling is judged by its ends. Within a
    world size the registry's order holds, which begins with what costs most.
    """
    variants = {v.name: v for v in VARIANTS[device.type]}
    named = [variants[p] for p in patterns if p in variants]
    rest = [p for p in patterns if p not in variants]
    cases = [] if patterns and not rest else requested_cases(rest, device, extra)
    cases.sort(key=lambda case: (case.shape.world > 1, -case.shape.world))
    checked = [case for case in cases if any(b.ours for b in case.backends)]
    tunable = [case for case in cases if any(b.configs for b in case.backends)]
    by_phase = {"check": checked, "bench": cases, "tune": tunable}
    return TaskLists(by_phase, named if patterns else list(variants.values()))


def gpu_command(
    phase: str,
    out: Path,
    budget: float,
    device_name: str,
    patterns: list[str],
    extra: Path | None,
    worker: bool,
    as_json: bool,
) -> int:
    """Implements `python -m profiling gpu`; returns 1 if a back-end of ours or a variant is wrong or raised."""
    phases = [name.strip() for name in phase.split(",")]
    for name in phases:
        if name not in TIME_LIMITS:
            raise UserError(f"--phase {name}: there is no such phase; use {', '.join(TIME_LIMITS)}")
    device = resolve_device(device_name)
    tasks = plan_tasks(device, patterns, extra)
    if worker:
        _die_with_parent()
        Worker(out, device, tasks).run_phases(phases)
        return 0
    if not 0 < budget < math.inf:
        raise UserError(f"--budget {budget:g}: a number of seconds is needed")
    options = ["--phase", phase, "--out", str(out), "--device", device.type]
    options += [item for pattern in patterns for item in ("--only", pattern)]
    options += ["--cases", str(extra)] if extra else []
    try:
        progress = _run_children(options, out, budget)
    except KeyboardInterrupt:
        if (out / PROGRESS).is_file():
            CampaignProgress.load(out).record(out)  # the running task is not to blame
        raise
    return _print_summary(phases, tasks, progress, out, as_json)


def code_digest() -> str:
    """A digest of all code and data in the packages: if it changes, earlier results no longer apply."""
    root, found = Path(__file__).parents[2], hashlib.sha256()
    for package in ("kernels", "model", "streaming", "profiling"):
        for file in sorted((root / package).rglob("*")):
            if file.suffix in (".py", ".toml", ".json") and "results" not in file.parts:
                found.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _run_children(options: Sequence[str], out: Path, budget: float) -> CampaignProgress:
    """Starts children until one finishes, the budget is spent, or two in a row die at the same task."""
    deadline = time.time() + budget
    if (out / PROGRESS).is_file():
        progress = replace(CampaignProgress.load(out), deadline=deadline)
        if progress.code != code_digest():
            raise UserError(f"{out} holds results of another version of the code; use another --out")
    else:
        progress = CampaignProgress(secrets.randbits(31), deadline, code=code_digest())
    progress.record(out, progress.phase, progress.task, progress.backend)
    before = None
    while progress.left > CHILD_START_SECONDS:
        code = _run_child([sys.executable, "-m", "profiling", "gpu", "--worker", *options], progress.left)
        progress = CampaignProgress.load(out)
        if code is None:  # the budget is spent; the running task is not to blame
            progress.record(out)
        if not code:
            break
        if code == USER_ERROR_EXIT:
            raise UserError("the worker process stopped; its error is in the line above")
        at = (progress.phase, progress.task, progress.backend)
        if not progress.task or at == before:
            raise UserError(f"the worker process ended with code {code} without progress; its output is above")
        before = at
    return progress


def _run_child(command_line: Sequence[str], seconds: float) -> int | None:
    """Runs a process; returns its exit code, or None if it was killed because its time was up."""
    child = subprocess.Popen(command_line, stdout=STDERR, start_new_session=True)
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # with all processes it has started
            os.killpg(child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver may keep it alive
            child.wait(KILL_SECONDS)


def _die_with_parent() -> None:
    """Asks Linux to kill this process as soon as its parent ends, however that happens."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


class Worker:
    """The child process: works through the remaining tasks and saves each result at once."""

    def __init__(self, out: Path, device: torch.device, tasks: TaskLists) -> None:
        self._out, self._device, self._tasks = out, device, tasks
        self._cases = {case.name: case for cases in tasks.cases.values() for case in cases}
        self._variants = {variant.name: variant for variant in tasks.variants}
        self._progress = CampaignProgress.load(out)
        self._machine = describe_machine(device)
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._phase, self._run = "", Run("", "", self._machine)  # the current phase and its results so far
        self._monitor, self._begin = NvmlMonitor(device), 0.0

    def run_phases(self, phases: Sequence[str]) -> None:
        """Runs all phases, as far as the budget allows."""
        set_benchmark_state()
        for phase in phases:
            self._open_phase(phase)
            with self._monitor:
                if phase == self._progress.phase:
                    self._record_lost_task()
                if phase == "bench" and not self._run.ceilings.copy_bytes_s:
                    dtypes = sorted({case.dtype for case in self._tasks.cases[phase]})
                    self._run = replace(self._run, ceilings=measure_ceilings(self._device, dtypes))
                self._work_through(phase)

    def _open_phase(self, phase: str) -> None:
        """Loads the phase's results file, if there is one; raises `UserError` if another machine measured it."""
        machine, path = self._machine, self._out / f"{phase}.json"
        self._phase, self._monitor, self._begin = phase, NvmlMonitor(self._device), time.monotonic()
        self._run = Run(f"gpu --phase {phase}", now(), machine, notes=(f"seed {self._progress.seed}",))
        if path.is_file():
            self._run = load(path)
            found = self._run.machine
            if (found.device, found.versions) != (machine.device, machine.versions):
                raise UserError(f"{path} was measured on {found.device} or with other versions; use another --out")
        self._earlier = self._run

    def _work_through(self, phase: str) -> None:
        progress, limits = self._progress, TIME_LIMITS[phase]
        todo = [name for name in self._tasks.names(phase) if name not in progress.done.get(phase, [])]
        for i, name in enumerate(todo):
            if progress.left < (self._variants[name].seconds if phase == "e2e" else limits.to_begin):
                continue
            self._console.print(f"{progress.left:4.0f} s left  {phase} {i + 1}/{len(todo)}  {name}")
            faulthandler.dump_traceback_later(limits.hung_after, exit=True)
            progress.record(self._out, phase, name)
            getattr(self, f"_{phase}")(name)
            faulthandler.cancel_dump_traceback_later()
            progress.done.setdefault(phase, []).append(name)
            progress.record(self._out)

    def _record_lost_task(self) -> None:
        """Records what ended the previous child.

        If a back-end was running, it is left out from now on. Otherwise the whole task counts as failed.
        """
        progress = self._progress
        phase, task, backend = progress.phase, progress.task, progress.backend
        self._console.print(f"{phase} {task} {backend}: {LOST}; continuing with the next one")
        if task not in self._tasks.names(phase):
            pass  # it is no longer asked for
        elif backend:
            progress.lost.setdefault(task, []).append(backend)
        else:
            progress.done.setdefault(phase, []).append(task)
            if phase == "e2e" and all(v.variant != task for v in self._run.variants):
                self._add(VariantResult(task, ERROR, LOST))
            elif phase in ("check", "bench"):
                self._add(self._cases[task].result((Measurement("all", ERROR, True, LOST),)))
        progress.record(self._out)

    def _check(self, name: str) -> None:
        self._measure(name, timed=False)

    def _bench(self, name: str) -> None:
        self._measure(name, timed=True)

    def _measure(self, name: str, *, timed: bool) -> None:
        case, seed, phase = self._cases[name], self._progress.seed, self._phase
        lost = self._progress.lost.get(name, [])
        meant = [b for b in case.backends if timed or b.ours]
        wanted = [b.name for b in meant if b.name not in lost]

        def on_backend(backend: str) -> None:
            self._progress.record(self._out, phase, name, backend)

        if timed:
            result = bench_case(case, self._device, ROUNDS, seed, wanted, on_backend)
        else:
            result = check_case(case, self._device, seed, wanted, on_backend)
        dead = (Measurement(b.name, ERROR, b.ours, LOST) for b in meant if b.name in lost)
        self._add(replace(result, measurements=(*result.measurements, *dead)))

    def _tune(self, name: str) -> None:
        outcome = tune_case(self._cases[name], self._device, self._deadline(), self._progress.seed)
        self._console.print(tuning_table([outcome]))
        if outcome.entry is not None:
            write_table([outcome.entry], self._device, self._out / "tuned")

    def _e2e(self, name: str) -> None:
        variant, deadline = self._variants[name], self._deadline()
        try:
            config = CONFIGS[self._device.type]
            config = dataclasses.replace(config, chunk=dataclasses.replace(config.chunk, sample_steps=variant.steps))
            models = chunk_models(config, self._device, variant.precision)
            result, runner = run_variant(variant, models, self._progress.seed, deadline)
        except Exception as error:  # out of memory, a compiler error: other variants may still run
            result, runner = VariantResult(name, ERROR, one_line(error)), None
        self._add(result)
        if runner is not None and result.chunk and time.monotonic() + 3 * max(result.chunk) < deadline:
            try:
                self._replace(trace_chunk(result, runner, self._out / f"{name}.json.gz"))
            except Exception as error:  # the trace is optional
                self._console.print(f"no trace of {name}: {one_line(error)}")
        models = runner = None
        torch.compiler.reset()  # compiled code keeps weights alive, and two students do not fit in memory
        gc.collect()
        raise_if_gpu_lost(self._device)

    def _deadline(self) -> float:
        """When the current task must end, on the clock of `time.monotonic`."""
        return time.monotonic() + min(self._progress.left, TIME_LIMITS[self._phase].hung_after) - MARGIN

    def _add(self, result: CaseResult | VariantResult) -> None:
        """Adds a result and saves the results file."""
        run = self._run
        if isinstance(result, CaseResult):
            self._run = replace(run, cases=(*run.cases, result))
        else:
            self._run = replace(run, variants=(*run.variants, result))
        self._save()

    def _replace(self, result: VariantResult) -> None:
        self._run = replace(self._run, variants=(*self._run.variants[:-1], result))
        self._save()

    def _save(self) -> None:
        before = self._earlier
        seconds = before.seconds + time.monotonic() - self._begin
        nvml = concatenate(before.nvml, self._monitor.nvml, before.seconds)
        self._run = replace(self._run, seconds=seconds, nvml=nvml)
        save(self._run, self._out / f"{self._phase}.json")


def _print_summary(
    phases: Sequence[str], tasks: TaskLists, progress: CampaignProgress, out: Path, as_json: bool
) -> int:
    """Prints what the phases found and what they did not reach; returns 1 if anything of ours is wrong or raised."""
    console, bad, documents = terminal(), False, {}
    for phase in phases:
        missing = [name for name in tasks.names(phase) if name not in progress.done.get(phase, [])]
        path = out / ("tuned" if phase == "tune" else f"{phase}.json")
        run = load(path) if path.is_file() else None
        if phase == "tune":
            documents[phase] = [json.loads(file.read_text()) for file in sorted(path.glob("*.json"))]
        if run is not None:
            documents[phase] = to_json(run)
            bad |= any(m.ours and m.status in (WRONG, ERROR) for c in run.cases for m in c.measurements)
            bad |= any(v.status in (WRONG, ERROR) for v in run.variants)
            if not as_json:
                console.print(
                    variant_table(variant_rows(run)) if phase == "e2e" else measurement_table(measurement_rows(run))
                )
        if missing:
            documents[f"{phase} {SKIPPED}"] = missing
        if not as_json:
            done = len(progress.done.get(phase, []))
            console.print(f"{phase}: {done} done, {len(missing)} not reached; {path}", highlight=False, soft_wrap=True)
    bench, e2e = out / "bench.json", out / "e2e.json"
    if bench.is_file() and e2e.is_file():
        save(replace(load(bench), variants=load(e2e).variants), out / "run.json")
    if as_json:
        print(as_json_text(documents))
    return int(bad)
