"""The generated documents: where each row comes from, which measurement is shown, and what `--check` says."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from profiling.__main__ import main
from profiling.analyse import project
from profiling.analyse.calls import Call, call
from profiling.analyse.project import Projector, Setting, assumptions
from profiling.analyse.recipe import Recipe, StageWork
from profiling.analyse.targets import MISSED, Target, TargetResult
from profiling.report.performance import (
    BEGIN,
    CLUSTER,
    END,
    PAGE,
    PRECISION,
    README,
    performance_page,
    projections,
    readme_table,
    step_table,
    with_tables,
)
from profiling.results import OK, CaseResult, Ceilings, Machine, Measurement, Run, VariantResult
from tests.profiling import runs
from tests.profiling.analyse import made_up

H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 132, 80, "9.0", revision="0123456789abcdef-dirty")
NAME = "linear/14b-w1-up/fp8"


def linear(*measurements: Measurement) -> CaseResult:
    dims = {"rows": 12096, "inputs": 5120, "outputs": 13824}
    return CaseResult(NAME, *NAME.split("/"), flops=4e12, bytes=1e9, dims=dims, measurements=measurements)


def timed(backend: str, seconds: float, ours: bool = False) -> Measurement:
    return Measurement(backend, OK, ours, samples=(seconds,))


def run(*cases: CaseResult, started: str = "2026-02-01T00:00:00+00:00", **more: Any) -> Run:
    return Run("bench", started, replace(H100), cases=cases, ceilings=Ceilings(3e12, {"fp8": 1.5e15}, True), **more)


def variant(name: str, step: float) -> VariantResult:
    stages = {"denoise/step": (step,) * 4, "decode": (0.1, 0.2), "motion": (0.02,)}
    return VariantResult(name, OK, stages=stages, chunk=(2.0,), first_frame=(1.5,), frames=28, peak_bytes=2**30, gaps=0)


CASES = linear(timed("gluon", 0.0020, ours=True), timed("library", 0.0016, ours=True), timed("scaled-mm-row", 0.0018))


def rows(page: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]


def test_the_fastest_the_default_and_the_best_peer_are_columns_of_their_own() -> None:
    (row,) = rows(performance_page([("profiling/results/2026-02-01-a.json", run(CASES))]))
    assert row[:6] == [
        f"`{NAME}`", "library 1.60 ms, 2500 TFLOP/s", "167%! compute", "gluon 2.00 ms", "scaled-mm-row 1.80 ms", "1.12"
    ]  # fmt: skip
    source = ["[2026-02-01-a](../profiling/results/2026-02-01-a.json)", "2026-02-01", "H100 80GB HBM3"]
    assert row[6:] == [*source, "012345678-dirty"]


def test_a_case_above_its_ceiling_is_explained() -> None:
    page = performance_page([("profiling/results/a.json", run(CASES))])
    assert f"`{NAME}`, library, is above its ceiling (!): another algorithm, with fewer FLOPs" in page


def test_the_newest_measurement_is_shown_and_none_of_other_programs() -> None:
    older, newer = run(CASES), run(linear(timed("gluon", 0.001, ours=True)), started="2026-03-01")
    foreign = replace(newer, command="probe.py --out x", started="2026-04-01")
    (row,) = rows(performance_page([("x/y/c.json", foreign), ("x/y/b.json", newer), ("x/y/a.json", older)]))
    assert row[6] == "[b](../x/y/b.json)"


def test_no_header_is_empty() -> None:
    page = performance_page([("x/y/a.json", run(CASES, variants=(variant("fp8-vae", 0.4),)))])
    headers = [line for line in page.splitlines() if line.startswith(("| chunk", "| case"))]
    assert len(headers) == 2
    assert all(cell.strip() for line in headers for cell in line.strip("|").split("|"))


def test_generated_video_has_a_table_for_each_run_and_one_for_long_streams() -> None:
    judged = Run("quality", "2026-01-01", runs.CPU, quality=runs.quality(), notes=("8 people, 8 voices, 12 chunks",))
    page = performance_page([("profiling/results/a.json", judged)])
    lines = page[page.index("## Generated video") :].splitlines()
    assert "8 people, 8 voices, 12 chunks: [a](../profiling/results/a.json), 2026-01-01" in "\n".join(lines)
    for setting in ("fp32, 4 steps, 33 frames", "bf16, 2 steps, 17 frames"):
        (short,) = [line for line in lines if line.startswith(f"| {setting} |") and "of 40 chunks" not in line]
        row = judged.quality_of(setting, "r of open")
        assert row is not None
        assert short.split(" | ")[1] == f"{row.value:.3g}"
        drifts = [line for line in lines if line.startswith(f"| {setting} |") and "of 40 chunks" in line]
        assert len(drifts) == 2
        assert all(line.endswith("| 1.10 | 1.00 to 1.20 |") for line in drifts)


@pytest.fixture
def projector() -> Projector:
    """A chunk of one step with 40 measured products and a pass over 4 GB, which takes 1 ms; and decoding."""
    product = call("linear", "fp8", rows=12096, inputs=5120, outputs=13824)
    passes = {seconds: Call("fused pass", (), "bf16", 0.0, 4e12 * seconds) for seconds in (0.001, 0.1)}

    def recipes(_precision: str, setting: Setting) -> tuple[Recipe, ...]:
        step = Counter({product: 40 // setting.world, passes[0.001]: 1})
        others = (StageWork(stage, Counter({passes[0.1]: 1})) for stage in ("decode", "color", "motion"))
        return ((StageWork("denoise/step", step), *others),)

    stages = {"denoise_step": (0.2,), "decode": (0.1,), "color": (0.1,), "motion": (0.1,)}
    cases = (made_up.case(NAME, dict(product.dims), 0.002),)
    return Projector([("x/y/a.json", made_up.run(*cases, variants=(made_up.chunk("fp8", 0.6, **stages),)))], recipes)


def test_a_step_stands_beside_the_sum_of_its_calls(projector: Projector) -> None:
    lines = list(step_table(projector))
    assert "## A step of `fp8`\n" in lines
    product = "linear fp8, rows 12096, inputs 5120, outputs 13824"
    assert f"| {product} | 40 | 2.00 ms | 80.0 ms | 40% | `{NAME}` |" in lines
    assert "| fused pass bf16, 4000 MB | 1 | 1.00 ms | 1.00 ms | 0.5% | ceiling |" in lines
    assert "| sum |  |  | 81.0 ms | 40% |  |" in lines
    assert "| the step as measured |  |  | 200 ms |  |  |" in lines


def test_what_is_projected_is_labelled_and_has_its_assumptions(projector: Projector) -> None:
    goal = Target("real time", "2 x H100", {"at_least": 27}, stage="fps", gpus=2, link="H100")
    text = "\n".join(projections(projector, [TargetResult(goal, MISSED, "at_least", 25.0, "as projected")]))
    assert text.startswith("## Several GPUs: projections")
    assert "**Projected, not measured**" in text
    assert all(f"- {sentence}" in text for sentence in assumptions(projector, ("H100", "H800")))
    tables = [line for line in text.splitlines() if line.startswith("| projected |")]
    assert tables == ["| projected | 1 GPU | 2 GPUs | 4 GPUs | 8 GPUs |"] * 3
    assert "| denoise/step | 200 ms | 101 ms |" in text
    assert "| denoise/step | 200 ms | 81.0 ms | 40% | 200 ms | 100% |" in text
    assert "| real time | ≥ 27.0 | 25.0 | missed by 7.4% | as projected |" in text


def test_a_page_without_a_chunk_to_project_from_has_no_projections() -> None:
    assert "projected" not in performance_page([("x/y/a.json", run(CASES, variants=(variant("fp8-vae", 0.4),)))])


def test_decoding_beside_a_step_is_not_summed() -> None:
    from profiling.results import StageInterval

    timeline = (
        StageInterval("denoise/step", 0, 0.0, 1.6),
        StageInterval("decode", 1, 0.4, 0.5),
        StageInterval("decode", 0, 1.6, 1.8),
    )
    page = performance_page([("x/y/a.json", run(variants=(replace(variant("fp8-vae", 0.4), timeline=timeline),)))])
    assert rows(page)[0][5] == "200 ms"


def test_the_short_table_has_both_sides_and_lacks_none() -> None:
    runs = [("a.json", run(variants=(variant("bf16-eager", 0.8), variant("fp8-vae", 0.4))))]
    table = readme_table(runs)
    assert "| one denoising step | 0.80 s | **0.40 s** |" in table
    assert "[a.json](profiling/results/a.json)" in table
    with pytest.raises(UserError, match="no results have the variant fp8-vae"):
        readme_table([("a.json", run(variants=(variant("bf16-eager", 0.8),)))])


def test_tables_replace_what_stands_between_the_markers() -> None:
    old = f"# Title\n{BEGIN}\nold\n{END}\nmore\n"
    assert with_tables(old, ["| new |"]) == f"# Title\n{BEGIN}\n\n| new |\n\n{END}\nmore\n"
    assert with_tables(old + old, ["| a |", "| b |"]) == with_tables(old, ["| a |"]) + with_tables(old, ["| b |"])
    with pytest.raises(UserError, match=r"README\.md has no lines"):
        with_tables(old, ["| a |", "| b |"])


def test_the_command_writes_all_and_tells_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing_recorded(*_: object) -> tuple[Recipe, ...]:
        raise UserError("recording takes seconds")

    def call(*arguments: object) -> int:
        monkeypatch.setattr(project, "recorded", nothing_recorded)
        monkeypatch.setattr(sys, "argv", ["profiling", "docs", "--root", str(tmp_path), *map(str, arguments)])
        return main()

    assert call("--check") == 2
    assert "README.md cannot be read" in capsys.readouterr().err
    (tmp_path / README).write_text(f"{BEGIN}\n{END}\n")
    assert call("--check") == 2
    assert "cluster.md cannot be read" in capsys.readouterr().err
    (tmp_path / CLUSTER).parent.mkdir()
    (tmp_path / CLUSTER).write_text(f"# Cluster\n{BEGIN}\n{END}\n")
    assert call("--check") == 2
    assert "precision-and-memory.md cannot be read" in capsys.readouterr().err
    (tmp_path / PRECISION).write_text("# Precision\n" + 3 * f"{BEGIN}\n{END}\n")
    assert call("--check") == 1
    assert capsys.readouterr().err.count("is not what the results give") == 4
    assert call() == 0
    assert (tmp_path / PAGE).read_text().startswith("# Performance")
    assert "Nothing can be projected: recording takes seconds" in (tmp_path / CLUSTER).read_text()
    assert call("--check") == 0
    (tmp_path / PAGE).write_text("a figure typed in")
    assert call("--check") == 1
