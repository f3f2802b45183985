"""The arithmetic on hand-made events, and commands traced from end to end on the CPU."""

import gzip
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from model.errors import UserError
from profiling.__main__ import main
from profiling.measure import trace as trace_module
from profiling.measure.trace import Event, chunk_intervals, gap_share, merge_intervals, parse_command, summarise
from profiling.results import StageInterval

EXAMPLES = Path(__file__).parents[3] / "examples"
SPANS = ["audio", "denoise/step", "decode", "color", "motion"]


def event(cat: str, name: str, begin: float, end: float, thread: int = 1, **arguments: object) -> Event:
    """As torch writes it; times in seconds here, in microseconds there."""
    times = {"ts": begin * 1e6, "dur": (end - begin) * 1e6}
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": thread, **times, "args": arguments}


def span(name: str, begin: float, end: float) -> Event:
    return event("user_annotation", name, begin, end)


def launched(number: int, at: float, begin: float, end: float, stream: int = 7, cat: str = "kernel") -> list[Event]:
    """A piece of GPU work and the call that launched it."""
    call = event("cuda_runtime", "cudaLaunchKernel", at, at + 0.001, correlation=number)
    return [event(cat, f"{cat}_{stream}", begin, end, thread=stream, correlation=number), call]


# --- The arithmetic -------------------------------------------------------------------------------------------------

intervals = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=12
)


@given(intervals, intervals)
def test_the_gap_share_is_that_of_counted_seconds(busy: list, windows: list) -> None:
    """Whole seconds can be counted one by one."""
    seen = {second for begin, end in windows for second in range(begin, end)}
    idle = seen - {second for begin, end in busy for second in range(begin, end)}
    share = gap_share(busy, windows)
    if not seen:
        assert share is None
    else:
        assert share == pytest.approx(len(idle) / len(seen))


@given(intervals)
def test_merged_intervals_are_apart_and_cover_the_same(found: list) -> None:
    union = merge_intervals(found)
    assert all(before[1] < after[0] for before, after in pairwise(union))
    cover = {second for begin, end in union for second in range(int(begin), int(end))}
    assert cover == {second for begin, end in found for second in range(begin, end)}


def test_streams_that_overlap_are_busy_once() -> None:
    """0-4 on one stream, 2-6 on another, a copy 8-10: two of ten seconds are gap."""
    work = [*launched(1, 0.1, 0, 4), *launched(2, 0.2, 2, 6, stream=8), *launched(3, 0.3, 8, 10, cat="gpu_memcpy")]
    summary = summarise([span("decode", 0, 1), *work])
    assert summary.gaps == pytest.approx(0.2)
    assert summary.spans[0].gpu_median == pytest.approx(10)
    assert summary.spans[0].gaps == pytest.approx(0.2)
    assert [(k.name, k.calls) for k in summary.kernels] == [("kernel_7", 1), ("kernel_8", 1), ("gpu_memcpy_7", 1)]
    assert [k.seconds for k in summary.kernels] == pytest.approx([4, 4, 2])
    assert sum(k.share for k in summary.kernels) == pytest.approx(1)


def test_a_span_has_the_work_launched_in_it_whenever_that_ran() -> None:
    """The CPU is far ahead: the first span's work runs after the second span has ended."""
    spans = [span("denoise/step", 0, 1), span("decode", 1, 2)]
    work = [*launched(1, 0.5, 5, 6), *launched(2, 0.6, 7, 8), *launched(3, 1.5, 8, 9)]
    step, decode = summarise([*spans, *work]).spans
    assert (step.gpu_median, decode.gpu_median) == (pytest.approx(3), pytest.approx(1))
    assert (step.gaps, decode.gaps) == (pytest.approx(1 / 3), pytest.approx(0))
    assert (step.total, step.median) == (pytest.approx(1), pytest.approx(1))


def test_an_outer_span_has_the_work_of_the_inner_one_too() -> None:
    spans = [span("outer", 0, 10), span("inner", 4, 6)]
    work = [*launched(1, 1, 1, 2), *launched(2, 5, 5, 6), *launched(3, 8, 8, 9)]
    outer, inner = summarise([*spans, *work]).spans
    assert (outer.name, outer.gpu_median, outer.gaps) == ("outer", pytest.approx(8), pytest.approx(5 / 8))
    assert (inner.name, inner.gpu_median, inner.gaps) == ("inner", pytest.approx(1), pytest.approx(0))


