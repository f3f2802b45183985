"""Results files in the format of another tool: one that pytest-benchmark itself wrote, read as a run."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model.errors import UserError
from profiling.analyse.compare import JSON, compare_command
from profiling.analyse.verdicts import UNMEASURED
from profiling.formats import from_json, load
from profiling.results import OK, CaseResult, Machine, Measurement, Run, save
from tests.profiling.runs import compare_runs

BENCHMARKS = """
import pytest

@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_case(benchmark, backend):
    about = dict(case="norm/tiny/fp32", operation="norm", shape="tiny", dtype="fp32", flops=8e3, bytes=4e3)
    benchmark.extra_info.update(about, backend=backend, ours=backend == "eager", world=2, calls=3.5, dims={"rows": 4})
    benchmark.pedantic(sum, args=(range(100),), rounds=7)

def test_plain(benchmark):
    benchmark.pedantic(sum, args=(range(100),), rounds=6)
"""


@pytest.fixture(scope="module")
def benchmark_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pytest-benchmark itself writes."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "test_it.py").write_text(BENCHMARKS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-json=out.json",
        "test_it.py",
    ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "out.json"


def test_a_pytest_benchmark_file_keeps_every_round(benchmark_file: Path) -> None:
    values, run = json.loads(benchmark_file.read_text()), load(benchmark_file)
    case = run.case("norm/tiny/fp32")
    assert case is not None
    assert (case.operation, case.shape, case.dtype, case.flops, case.bytes) == ("norm", "tiny", "fp32", 8e3, 4e3)
    assert (case.world, case.calls, case.dims) == (2, 3.5, {"rows": 4})
    assert [(m.backend, m.ours, m.status, len(m.samples)) for m in case.measurements] == [
        ("eager", True, OK, 7),
        ("compiled", False, OK, 7),
    ]
    assert case.measurements[0].samples == tuple(values["benchmarks"][0]["stats"]["data"])
    plain = run.case("test_it.py::test_plain")
    assert plain is not None
    assert [(m.backend, m.ours) for m in plain.measurements] == [("pytest", True)]
    assert run.machine.kind == "cpu"
    assert run.machine.versions["python"].startswith("3.")
    assert run.machine.device == values["machine_info"]["cpu"]["brand_raw"]


def test_a_pytest_benchmark_file_compares_with_itself(benchmark_file: Path) -> None:
    run = load(benchmark_file)
    assert {row.change.verdict for row in compare_runs(run, run)} == {UNMEASURED}


def test_a_pytest_benchmark_file_without_rounds_has_its_quartiles(benchmark_file: Path) -> None:
    values = json.loads(benchmark_file.read_text())
    values["commit_info"] = {"id": "abc", "dirty": True}
    for benchmark in values["benchmarks"]:
        del benchmark["stats"]["data"]
    stats, run = values["benchmarks"][0]["stats"], from_json(values, "file")
    assert run.cases[0].measurements[0].samples == (stats["q1"], stats["median"], stats["q3"])
    assert run.machine.revision == "abc-dirty"


def slower(values: dict, factor: float) -> dict:
    """The same benchmarks, each round `factor` times as long."""
    values = copy.deepcopy(values)
    for benchmark in values["benchmarks"]:
        benchmark["stats"]["data"] = [factor * seconds for seconds in benchmark["stats"]["data"]]
    return values


@pytest.mark.parametrize("about", [{}, {"backend": "numpy"}, {"size": 3, "shape": "large"}, {"ours": False}])
def test_benchmarks_of_others_regress(benchmark_file: Path, about: dict, tmp_path: Path) -> None:
    """Whatever they note about themselves, also if nothing in a file is called ours."""
    values = json.loads(benchmark_file.read_text())
    values["benchmarks"] = [benchmark | {"extra_info": about} for benchmark in values["benchmarks"][2:]]
    for day, name, factor in ((1, "before", 1), (2, "after", 10), (3, "even", 1.001)):
        content = slower(values, factor) | {"datetime": f"2026-01-0{day}T00:00:00+00:00"}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    before, after, even = (str(tmp_path / f"{name}.json") for name in ("before", "after", "even"))
    assert compare_command(before, after, [], 0.02, False, tmp_path, None, JSON) == 1
    assert compare_command(before, even, [], 0.02, False, tmp_path, None, JSON) == 0
    assert compare_command(after, before, [], 0.02, False, tmp_path, None, JSON) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300, "fast", None, True])
@pytest.mark.parametrize("where", ["data", "median", "flops", "bytes", "calls"])
def test_what_is_no_number_of_seconds_is_refused(benchmark_file: Path, bad: object, where: str) -> None:
    """It would compare as neither more nor less."""
    values = json.loads(benchmark_file.read_text())
    benchmark = values["benchmarks"][0]
    if where == "data":
        benchmark["stats"]["data"][3] = bad
    elif where == "median":
        benchmark["stats"] = {name: x for name, x in benchmark["stats"].items() if name != "data"} | {"median": bad}
    else:
        benchmark["extra_info"][where] = bad
    name = f"norm/tiny/fp32.{'seconds' if where in ('data', 'median') else where}"
    with pytest.raises(UserError) as caught:
        from_json(values, "file")
    assert str(caught.value) == f"file is damaged: {name} is {bad!r}, wanted a finite number"


def test_a_negative_time_is_refused(benchmark_file: Path) -> None:
    values = json.loads(benchmark_file.read_text())
    values["benchmarks"][0]["stats"]["data"][3] = -1e-3
    with pytest.raises(UserError, match=r"^file is damaged: norm/tiny/fp32 took -0\.001 s, wanted no negative time$"):
        from_json(values, "file")


@pytest.mark.parametrize("spoil", ["stats", "fullname"])
def test_a_damaged_pytest_benchmark_file_is_refused(benchmark_file: Path, spoil: str) -> None:
    values = json.loads(benchmark_file.read_text())
    del values["benchmarks"][2][spoil]
    with pytest.raises(UserError, match=f"file is damaged: KeyError '{spoil}'"):
        from_json(values, "file")


def test_a_pytest_benchmark_file_with_names_of_version_1_has_the_present_ones(benchmark_file: Path) -> None:
    values = json.loads(benchmark_file.read_text())
    for benchmark in values["benchmarks"][:2]:
        facts = {"case": "time_conv/tiny/fp32", "operation": "time_conv", "shape": "tiny", "dims": {"rows": 4}}
        benchmark["extra_info"] |= facts
    facts = {"case": "conv_norm/tiny/fp32", "operation": "conv_norm", "shape": "tiny", "backend": "apart"}
    values["benchmarks"].append(copy.deepcopy(values["benchmarks"][0]))
    values["benchmarks"][-1]["extra_info"] |= facts
    run = from_json(values, "file")
    normed = run.case("causal_conv3d_norm/tiny/fp32")
    assert normed is not None
    assert [m.backend for m in normed.measurements] == ["separate"]
    case = run.case("causal_conv3d/tiny-time/fp32")
    assert case is not None
    assert (case.operation, case.shape, case.dims) == ("causal_conv3d", "tiny-time", {"rows": 4, "kt": 3, "k": 1})
    assert [len(m.samples) for m in case.measurements] == [7, 7]
    assert run.case("test_it.py::test_plain") is not None


def test_what_another_program_measured_is_a_peer(tmp_path: Path) -> None:
    """The probe of 2026-11-26 had kernels of its own, which met goals of this repository's."""
    measurement = Measurement("triton w8", OK, ours=True, samples=(0.1,))
    case = CaseResult("o/s/bf16", "o", "s", "bf16", 1.0, 1.0, measurements=(measurement,))
    run = Run("probe.py --out x", "2026-01-01", Machine("cuda", "NVIDIA H100", 132, 80), cases=(case,))
    for command, ours in (("probe.py --out x", False), ("bench", True), ("gpu --phase bench", True)):
        save(replace(run, command=command), tmp_path / "run.json")
        assert load(tmp_path / "run.json").cases[0].measurements == (replace(measurement, ours=ours),)
