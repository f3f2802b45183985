"""Searches the launch parameters of our kernels and writes the fastest correct ones where `kernels.tuning` finds them.

A case goes through five stages. Each has its share of the case's time, so that a case that was begun is also finished:

    compile   on a GPU, the first calls of all candidates run in threads, as Triton compiles outside of Python's lock
    check     every candidate is checked against the reference; wrong or failing ones are discarded, with the reason
    halve     successive halving: heats of a few candidates in interleaved rounds, of which the faster half goes on
    others    all other back-ends of the case are checked too
    final     the remaining candidates and the other back-ends in interleaved rounds; the fastest one wins. With --hot
              one after the other on a hot GPU (`profiling.measure.hot`)

A candidate is a back-end with one set of its launch parameters. Cases that take most of a chunk come first and get most
of the time. Checking and timing are those of `bench`.
"""

import gc
import itertools
import math
import random
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kernels import tuning
from kernels.tuning import LaunchConfig, TunedEntry
from model.errors import UserError
from profiling.cases import Backend, Case, requested_cases
from profiling.machine import describe_machine, max_clock_mhz, resolve_device
from profiling.measure.bench import input_sets, measure_ceilings, set_benchmark_state
from profiling.measure.check import capability_of, check_backend, one_line, reference_outputs
from profiling.measure.hot import HotBench, hot_bench, hot_table, hot_values
from profiling.measure.timing import CallTimer, interleave
from profiling.results import OK, Ceilings, as_json_text, now, write
from profiling.tables import duration, terminal

# After these shares of a case's time, a stage begins nothing new.
COMPILE_UNTIL, CHECK_UNTIL, HALVE_UNTIL, OTHERS_UNTIL = 0.4, 0.55, 0.7, 0.8
HEAT_SIZE = 8  # candidates that are in memory at a time
HEAT_ROUNDS = 3
FINALISTS = 3  # per back-end
FINAL_ROUNDS = 12
TABLE_VERSIONS = ("torch", "triton", "cuda", "cudnn")  # recorded in a table, beside driver, clock and revision
WRITE_TEST = ".writable"


@dataclass(frozen=True)
class Candidate:
    """A back-end, with one set of its launch parameters if it has any."""

    backend: Backend
    config: LaunchConfig | None = None

    @property
    def bound_backend(self) -> Backend:
        """The back-end with these launch parameters."""
        if self.config is None:
            return self.backend
        return replace(self.backend, prepare=partial(self.backend.prepare, config=self.config))

    @property
    def label(self) -> str:
        """The back-end's name and these launch parameters: "triton ROWS=2 num_warps=8"."""
        return " ".join((self.backend.name, *(f"{name}={value}" for name, value in (self.config or {}).items())))


@dataclass(frozen=True)
class FailedCandidate:
    """A candidate that was discarded, and why."""

    backend: str
    config: LaunchConfig | None
    why: str


@dataclass(frozen=True)
class TuningResult:
    """The result of tuning one case."""

    case: str
    entry: TunedEntry | None = None  # for the table; None if no candidate was correct, or no time was left
    kernel: str | None = None  # our fastest back-end with launch parameters
    peer: str | None = None  # the fastest peer
    tried: int = 0  # candidates with launch parameters that were checked
    untried: int = 0  # candidates that no time was left for
    failed: tuple[FailedCandidate, ...] = ()  # of the candidates and of the other back-ends

    @property
    def ratio(self) -> float | None:
        """The best peer's seconds over our kernel's; above 1 our kernel is faster."""
        if self.entry is None or self.kernel is None or self.peer is None:
            return None
        return self.entry.seconds[self.peer] / self.entry.seconds[self.kernel]

    @property
    def broken(self) -> bool:
        """Whether candidates were tried and none was correct."""
        return self.tried > 0 and sum(f.config is not None for f in self.failed) == self.tried


def candidates(case: Case, device: torch.device) -> list[Candidate]:
    """All launch parameters of all back-ends of ours that run on the device."""
    dims = case.shape.dims
    backends = [b for b in _runnable(case, device) if b.ours]
    return [Candidate(b, parameters) for b in backends if b.configs for parameters in b.configs(dims)]


def _runnable(case: Case, device: torch.device) -> list[Backend]:
    """The back-ends of a case that run on the device."""
    capability = capability_of(device)
    return [b for b in case.backends if b.installed and not case.lacks(b, device.type, capability)]


# --- One case -------------------------------------------------------------------------------------------------------


