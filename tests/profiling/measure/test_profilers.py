"""One back-end of one case under a profiler: which command line, and what runs inside the profiler's range."""

import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from profiling.__main__ import main
from profiling.measure import profilers
from profiling.measure.profilers import PROTON_CALLS, WARM_UP_CALLS, profile_once, profile_with_proton
from tests.profiling import toy

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "my_kernel.py"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["profiling", "bench", *map(str, arguments)])
    return main()


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_the_tool_its_command_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["14b", "--cases", EXAMPLE, "--backend", "triton", "--sweep", "rows=64:64:x2", "--out", "a b"]
    assert call(monkeypatch, "gated_rms_norm/14b", *arguments[1:], "--ncu") == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[0] == "ncu"
    assert words[words.index("--export") + 1] == "a b"
    assert words[words.index("--profile-from-start") + 1] == "off", "only the range of --once"
    again = words[words.index(sys.executable) :]
    assert again[1:4] == ["-m", "profiling", "bench"]
    assert again[4:] == [
        "gated_rms_norm/14b", "--backend", "triton", "--once", "--sweep", "rows=64:64:x2", "--cases", str(EXAMPLE)
    ]  # fmt: skip
    assert call(monkeypatch, "gated_rms_norm/14b", "--cases", EXAMPLE, "--backend", "triton", "--proton") == 0
    command, viewer = capsys.readouterr().out.splitlines()
    assert "--proton --cases" in command
    assert viewer == "proton-viewer -m tflop/s,time/us gated_rms_norm-14b-bf16-triton.hatchet"


def test_with_a_gpu_and_the_tool_it_runs_and_its_exit_code_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def run(command: list[str]) -> SimpleNamespace:
        seen.append(command)
        return SimpleNamespace(returncode=9)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profilers.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(profilers.subprocess, "run", run)
    assert call(monkeypatch, "gated_rms_norm/14b", "--cases", EXAMPLE, "--backend", "triton", "--ncu") == 9
    assert seen[0][:3] == ["ncu", "--set", "full"]
    assert capsys.readouterr().out == ""


class Profiler:
    """Records what runs inside a range, as cudaProfilerStart and NVTX would."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.calls: list[tuple[str, ...]] = []

    @contextmanager
    def range(self, name: str) -> Any:
        self.open.append(name)
        yield
        self.open.pop()

    def doubled(self, x: Tensor) -> Tensor:
        self.calls.append(tuple(self.open))
        return x * 2


def test_once_is_one_call_in_the_range_after_those_that_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = Profiler()
    monkeypatch.setattr(torch.cuda.profiler, "profile", lambda: profiler.range("profiled"))
    monkeypatch.setattr(torch.cuda.nvtx, "range", profiler.range)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(profilers, "_warm_call", lambda case, backend, _: WARM[0](case, backend, CPU))
    case = toy.case("toy", toy.ours(profiler.doubled))
    profile_once(case, case.backends[0], torch.device("cuda"))
    assert profiler.calls == [()] * WARM_UP_CALLS + [("profiled", "toy/toy/fp32 ours")]


WARM = [profilers._warm_call]


def test_once_runs_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["toy_good", "--cases", toy.__file__, "--backend", "ours", "--device", "cpu", "--once"]
    assert call(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out == ""


def test_proton_gets_flops_and_bytes_with_every_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profiler, log = Profiler(), []

    def scope(name: str, metrics: dict[str, float]) -> Any:
        log.append((name, metrics))
        return profiler.range(name)

    fake = SimpleNamespace(
        start=lambda name, hook: log.append((name, hook)), scope=scope, finalize=lambda: log.append("end")
    )
    monkeypatch.setattr(triton, "profiler", fake, raising=False)
    case = toy.case("toy", toy.ours(profiler.doubled))
    profile_with_proton(case, case.backends[0], CPU, tmp_path / "new" / "run")
    name = "toy/toy/fp32 ours"
    assert log == [
        (str(tmp_path / "new" / "run"), "triton"),
        *[(name, {"flops": 1000.0, "bytes": 8000.0})] * PROTON_CALLS,
        "end",
    ]
    assert profiler.calls == [()] * WARM_UP_CALLS + [(name,)] * PROTON_CALLS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["toy", "--once"], "of which toy_good/toy/fp32 is the first; name one"),
        (["toy_good", "--once"], "choose one back-end of toy_good/toy/fp32 by --backend; cpu has ours, peer"),
        (["toy_good", "--once", "--backend", "third"], "they have ours, peer"),
        (["toy_good", "--once", "--ncu"], "--once and --ncu: only one"),
    ],
)
def test_mistakes_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert call(monkeypatch, *arguments, "--cases", toy.__file__, "--device", "cpu") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
