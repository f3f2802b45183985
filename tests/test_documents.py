"""README, docs and examples: links lead somewhere, figures are those of the committed runs, examples run."""

import json
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest

from profiling.report.performance import performance_page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "profiling" / "results"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)  # code has brackets of its own
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_page_of_figures_is_that_of_the_committed_runs() -> None:
    assert (ROOT / "docs" / "performance.md").read_text() == performance_page(RESULTS)


def test_the_figures_of_the_readme_are_those_of_the_committed_runs() -> None:
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| \*\*([^|]+)\*\* \|$", text, re.MULTILINE)
    sides = []
    for name in ("2026-11-26-h100-e2e", "2026-11-27-h100-chunk"):
        (variant,) = json.loads((RESULTS / f"{name}.json").read_text())["variants"]
        chunk = statistics.mean(variant["chunk"])
        sides.append(
            {
                "chunk": f"{chunk:.2f} s",
                "frames a second (real time is 25)": f"{variant['frames'] / chunk:.1f}",
                "window of sound to first frame": f"{statistics.median(variant['first_frame']):.2f} s",
                "one denoising step": f"{statistics.mean(variant['stages']['denoise/step']):.2f} s",
                "GPU memory at the peak": f"{variant['peak_bytes'] / 2**30:.1f} GiB",
                "GPU idle in a chunk": f"{100 * variant['gaps']:.1f} %",
            }
        )
    assert [(name, left, right) for name, left, right in rows] == [(n, sides[0][n], sides[1][n]) for n in sides[0]]


@pytest.mark.parametrize("name", ["frames", "one_kernel", "to_file"])
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "talk.mp4")])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    if name == "frames":
        assert len(lines) > 2
        assert all("frames of 160 x 96" in line for line in lines)
    elif name == "to_file":
        assert (tmp_path / "talk.mp4").stat().st_size > 10_000
        assert "364 frames" in lines[0]
    else:
        assert float(lines[0].split()[-1]) < 1e-3


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