class _CaseTuner:
    """Tunes one case: its inputs on a device, and the candidates that failed."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.case, self.device, self.seed = case, device, seed
        self.sets = input_sets(case, device, generator)
        self.expected = reference_outputs(case, self.sets[0], device)
        self.failed: list[FailedCandidate] = []

    def discard(self, candidate: Candidate, why: str) -> None:
        """Discards a candidate; raises RuntimeError if its failure cost the process its GPU."""
        self.failed.append(FailedCandidate(candidate.backend.name, candidate.config, why))
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def compile(self, found: Iterable[Candidate], until: float) -> None:
        """Fills Triton's cache. Failures are ignored here, since the check meets and reports them again."""

        def first_call(candidate: Candidate) -> None:
            with torch.inference_mode(), suppress(Exception):
                if time.monotonic() < until:
                    candidate.bound_backend.prepare(*self.sets[0])()

        with ThreadPoolExecutor() as pool:
            list(pool.map(first_call, found))

    def is_correct(self, candidate: Candidate) -> bool:
        """Whether the candidate's output is correct; if not, it is discarded."""
        result = check_backend(self.case, candidate.bound_backend, self.sets[0], self.expected, self.device)
        if result.status != OK:
            self.discard(candidate, result.detail)
        return result.status == OK

    def time_candidates(
        self, candidates: Sequence[Candidate], rounds: int, until: float, hot: HotBench | None = None
    ) -> dict[int, float]:
        """Median seconds per call, by index, in at least one round. What cannot be timed is left out.

        With `hot` they are those of a hot GPU, of one candidate after the other, however long that takes.
        """
        timed: dict[int, CallTimer] = {}
        for i, candidate in enumerate(candidates):
            try:
                timed[i] = CallTimer([candidate.bound_backend.prepare(*inputs) for inputs in self.sets], self.device)
            except Exception as error:
                self.discard(candidate, one_line(error))
        if hot is not None:
            labels = {f"{i + 1}. {candidates[i].label}": i for i in timed}
            found = hot.measure(self.case.name, {label: timed[i] for label, i in labels.items()})
            medians = {labels[label]: statistics.median(one.samples) for label, one in found.items()}
        else:
            medians = self._interleaved(timed, rounds, until)
        timed.clear()
        _free_graphs(self.device)
        return medians

    def _interleaved(self, timed: Mapping[int, CallTimer], rounds: int, until: float) -> dict[int, float]:
        samples: dict[int, list[float]] = {i: [] for i in timed}
        for done in range(rounds):
            if done and time.monotonic() >= until:
                break
            for i, (seconds,) in zip(timed, interleave([*timed.values()], 1, self.seed + done), strict=True):
                samples[i].append(seconds)
        return {i: statistics.median(values) for i, values in samples.items()}

    def successive_halving(self, alive: Sequence[Candidate], until: float) -> list[Candidate]:
        """The few fastest candidates; if time runs out, the fastest until then."""
        alive = random.Random(self.seed).sample(alive, len(alive))  # neighbours in the space behave alike
        took = 0.0  # seconds of the last heat
        while len(alive) > FINALISTS:
            known: list[tuple[float, Candidate]] = []
            going: list[Candidate] = []
            for begin in range(0, len(alive), HEAT_SIZE):
                if (start := time.monotonic()) + took >= until:
                    known.sort(key=lambda pair: pair[0])
                    return [*(candidate for _, candidate in known), *alive[begin:]][:FINALISTS]
                heat = alive[begin : begin + HEAT_SIZE]
                medians = self.time_candidates(heat, HEAT_ROUNDS, until)
                took = time.monotonic() - start
                ranking = sorted(medians, key=lambda i: medians[i])
                known += [(medians[i], heat[i]) for i in ranking]
                going += [heat[i] for i in ranking[: math.ceil(len(heat) / 2)]]
            alive = going
        return alive