def test_a_spans_account_is_its_kernels_and_the_rest() -> None:
    """Two steps of 10 and 12 seconds: kernels of 9 and 10 seconds, of which 1 second is spent at the same time."""
    spans = [span("denoise/step", 0, 1), span("denoise/step", 1, 2)]
    first = [*launched(1, 0.1, 10, 14), *launched(2, 0.2, 14, 15, stream=8), *launched(3, 0.3, 16, 20)]
    second = [*launched(4, 1.1, 30, 36), *launched(5, 1.2, 35, 37, stream=8), *launched(6, 1.3, 40, 42)]
    elsewhere = launched(7, 5, 15, 16, stream=9)
    (step,) = summarise([*spans, *first, *second, *elsewhere]).spans
    account = step.account
    assert account is not None
    assert account.seconds == pytest.approx((10 + 12) / 2)
    assert [(k.name, k.calls) for k in account.kernels] == [("kernel_7", 2), ("kernel_8", 1)]
    assert [k.seconds for k in account.kernels] == pytest.approx([(8 + 8) / 2, (1 + 2) / 2])
    assert [k.share for k in account.kernels] == pytest.approx([16 / 22, 3 / 22])
    assert account.idle == pytest.approx((1 + 3) / 2)
    assert account.overlap == pytest.approx((0 + 1) / 2)
    total = sum(k.seconds for k in account.kernels) + account.idle - account.overlap
    assert total == pytest.approx(account.seconds)


def test_an_account_without_its_short_kernels_has_their_sum(capsys: pytest.CaptureFixture[str]) -> None:
    work = [part for i in range(4) for part in launched(i, 0.1, 10 + i, 11 + i, stream=i)]
    summary = trace_module._top_operations(summarise([span("decode", 0, 1), *work]), 1)
    account = summary.spans[0].account
    assert account is not None
    assert [(k.name, k.calls, k.seconds) for k in account.kernels[1:]] == [("3 others", 3, pytest.approx(3))]
    trace_module._print_summary(summary)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["3", "others", "3.00", "s", "3", "75%"] in lines
    assert ["sum", "of", "its", "kernels", "4.00", "s", "100%"] in lines


def test_the_timeline_is_from_step_to_step_on_the_gpus_streams() -> None:
    """Where its work ran, not where it was launched; a lane for each stream, in the order in which they begin."""
    steps = [(1, "denoise/step", 7), (2, "denoise/step", 7), (3, "decode", 13), (5, "decode", 7), (6, "motion", 7)]
    beside = [(7, "audio", 9), (9, "decode", 13)]  # the next chunk's, and what is finished while that begins
    calls = [(0, "audio", 7), *steps, *beside]
    later = [(t + 10, name, stream) for t, name, stream in calls]

    def timeline(calls: Sequence[tuple[float, str, int]]) -> tuple[StageInterval, ...]:
        spans = [span(name, t / 100, t / 100 + 0.001) for t, name, _ in calls]
        ran = [event("gpu_user_annotation", name, t, t + 1.5, thread=stream) for t, name, stream in calls]
        return summarise([*spans, *ran, event("gpu_user_annotation", "somebody's", 5, 6, thread=9)]).timeline

    found = timeline([*calls, *later])
    streams = {7: 0, 13: 1, 9: 2}
    wanted = [*steps, *beside, (10, "audio", 7)]
    assert [(s.stage, s.stream) for s in found] == [(name, streams[stream]) for _, name, stream in wanted]
    assert [s.begin for s in found] == pytest.approx([t - 1 for t, *_ in wanted])
    assert all(s.end - s.begin == pytest.approx(1.5) for s in found)
    assert [s.stage for s in timeline(calls)] == [name for _, name, _ in calls]
    on_a_cpu = [span(name, t, t + 0.5) for t, name, _ in [*calls, *later]]
    assert [s.stage for s in summarise(on_a_cpu).timeline] == [name for _, name, _ in wanted]
    assert summarise([]).timeline == ()


def test_the_first_of_several_chunks_and_the_time_between_chunks_do_not_count() -> None:
    """Chunk 1 is half gap, chunk 2 a quarter, the rest of a third one none; between them the GPU waits for sound."""
    spans = [span(name, t, t + 1) for t, name in [(0, "audio"), (4, "motion"), (20, "audio"), (24, "motion")]]
    work = [*launched(1, 0.5, 1, 2), *launched(2, 4.5, 4, 5)]
    work += [*launched(3, 20.5, 21, 23), *launched(4, 24.5, 24, 25)]
    work += launched(5, 50.5, 51, 55)
    summary = summarise([*spans, span("audio", 50, 52), *work])
    assert summary.chunks == 2
    assert summary.gaps == pytest.approx(1 / 8)
    audio, motion = summary.spans
    assert (audio.count, motion.count) == (3, 2)
    assert audio.gpu_median == pytest.approx(3)
    only_first = summarise([*spans[:2], *work])
    assert (only_first.chunks, only_first.gaps) == (1, pytest.approx(0.5))


