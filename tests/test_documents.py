"""README, docs and examples: links lead somewhere, figures are those of the committed runs, examples run."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import cast

import pytest
import soundfile
import typer
from typer.core import TyperGroup

from profiling.__main__ import app as profiling
from profiling.report.performance import documents
from streaming.__main__ import app as streaming

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)  # code has brackets of its own
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.slow
def test_the_figures_in_the_documents_are_those_of_the_committed_runs() -> None:
    for path, text in documents(ROOT).items():
        assert path.read_text() == text, f"{path}: run `python -m profiling docs`"


def test_commands_have_the_options_that_they_need_and_no_others() -> None:
    commands = {"profiling": typer.main.get_command(profiling), "streaming": typer.main.get_command(streaming)}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for package, line in re.findall(r"python -m (profiling|streaming) ([^`\n]*--[^`\n]*)", text):
            words = shlex.split(line, comments=True)
            end = next((k for k, word in enumerate(words) if word in ("|", "&", "&&", ">", "<")), len(words))
            command = cast(TyperGroup, commands[package]).commands[words[0]]
            command.make_context(words[0], words[1:end])  # raises what the user is told


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, with less to say."""
    folder = tmp_path_factory.mktemp("examples")
    for path in (*(ROOT / "examples").glob("*.py"), ROOT / "examples" / "portrait.jpg"):
        shutil.copy(path, folder)
    samples, rate = soundfile.read(ROOT / "examples" / "voice.wav", frames=64_000)
    soundfile.write(folder / "voice.wav", samples, rate)
    return folder


@pytest.mark.parametrize("name", ["frames", "one_kernel", "to_file"])
def test_an_example_runs(
    name: str, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "talk.mp4")])
    runpy.run_path(str(examples / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    if name == "frames":
        assert len(lines) > 2
        assert all("frames of 160 x 96" in line for line in lines)
    elif name == "to_file":
        assert (tmp_path / "talk.mp4").stat().st_size > 10_000
        assert "100 frames, the first after " in lines[0]
    else:
        assert float(lines[0].split()[-1]) < 1e-3


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