def _free_graphs(device: torch.device) -> None:
    """Frees the memory that CUDA graphs of a heat held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def tune_case(
    case: Case, device: torch.device, deadline: float, seed: int, hot: HotBench | None = None
) -> TuningResult:
    """Finds the fastest correct back-end of a case, and the best launch parameters of each back-end of ours.

    `deadline` is on the clock of `time.monotonic`; what was begun by then is finished. `seed` determines inputs and
    orders. With `hot` the last stage is on a hot GPU. Raises RuntimeError if a candidate leaves the process without a
    working GPU; other exceptions discard the candidate.
    """
    found, begin = candidates(case, device), time.monotonic()
    if begin >= deadline:
        return TuningResult(case.name, untried=len(found))
    ends = (begin + part * (deadline - begin) for part in (COMPILE_UNTIL, CHECK_UNTIL, HALVE_UNTIL, OTHERS_UNTIL))
    compiled, checked, halved, joined = ends
    with torch.inference_mode():
        tuner = _CaseTuner(case, device, seed)
        if device.type == "cuda":
            tuner.compile(found, compiled)
        alive: list[Candidate] = []
        tried = 0
        for candidate in itertools.takewhile(lambda _: time.monotonic() < checked, found):
            tried += 1
            alive += [candidate] if tuner.is_correct(candidate) else []
        out = TuningResult(case.name, tried=tried, untried=len(found) - tried, failed=tuple(tuner.failed))
        if not alive or time.monotonic() >= deadline:
            return out
        groups = [[c for c in alive if c.backend is b] for b in case.backends]
        finalists = [c for group in groups for c in tuner.successive_halving(group, halved)]
        others = [Candidate(b) for b in _runnable(case, device) if not b.configs]
        others = [c for c in others if time.monotonic() < joined and tuner.is_correct(c)]
        if time.monotonic() < deadline:
            out = _final_round(tuner, finalists, others, out, deadline, hot)
    del tuner
    _free_graphs(device)
    return out


def _final_round(
    tuner: _CaseTuner,
    finalists: Sequence[Candidate],
    others: Sequence[Candidate],
    so_far: TuningResult,
    deadline: float,
    hot: HotBench | None,
) -> TuningResult:
    alive = [*finalists, *others]
    medians = tuner.time_candidates(alive, FINAL_ROUNDS, deadline, hot)
    best: dict[str, tuple[float, Candidate]] = {}
    for i in sorted(medians, key=lambda i: medians[i]):
        best.setdefault(alive[i].backend.name, (medians[i], alive[i]))
    names = [b.name for b in tuner.case.backends if b.name in best]  # in the case's order, not that of the finish
    ours = [name for name, (_, candidate) in best.items() if candidate.config is not None]
    peers = [name for name, (_, candidate) in best.items() if not candidate.backend.ours]
    entry = None
    if ours:
        entry = TunedEntry(
            tuner.case.operation.name,
            tuner.case.dtype,
            dict(tuner.case.shape.dims),
            next(iter(best)),
            {name: dict(best[name][1].config or {}) for name in names if name in ours},
            {name: best[name][0] for name in names},
            now(),
            _versions(tuner.device),
        )
    kernel, peer = next(iter(ours), None), next(iter(peers), None)
    return replace(so_far, entry=entry, kernel=kernel, peer=peer, failed=tuple(tuner.failed))


@cache
def _versions(device: torch.device) -> dict[str, str]:
    """What the measurements depend on beside the card: versions, the driver, the clock it may reach, and our code."""
    machine, clock = describe_machine(device), max_clock_mhz(device)
    others = {"driver": machine.driver, "clock": clock and f"{clock} MHz", "revision": machine.revision}
    versions = {name: version for name, version in machine.versions.items() if name in TABLE_VERSIONS}
    return versions | {name: value for name, value in others.items() if value}


# --- All cases, and the table ---------------------------------------------------------------------------------------


def tune_cases(
    cases: Iterable[Case],
    device: torch.device,
    deadline: float,
    seed: int,
    ceilings: Ceilings,
    hot: HotBench | None = None,
) -> Iterator[TuningResult]:
    """Tunes cases, the most expensive ones of a chunk first, each with its share of the time.

    The expense is estimated from the machine's ceilings. Time that a case does not use goes to the others. A case
    without any time left gets a result that says so.
    """
    weighed = sorted(((_least_chunk_seconds(case, ceilings), case) for case in cases), key=lambda pair: -pair[0])
    for i, (weight, case) in enumerate(weighed):
        begin = time.monotonic()
        part = weight / sum(other for other, _ in weighed[i:])
        yield tune_case(case, device, begin + part * (deadline - begin), seed, hot)


def _least_chunk_seconds(case: Case, ceilings: Ceilings) -> float:
    """Least seconds that the case's calls in one chunk can take."""
    bound = case.result(()).bound(ceilings)
    return max(case.shape.calls, 1) * (bound[1] if bound else 1.0)


def write_table(entries: Iterable[TunedEntry], device: torch.device, folder: Path) -> Path:
    """Adds the entries to the device's table in a folder, atomically, and returns its path.

    They replace entries of the same operation, dtype and dimensions; all others stay. A new table starts as a copy of
    the device's table in `kernels/tuned`, so that it can replace that one. Raises `UserError` if the table cannot be
    written, or the existing one is damaged.
    """
    machine = describe_machine(device)
    name = f"{tuning.device_slug(machine.device)}.json"
    path, known = folder / name, tuning.FOLDER / name
    try:
        before = next((tuning.read_table(p).entries for p in (path, known) if p.is_file()), ())
    except ValueError as error:
        raise UserError(f"{error}; repair it or move it away") from error
    merged = {entry.key: entry for entry in (*before, *entries)}
    table = tuning.TunedTable(machine.device, machine.capability or machine.kind, tuple(merged.values()))
    write(path, tuning.to_json(table))
    return path


