"""The registry under pytest-benchmark: which benchmarks run, and what its file says about the machine."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from model.errors import UserError
from profiling.__main__ import main
from profiling.formats import from_json, load
from profiling.machine import describe_machine
from profiling.results import Machine
from tests.processes import ROOT, Interpreter

MEASURE = ROOT / "tests" / "profiling" / "measure"


def benchmarks(python: Interpreter, folder: Path, cases: Path) -> CompletedProcess[str]:
    command = ["-m", "pytest", "-p", "no:cacheprovider", "--benchmark-only", f"--cases={cases}"]
    options = [f"--benchmark-json={folder / 'out.json'}", "-k", "small"]
    return python.run(*command, *options, MEASURE / "test_benchmarks.py", MEASURE / "test_timing.py")


@pytest.fixture(scope="module")
def file(python: Interpreter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmarks of a file of cases. Other tests are deselected rather than skipped one by one."""
    folder = tmp_path_factory.mktemp("benchmarks")
    done = benchmarks(python, folder, ROOT / "examples" / "my_kernel.py")
    assert done.returncode == 0, done.stdout
    assert "SKIPPED" not in done.stdout
    return folder / "out.json"


def test_a_file_of_cases_joins_and_the_machine_is_named(file: Path) -> None:
    run = load(file)
    here = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert (run.machine.kind, run.machine.device, run.machine.versions) == (here.kind, here.device, here.versions)
    (case,) = run.cases
    assert case.case == "gated_rms_norm/small/fp32"
    assert "torch" in {m.backend for m in case.measurements}


def test_a_file_without_cases_ends_in_one_line(python: Interpreter, tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    done = benchmarks(python, tmp_path, tmp_path / "empty.py")
    assert done.returncode != 0
    assert "gives no CASES" in done.stdout + done.stderr


def test_files_of_two_gpus_never_pass_as_one_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, file: Path
) -> None:
    values = json.loads(file.read_text())
    paths = []
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        gpu = Machine("cuda", name, 132, 80 * 10**9, "9.0", 50 * 2**20, "570.86.15", {"triton": "3.6.0"}, "abc")
        values["machine_info"]["profiling"] = asdict(gpu)
        paths.append(tmp_path / f"{len(paths)}.json")
        paths[-1].write_text(json.dumps(values))
        assert load(paths[-1]).machine == gpu
    monkeypatch.setattr(sys, "argv", ["profiling", "compare", *map(str, paths)])
    assert main() == 2
    assert "NVIDIA H200" in capsys.readouterr().err


def test_a_damaged_machine_is_refused(file: Path) -> None:
    values = json.loads(file.read_text())
    values["machine_info"]["profiling"] = {"kind": "cuda", "device": 7, "units": 132, "memory_bytes": 1}
    with pytest.raises(UserError, match=r"^file is damaged: machine_info.profiling.device is 7"):
        from_json(values, "file")