def test_without_spans_the_extent_is_that_of_all_work() -> None:
    summary = summarise([*launched(1, 0, 1, 2), *launched(2, 0, 4, 5)])
    assert (summary.spans, summary.chunks, summary.gaps) == ((), 0, pytest.approx(0.5))


def test_work_whose_launch_is_not_in_the_trace_counts_where_it_ran() -> None:
    orphan, _ = launched(1, 0, 0.2, 0.4)
    assert summarise([span("decode", 0, 1), orphan]).spans[0].gpu_median == pytest.approx(0.2)


def test_an_empty_trace_and_one_of_a_cpu_have_no_gaps() -> None:
    empty = summarise([])
    assert (empty.operations, empty.kernels, empty.spans, empty.gaps) == ((), (), (), None)
    cpu = summarise([{"ph": "M", "name": "process_name"}, span("decode", 0, 1), event("cpu_op", "aten::mm", 0, 1)])
    assert (cpu.gaps, cpu.chunks, cpu.spans[0].gaps, cpu.spans[0].gpu_median) == (None, 0, None, None)


def test_self_time_leaves_out_what_ran_inside_on_the_same_thread() -> None:
    events = [
        event("cpu_op", "linear", 0, 10),
        event("cpu_op", "mm", 1, 7),
        event("cpu_op", "copy", 2, 3),
        event("cpu_op", "copy", 3, 4),
        event("cpu_op", "add", 10, 12),
        event("cpu_op", "mm", 0, 8, thread=2),
        span("decode", 0, 12),
    ]
    found = {row.name: (row.seconds, row.calls) for row in summarise(events).operations}
    wanted = {"mm": (12, 2), "linear": (4, 1), "copy": (2, 2), "add": (2, 1)}
    assert found == {name: (pytest.approx(seconds), calls) for name, (seconds, calls) in wanted.items()}
    assert summarise(events).operations[0].share == pytest.approx(12 / 20)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [("", []), ("ab", [(0, 2)]), ("AbAAc", [(0, 2), (2, 5)]), ("bA", [(0, 1), (1, 2)]), ("A", [(0, 1)])],
)
def test_chunks_begin_with_audio_or_with_the_trace(names: str, wanted: list) -> None:
    spans = [("audio" if name == "A" else name, (i, i + 1)) for i, name in enumerate(names)]
    assert chunk_intervals(spans) == wanted


# --- Commands -------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from model.errors import UserError
with torch.profiler.record_function("decode"):
    x = torch.randn(64, 64) @ torch.ones(64, 64)
print("said", sys.argv[1:])
{end}
"""


def trace(monkeypatch: pytest.MonkeyPatch, options: Sequence[object], command: Sequence[object]) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "trace", *map(str, [*options, "--", *command])])
    return main()


def script(folder: Path, end: str = "") -> Path:
    path = folder / "work.py"
    path.write_text(SCRIPT.format(end=end))
    return path


def test_a_script_is_traced_with_its_spans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The file is what Perfetto takes, the table names the span and the product; arguments reach the script."""
    path = sys.path.copy()
    out = tmp_path / "t.json"
    assert trace(monkeypatch, ["--out", out], [sys.executable, script(tmp_path), "a", "--out", "b"]) == 0
    assert sys.path == path
    assert sys.argv[0] == "profiling"
    events = json.loads(out.read_text())["traceEvents"]
    whole = [e for e in events if e["ph"] == "X"]
    assert all(isinstance(e["name"], str) and e["dur"] >= 0 and {"ts", "pid", "tid"} <= set(e) for e in whole)
    assert {e["name"] for e in whole if e["cat"] == "user_annotation"} == {"decode"}
    printed = capsys.readouterr().out
    assert "said ['a', '--out', 'b']" in printed
    assert "aten::mm" in printed
    assert "decode" in printed
    assert "no GPU" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.json", "work.py"]