def tune_command(
    patterns: list[str],
    device_name: str,
    budget: float,
    out: Path | None,
    hot_final: bool,
    extra: Path | None,
    as_json: bool,
) -> int:
    """Implements `python -m profiling tune`; returns 1 if no launch parameters of some case were correct."""
    begin, seed = time.monotonic(), secrets.randbits(31)
    device = resolve_device(device_name)
    set_benchmark_state()
    if not 0 < budget < math.inf:
        raise UserError(f"--budget {budget:g}: give a number of seconds above 0")
    cases = requested_cases(patterns, device, extra)
    tunable = [case for case in cases if candidates(case, device)]
    idle = [case.name for case in cases if case not in tunable]
    if not tunable:
        some = ", ".join(idle[:3]) + (", ..." if len(idle) > 3 else "")
        raise UserError(f"nothing to tune: no back-end of {some} has launch parameters to try on {device.type}")
    hot = hot_bench(device) if hot_final else None
    folder = out or (tuning.FOLDER if device.type == "cuda" else None)
    if folder is not None:
        write(folder / WRITE_TEST, "")  # fails now, not after the work, if the place cannot be written
        (folder / WRITE_TEST).unlink()
    console = Console(stderr=True)
    console.print(f"seed {seed}", highlight=False)
    results: list[TuningResult] = []
    path = None
    with console.status("measuring the machine's ceilings") as status:
        ceilings = measure_ceilings(device, {case.dtype for case in tunable}) if len(tunable) > 1 else Ceilings()
        status.update(f"tuning {len(tunable)} cases")
        for result in tune_cases(tunable, device, begin + budget, seed, ceilings, hot):
            results.append(result)
            status.update(f"{len(results)} of {len(tunable)} done, last {result.case}")
            if folder is not None and result.entry is not None:
                path = write_table([result.entry], device, folder)
    if as_json:
        shown = [asdict(result) | {"ratio": result.ratio} for result in results]
        written = None if path is None else str(path)
        values = {"device": describe_machine(device).device, "table": written, "cases": shown, "nothing_to_tune": idle}
        values |= {"hot": hot_values(hot)} if hot is not None else {}
        print(as_json_text(values))
    else:
        _print_results(results)
        if hot is not None:
            terminal().print(hot_table(hot))
        if idle:
            print(f"nothing to tune: {', '.join(idle)}")
        if folder is None:
            print("not written: kernels do not use a CPU's table; --out FOLDER writes it anyway")
        elif path is not None:
            print(f"written to {path}")
    return int(any(result.broken for result in results))


def _print_results(results: Iterable[TuningResult]) -> None:
    """Prints the table, and below it why candidates failed."""
    console = terminal()
    console.print(tuning_table(results))
    for result in results:
        for (backend, why), count in Counter((f.backend, f.why) for f in result.failed).most_common():
            console.print(f"{result.case} {backend}, {count} x: {why}", style="yellow", markup=False, highlight=False)


def tuning_table(results: Iterable[TuningResult]) -> Table:
    """The results for a terminal: each case's name, below it the winner, and our best kernel if that is another one."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("case, back-end", overflow="fold")
    for heading in ("time", "x peer", "tried", "failed"):
        out.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        tried = f"{result.tried} of {result.tried + result.untried}"
        failed = str(sum(f.config is not None for f in result.failed))
        out.add_section()
        out.add_row(escape(result.case), "", "", tried, failed)
        if result.entry is None:
            out.add_row("  [red]no candidate is correct[/]" if result.broken else "  [yellow]no time was left[/]")
            continue
        for name in dict.fromkeys((result.entry.backend, result.kernel)):
            out.add_row(*_cells(result, result.entry, name or ""))
    return out


def _cells(result: TuningResult, entry: TunedEntry, name: str) -> tuple[str, str, str]:
    fastest = " (fastest)" if name == entry.backend else ""
    parameters = "".join(f" {key}={value}" for key, value in entry.configs.get(name, {}).items())
    ratio = f"{result.ratio:.2f}" if name == result.kernel and result.ratio is not None else ""
    return escape(f"  {name}{fastest}{parameters}"), duration(entry.seconds[name]), ratio
