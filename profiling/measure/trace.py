"""Runs a command under torch.profiler: a Perfetto trace, the longest operations, the spans, the launch gaps.

The command runs in this process, as `python` would run it. Its trace is a file for ui.perfetto.dev or chrome://tracing,
written atomically. All numbers are computed from the events of that file by `summarise`. Neither stacks nor shapes are
recorded, so a chunk takes a few megabytes and the command keeps its speed.

*Launch gaps* are the share of time in which the GPU is idle while more work is to come, because the CPU has not
launched that work yet. A span occupies the GPU from the first to the last piece of work launched inside it, on whatever
stream; the part of that extent that no kernel, copy or fill covers is gap. A chunk is the spans up to and including
`motion`. The first of several chunks is left out, since it compiles and allocates.

An *account* of a span is the sum of its kernels beside the time it took on the GPU, and the rest: time in which none of
its kernels runs, and time in which several do. `bench` times the same kernels alone. A kernel that takes longer here
ran at a lower clock, or beside others.
"""

import gzip
import importlib.util
import json
import math
import re
import runpy
import signal
import statistics
import sys
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from model.errors import UserError
from model.files import replacing
from profiling.results import StageInterval, as_json_text, check_writable
from profiling.tables import duration, percent, terminal

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # event categories of a trace
LAUNCH_CALLS = ("cuda_runtime", "cuda_driver")
OPERATION, SPAN, GPU_SPAN = "cpu_op", "user_annotation", "gpu_user_annotation"
CHUNK_BEGIN, STEP = "audio", "denoise/step"  # first span of a chunk, and first span on the student's stream
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXAMPLE = "write it behind --, as in: trace -- python -m streaming run --image FACE.jpg --audio VOICE.wav --out OUT.mp4"

Event = Mapping[str, Any]
Interval = tuple[float, float]  # begin and end in seconds


@dataclass(frozen=True)
class OperationTime:
    """All calls of one operation or kernel, by name."""

    name: str
    calls: int
    seconds: float  # without nested operations
    share: float  # of all operations


@dataclass(frozen=True)
class SpanTime:
    """All calls of one span."""

    name: str
    count: int
    total: float  # seconds on the CPU
    median: float
    gpu_median: float | None = None  # seconds from the first to the last work on the GPU
    gaps: float | None = None  # share of the GPU's time, in steady chunks
    account: "Account | None" = None  # of its time on the GPU, in steady chunks


@dataclass(frozen=True)
class Account:
    """What a span's time on the GPU consists of: seconds a call of the span, the mean over its calls.

    `seconds` is the sum of `kernels` plus `idle` minus `overlap`.
    """

    seconds: float  # from the first to the last piece of its work
    kernels: tuple[OperationTime, ...]  # `calls` in a call of the span, `share` of `seconds`
    idle: float  # none of its kernels runs
    overlap: float  # counted more than once, as kernels run at the same time


@dataclass(frozen=True)
class Summary:
    """The numbers computed from a trace."""

    operations: tuple[OperationTime, ...]  # on the CPU, longest first
    kernels: tuple[OperationTime, ...]  # on the GPU, copies and fills included
    spans: tuple[SpanTime, ...]  # in order of appearance
    chunks: int  # over which the gaps are measured
    gaps: float | None  # share of the GPU's time; None without a GPU
    timeline: tuple[StageInterval, ...]  # of the last chunk that another follows; on a GPU, where the spans ran


# --- The arithmetic -------------------------------------------------------------------------------------------------


