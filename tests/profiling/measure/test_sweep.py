"""Sweeps over a dimension: which sizes, which cases, what is drawn; and the CSV of a run."""

import csv
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model.errors import UserError
from profiling.__main__ import main
from profiling.cases import registry
from profiling.formats import load
from profiling.measure.sweep import parse_sweep, swept_cases, write_plot
from profiling.results import OK, Ceilings, Measurement, Run
from profiling.tables import measurement_csv, measurement_rows
from tests.profiling import runs, toy


@pytest.mark.parametrize(
    ("text", "names", "sizes"),
    [
        ("n=8:64:x2", ("n",), (8, 16, 32, 64)),
        ("n=8:63:x2", ("n",), (8, 16, 32)),
        ("n=100:300:+100", ("n",), (100, 200, 300)),
        ("n=7:7:+1", ("n",), (7,)),
        ("queries=keys=1:9:x3", ("queries", "keys"), (1, 3, 9)),
    ],
)
def test_sizes(text: str, names: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    sweep = parse_sweep(text)
    assert (sweep.names, sweep.sizes) == (names, sizes)


@pytest.mark.parametrize(
    "text",
    ["n", "n=8", "n=8:64", "n=8:64:2", "n=64:8:x2", "n=0:8:x2", "n=8:64:x1", "n=8:64:+0", "n=1:1000:+1", "=1:2:x2"],
)
def test_no_sweep_is_a_mistake(text: str) -> None:
    with pytest.raises(UserError, match=r"^--sweep "):
        parse_sweep(text)


def test_dimensions_are_set_together_and_the_case_is_another_one() -> None:
    case = registry()["chunk_attention/14b-w1/bf16"]
    small, large = swept_cases([case], parse_sweep("queries=keys=512:1024:x2"))
    assert small.name == "chunk_attention/14b-w1-queries=keys=512/bf16"
    assert large.shape.dims == {**case.shape.dims, "queries": 1024, "keys": 1024}
    assert large.flops == pytest.approx(4 * small.flops)
    assert large.shape.calls == 0, "it would be counted in projections"


def test_the_command_measures_each_size_and_draws_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "run.json", tmp_path / "plot.svg"
    command = ["bench", "toy_good", "--cases", toy.__file__, "--device", "cpu", "--rounds", "2", "--csv"]
    command += ["--sweep", "n=10:40:x2", "--out", str(out), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["profiling", *command])
    assert main() == 0
    assert [case.dims["n"] for case in load(out).cases] == [10, 20, 40]
    assert plot.read_text().startswith("<?xml")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["backend"], row["dims.n"]) for row in rows] == [
        (b, n) for n in ("10", "20", "40") for b in ("ours", "peer")
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sweep", "m=1:2:x2"], "toy_good/toy/fp32 has no dimension m, but n"),
        (["--plot", "plot.svg"], "add one, such as"),
        (["--sweep", "n=1:2:x2", "--plot", "plot.pdf"], "must end in .png or .svg"),
        (["--sweep", "n=1:2:x2", "--plot", "/proc/none/plot.png"], "cannot be written"),
        (["--json", "--csv"], "leave one of them out"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    command = ["profiling", "bench", "toy_good", "--cases", toy.__file__, "--device", "cpu", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def swept_run() -> Run:
    """Two cases of the registry at three sizes; one back-end of one size is missing."""
    sweep = parse_sweep("rows=512:2048:x2")
    names = ("linear/14b-w1-out/bf16", "layer_norm_modulate/14b-w1/bf16")
    template = runs.run(patterns=names)
    results = []
    for name in names:
        known = template.case(name)
        assert known is not None
        for case in swept_cases([registry()[name]], sweep):
            result = replace(
                known,
                case=case.name,
                shape=case.shape.name,
                dims=dict(case.shape.dims),
                flops=case.flops,
                bytes=case.bytes,
            )
            results.append(result)
    results[0] = replace(results[0], measurements=results[0].measurements[1:])
    return replace(template, cases=tuple(results))


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_plot_of_a_run_is_the_same_every_time(tmp_path: Path, suffix: str) -> None:
    run, sweep = swept_run(), parse_sweep("rows=512:2048:x2")
    files = [tmp_path / f"{i}{suffix}" for i in range(2)]
    for file in files:
        write_plot(run, sweep, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    write_plot(replace(run, ceilings=Ceilings()), sweep, tmp_path / f"no-ceiling{suffix}")
    assert (tmp_path / f"no-ceiling{suffix}").read_bytes() != files[0].read_bytes()


def test_quantiles_are_those_of_the_samples() -> None:
    known = runs.run(patterns=["layer_norm_modulate/14b-w1/bf16"])
    samples = tuple(float(i) for i in range(1, 12))
    measured = (Measurement("a", OK, samples=samples), Measurement("b", OK, samples=(2.0,)), Measurement("c", "error"))
    a, b, c = measurement_rows(replace(known, cases=(replace(known.cases[0], measurements=measured),)))
    assert (a.p20, a.seconds, a.p80) == (3.0, 6.0, 9.0)
    assert (b.p20, b.seconds, b.p80) == (None, 2.0, None)
    assert (c.p20, c.seconds, c.p80) == (None, None, None)


def test_csv_has_a_row_for_each_measurement_and_a_column_for_each_dimension() -> None:
    run = runs.run(patterns=["layer_norm_modulate/14b-w1/bf16", "quantize_rows/14b-w1-wide/fp8"])
    rows = list(csv.DictReader(io.StringIO(measurement_csv(run))))
    assert [(row["case"], row["backend"]) for row in rows] == [(r.case, r.backend) for r in measurement_rows(run)]
    assert [float(row["seconds"]) for row in rows if row["seconds"]] == [
        r.seconds for r in measurement_rows(run) if r.seconds
    ]
    assert {row["dims.columns"] for row in rows} == {"5120", "13824"}