def test_json_is_all_there_is_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """What the command prints goes to standard error; a compressed trace is a trace."""
    out = tmp_path / "t.json.gz"
    assert trace(monkeypatch, ["--json", "--top", 2, "--out", out], ["python3", script(tmp_path)]) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert "said" in printed.err
    assert (values["trace"], values["exit_code"], values["gaps"]) == (str(out), 0, None)
    assert len(values["operations"]) == 2
    assert [(s["name"], s["count"]) for s in values["spans"]] == [("decode", 1)]
    assert json.loads(gzip.decompress(out.read_bytes()))["traceEvents"]


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit(7)", 7, "exit code 7"),
        ("sys.exit('nothing to do')", 1, "nothing to do"),
        ("sys.exit()", 0, ""),
        ("raise UserError('no face in it; take another picture')", 2, "error: no face in it; take another picture"),
        ("raise KeyboardInterrupt", 130, "exit code 130"),
    ],
)
def test_a_command_that_ends_early_gives_its_exit_code_and_keeps_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, end: str, code: int, said: str
) -> None:
    assert trace(monkeypatch, ["--out", tmp_path / "t.json"], ["python", script(tmp_path, end)]) == code
    assert said in capsys.readouterr().err
    assert '"decode"' in (tmp_path / "t.json").read_text()


def test_what_a_command_raises_is_raised_and_the_trace_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        trace(monkeypatch, ["--out", tmp_path / "t.json"], ["python", script(tmp_path, "1 / 0")])
    assert '"decode"' in (tmp_path / "t.json").read_text()


@pytest.mark.parametrize(
    ("options", "command", "said"),
    [
        ([], [], "trace needs a command"),
        ([], ["ffmpeg", "-i", "x"], "cannot run ffmpeg"),
        ([], ["python"], "python -m MODULE or python SCRIPT"),
        ([], ["python", "-c", "1"], "python -m MODULE or python SCRIPT"),
        ([], ["python", "-m"], "python -m MODULE or python SCRIPT"),
        ([], ["python", "-m", "no_such_module"], "no module no_such_module"),
        ([], ["python", "-m", "no_such.module"], "no module no_such.module"),
        ([], ["python", "-m", "kernels"], "no module kernels"),
        ([], ["python", "no_such.py"], "no script no_such.py"),
        (["--out", "talk.mp4"], ["python", "-m", "streaming"], "NAME.json"),
        (["--out", "."], ["python", "-m", "streaming"], "NAME.json"),
        (["--top", 0], ["python", "-m", "streaming"], "--top 0"),
        (["--out", "/proc/no/t.json"], ["python", "-m", "streaming"], "cannot be written"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    options: list,
    command: list,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trace(monkeypatch, options, command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_an_earlier_trace_survives_one_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler writes half of it, as on a full disk."""
    import torch

    def half(self: Any, path: str) -> None:
        Path(path).write_text('{"traceEvents": [')

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", half)
    out = tmp_path / "t.json"
    out.write_text("earlier")
    assert trace(monkeypatch, ["--out", out], ["python", script(tmp_path)]) == 2
    assert out.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.json", "work.py"]


@pytest.mark.parametrize("python", ["python", "python3", "python3.12", "/usr/bin/python3", sys.executable])
def test_python_executables_are_recognised_by_name(python: str) -> None:
    program = parse_command([python, "-m", "streaming", "run", "--out", "-"])
    assert (program.name, program.module, program.arguments) == ("streaming", True, ("run", "--out", "-"))


def test_other_executables_are_refused() -> None:
    with pytest.raises(UserError, match=r"python -m streaming run"):
        parse_command(["pythonic", "-m", "streaming"])


def test_a_streaming_run_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A whole chunk: the loop's spans, as often as it passes them; what the sink's thread does is not traced."""
    soundfile.write(tmp_path / "v.wav", 0.1 * np.random.default_rng(0).standard_normal(17920), 16000)
    inputs = ["--image", EXAMPLES / "portrait.jpg", "--audio", tmp_path / "v.wav", "--out", tmp_path / "v.mp4"]
    command = ["python", "-m", "streaming", "run", "--device", "cpu", "--steps", 1, *inputs]
    assert trace(monkeypatch, ["--json", "--out", tmp_path / "t.json"], command) == 0
    assert (tmp_path / "v.mp4").stat().st_size
    spans = {s["name"]: s for s in json.loads(capsys.readouterr().out)["spans"]}
    assert list(spans) == SPANS
    assert {name: spans[name]["count"] for name in ("denoise/step", "decode", "motion")} == {
        "denoise/step": 1,
        "decode": 6,
        "motion": 1,
    }
    assert all(s["median"] > 0 for s in spans.values())