def merge_intervals(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, as sorted intervals that do not touch."""
    union: list[Interval] = []
    for begin, end in sorted(intervals):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((begin, end))
    return union


def gap_share(busy: Iterable[Interval], windows: Iterable[Interval]) -> float | None:
    """The share of the windows that no busy interval covers, None if they have no length; both may overlap."""
    covers, extents = merge_intervals(busy), merge_intervals(windows)
    length = sum(end - begin for begin, end in extents)
    if not length:
        return None
    ends = [end for _, end in covers]
    covered = 0.0
    for begin, end in extents:
        for i in range(bisect_right(ends, begin), len(covers)):
            if covers[i][0] >= end:
                break
            covered += min(end, covers[i][1]) - max(begin, covers[i][0])
    return 1 - covered / length


def extent(intervals: Sequence[Interval]) -> Interval | None:
    """From the earliest begin to the latest end; None if there are no intervals."""
    if not intervals:
        return None
    return min(begin for begin, _ in intervals), max(end for _, end in intervals)


def chunk_intervals(spans: Iterable[tuple[str, Interval]]) -> list[Interval]:
    """For each chunk, from the begin of its first span to the end of its last; `spans` are sorted by begin."""
    found: list[list[Interval]] = []
    before = None
    for name, interval in spans:
        if not found or (name == CHUNK_BEGIN != before):
            found.append([])
        found[-1].append(interval)
        before = name
    return [(of_chunk[0][0], max(end for _, end in of_chunk)) for of_chunk in found]


@dataclass(frozen=True)
class _GpuWork:
    """All work on the GPU, in the order of its launch."""

    launched: list[float]  # seconds
    ran: list[Interval]
    names: list[str]

    def places(self, windows: Iterable[Interval]) -> list[slice]:
        """For each window in which work was launched, where that work is."""
        found = (slice(bisect_left(self.launched, begin), bisect_right(self.launched, end)) for begin, end in windows)
        return [place for place in found if place.start < place.stop]

    def extents(self, windows: Iterable[Interval]) -> list[Interval]:
        """For each window in which work was launched, from the begin of its first to the end of its last piece."""
        return [found for place in self.places(windows) if (found := extent(self.ran[place]))]

    def account(self, windows: Iterable[Interval]) -> Account | None:
        """What the extents of these windows consist of, on average; None if no work was launched in them."""
        if not (places := self.places(windows)):
            return None
        total = busy = 0.0
        seconds: defaultdict[str, float] = defaultdict(float)
        calls: Counter[str] = Counter()
        for place in places:
            ran = self.ran[place]
            begin, end = extent(ran) or (0.0, 0.0)
            total += end - begin
            busy += sum(b - a for a, b in merge_intervals(ran))
            for name, (a, b) in zip(self.names[place], ran, strict=True):
                seconds[name] += b - a
                calls[name] += 1
        n = len(places)
        rows = (
            OperationTime(name, round(calls[name] / n), s / n, s / total if total else 0.0)
            for name, s in seconds.items()
        )
        kernels = tuple(sorted(rows, key=lambda row: -row.seconds))
        return Account(total / n, kernels, (total - busy) / n, (sum(seconds.values()) - busy) / n)


def _interval(event: Event) -> Interval:
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6  # traces are in microseconds


def _gpu_work(events: Iterable[Event]) -> _GpuWork:
    """Pairs GPU work with its launch; work without one in the trace counts as launched when it began."""
    calls, work = {}, []
    for event in events:
        number = event.get("args", {}).get("correlation")
        if event.get("cat") in LAUNCH_CALLS and number is not None:
            calls[number] = event["ts"] / 1e6
        elif event.get("cat") in GPU_WORK:
            work.append((number, _interval(event), event["name"]))
    rows = sorted((calls.get(number, ran[0]), ran, name) for number, ran, name in work)
    return _GpuWork([launched for launched, _, _ in rows], [ran for _, ran, _ in rows], [name for _, _, name in rows])


def _self_times(events: Iterable[Event]) -> tuple[OperationTime, ...]:
    """Operations by name, without the time of operations nested inside them on the same thread."""
    own: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    threads: defaultdict[Any, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    for thread in threads.values():
        open_: list[Event] = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while open_ and open_[-1]["ts"] + open_[-1]["dur"] <= event["ts"]:
                open_.pop()
            if open_:
                own[open_[-1]["name"]] -= event["dur"] / 1e6
            own[event["name"]] += event["dur"] / 1e6
            calls[event["name"]] += 1
            open_.append(event)
    return _longest(own, calls)


def _longest(seconds: Mapping[str, float], calls: Mapping[str, int]) -> tuple[OperationTime, ...]:
    total = sum(seconds.values()) or 1.0
    rows = [OperationTime(name, calls[name], taken, taken / total) for name, taken in seconds.items()]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def summarise(events: Sequence[Event]) -> Summary:
    """Summarises the events of a Chrome trace (`traceEvents`, in microseconds); the module defines launch gaps."""
    events = [event for event in events if event.get("ph") == "X"]
    kernels: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in GPU_WORK:
            kernels[event["name"]] += event["dur"] / 1e6
            calls[event["name"]] += 1
    spans = sorted(((e["name"], _interval(e)) for e in events if e.get("cat") == SPAN), key=lambda span: span[1])
    named: defaultdict[str, list[Interval]] = defaultdict(list)
    for name, interval in spans:
        named[name].append(interval)
    work = _gpu_work(events)
    found = chunk_intervals(spans)
    # Without spans, the window is everything.
    steady = found[1:] or found or [(-math.inf, math.inf)]
    extents = work.extents(steady)
    return Summary(
        operations=_self_times(event for event in events if event.get("cat") == OPERATION),
        kernels=_longest(kernels, calls),
        spans=tuple(_span(name, intervals, work, steady[0][0]) for name, intervals in named.items()),
        chunks=len(extents) if spans else 0,
        gaps=gap_share(work.ran, extents),
        timeline=_timeline(events, set(named)),
    )


def _timeline(events: Sequence[Event], names: Collection[str]) -> tuple[StageInterval, ...]:
    found = [e for e in events if e["name"] in names and e.get("cat") in (SPAN, GPU_SPAN)]
    on_gpu = [e for e in found if e["cat"] == GPU_SPAN]
    calls = sorted(on_gpu or found, key=lambda event: event["ts"])
    begins = _first_steps(calls)
    if len(begins) > 1:
        calls = calls[begins[-2] : begins[-1]]
    streams: dict[Any, int] = {}
    intervals = []
    for event in calls:
        stream = streams.setdefault(event.get("tid"), len(streams))
        begin, end = (at - _interval(calls[0])[0] for at in _interval(event))
        intervals.append(StageInterval(event["name"], stream, begin, end))
    return tuple(intervals)


def _first_steps(calls: Sequence[Event]) -> list[int]:
    """Indices at which chunks begin: at a step that follows anything else on its stream."""
    before: dict[Any, str] = {}
    begins = []
    for i, event in enumerate(calls):
        if event["name"] == STEP != before.get(event.get("tid")):
            begins.append(i)
        before[event.get("tid")] = event["name"]
    return begins


def _span(name: str, calls: Sequence[Interval], work: _GpuWork, since: float) -> SpanTime:
    seconds = [end - begin for begin, end in calls]
    steady = [window for window in calls if window[0] >= since]
    extents = work.extents(steady)
    return SpanTime(
        name,
        len(calls),
        sum(seconds),
        statistics.median(seconds),
        statistics.median(end - begin for begin, end in extents) if extents else None,
        gap_share(work.ran, extents),
        work.account(steady),
    )


# --- The command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """What to run: a module, as in `python -m`, or a script; and its arguments."""

    name: str
    module: bool
    arguments: tuple[str, ...]


def parse_command(arguments: Sequence[str]) -> Program:
    """The program that a Python command line names. Raises `UserError` if it is not one, or does not exist."""
    python, *rest = arguments or [""]
    if python != sys.executable and not re.fullmatch(r"python[\d.]*", Path(python).name):
        what = f"trace cannot run {python}: it runs a command of Python" if python else "trace needs a command"
        raise UserError(f"{what}; {EXAMPLE}")
    module = rest[:1] == ["-m"]
    if not (rest := rest[module:]) or rest[0].startswith("-"):
        raise UserError(f"trace runs python -m MODULE or python SCRIPT; {EXAMPLE}")
    program = Program(rest[0], module, tuple(rest[1:]))
    if module and not _runnable(program.name):
        raise UserError(f"there is no module {program.name} that python -m could run; check its name and the folder")
    if not module and not Path(program.name).is_file():
        raise UserError(f"there is no script {program.name}; check its name and the folder")
    return program


def _runnable(module: str) -> bool:
    with suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(module)
        if spec and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
        return spec is not None
    return False


def run_program(program: Program) -> int:
    """Runs the program in this process and returns its exit code; restores arguments, paths and signals afterwards."""
    argv, path, handlers = sys.argv, sys.path.copy(), {number: signal.getsignal(number) for number in SIGNALS}
    sys.argv = [program.name, *program.arguments]
    try:
        if program.module:
            runpy.run_module(program.name, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(program.name).resolve().parent))
            runpy.run_path(program.name, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    finally:
        sys.argv, sys.path[:] = argv, path
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def export_trace(profiler: torch.profiler.profile, out: Path) -> list[Event]:
    """Writes the profiler's recording as a Chrome trace, atomically, and returns its events.

    `out` ends in .json, or in .json.gz to be compressed; its folder must exist. Raises `UserError` if it cannot be
    written.
    """
    try:
        with replacing(out, f".part-{out.name}") as temporary:  # the profiler compresses if the name ends in .gz
            profiler.export_chrome_trace(str(temporary))
            with gzip.open(temporary, "rt") if out.suffix == ".gz" else temporary.open() as file:
                events = json.load(file)["traceEvents"]
    except (OSError, ValueError, KeyError) as error:  # a full disk shows up when the file is read back
        raise UserError(f"{out} could not be written whole ({error}); name another place") from error
    return events


def trace_command(arguments: list[str], out: Path, top: int, as_json: bool) -> int:
    """Implements `python -m profiling trace -- COMMAND`; returns the command's exit code, re-raises its exception."""
    program = parse_command(arguments)
    if not out.name.endswith((".json", ".json.gz")):
        raise UserError(f"--out {out}: a trace is called NAME.json or NAME.json.gz; the command goes behind --")
    if top < 1:
        raise UserError(f"--top {top}: at least 1 is needed")
    check_writable(out)  # fails now and not after the work
    profiler, failure = torch.profiler.profile(), None
    try:
        with profiler, redirect_stdout(sys.stderr) if as_json else nullcontext():
            code = run_program(program)
    except Exception as error:  # of the command; the trace holds what it did until then
        code, failure = 1, error
    summary = summarise(export_trace(profiler, out))
    if as_json:
        print(as_json_text({"trace": str(out), "exit_code": code} | asdict(_top_operations(summary, top))))
    else:
        _print_summary(_top_operations(summary, top))
        print(f"{out}: open it at https://ui.perfetto.dev")
    if failure is not None:
        raise failure
    if code:
        print(f"the command ended with exit code {code}; the trace holds what it did until then", file=sys.stderr)
    return code


def _top_operations(summary: Summary, top: int) -> Summary:
    """The summary with the `top` longest operations, and with these of each span; the others are added up in one."""
    spans = tuple(replace(span, account=_top_kernels(span.account, top)) for span in summary.spans)
    return replace(summary, operations=summary.operations[:top], kernels=summary.kernels[:top], spans=spans)


def _top_kernels(account: Account | None, top: int) -> Account | None:
    if account is None or len(account.kernels) <= top:
        return account
    shown, others = account.kernels[:top], account.kernels[top:]
    calls, seconds, share = (sum(getattr(row, name) for row in others) for name in ("calls", "seconds", "share"))
    return replace(account, kernels=(*shown, OperationTime(f"{len(others)} others", calls, seconds, share)))


def _print_summary(summary: Summary) -> None:
    """Prints the tables."""
    console = terminal()
    if summary.kernels:
        console.print(_operations_table("on the GPU", summary.kernels))
    console.print(_operations_table("operation on the CPU", summary.operations))
    if summary.spans:
        console.print(_spans_table(summary.spans, on_gpu=bool(summary.kernels)))
    if accounts := [(span.name, span.account) for span in summary.spans if span.account is not None]:
        console.print(_accounts_table(accounts))
    if not summary.kernels:
        print("There is no GPU in this trace, so no launch gaps.")
    elif summary.gaps is not None:
        where = f"{summary.chunks} chunks" if summary.chunks else "everything"
        print(f"Launch gaps: {percent(summary.gaps)} of the GPU's time, over {where}.")


def _operations_table(heading: str, rows: Iterable[OperationTime]) -> Table:
    out = _table(heading, "self time", "calls", "share")
    for row in rows:
        out.add_row(escape(row.name), duration(row.seconds), str(row.calls), percent(row.share))
    return out


def _spans_table(spans: Iterable[SpanTime], on_gpu: bool) -> Table:
    gpu = ("median on GPU", "launch gaps") if on_gpu else ()
    out = _table("span", "count", "total", "median", *gpu)
    for span in spans:
        cells = (duration(span.total), duration(span.median), duration(span.gpu_median), percent(span.gaps))
        out.add_row(escape(span.name), str(span.count), *cells[: 2 + len(gpu)])
    return out


def _accounts_table(accounts: Iterable[tuple[str, Account]]) -> Table:
    """For each span, its time on the GPU, and below it what that consists of."""
    out = _table("span, kernel", "a call", "calls", "share")
    for name, account in accounts:
        out.add_section()
        out.add_row(escape(name), duration(account.seconds), style="bold")
        for row in account.kernels:
            out.add_row(f"  {escape(row.name)}", duration(row.seconds), str(row.calls), percent(row.share))
        together = sum(row.seconds for row in account.kernels)
        rest = {"sum of its kernels": together, "none of them runs": account.idle, "at the same time": -account.overlap}
        for what, seconds in rest.items():
            out.add_row(f"  [italic]{what}[/]", duration(seconds), "", percent(seconds / (account.seconds or 1.0)))
    return out


def _table(first: str, *others: str) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    room = max(20, terminal().width - sum(max(10, len(heading) + 1) for heading in others))  # kernel names are long
    out.add_column(first, overflow="ellipsis", no_wrap=True, max_width=room)
    for heading in others:
        out.add_column(heading, justify="right", no_wrap=True)
    return out
