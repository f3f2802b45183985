"""The example workflow: it is YAML that GitHub takes, and its command lines are ones that the programs accept."""

import re
import shlex
from pathlib import Path
from typing import Any

import typer
import yaml  # pyright: ignore[reportMissingModuleSource]

from profiling.__main__ import app
from profiling.cases import registry, select

WORKFLOW = Path(__file__).parents[1] / "examples" / "benchmark.yml"


def steps() -> list[dict[str, Any]]:
    return yaml.safe_load(WORKFLOW.read_text())["jobs"]["compare"]["steps"]


def test_forks_do_not_run_on_the_runner_and_the_card_is_not_shared() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert workflow["jobs"]["compare"]["if"] == "github.event.pull_request.head.repo.full_name == github.repository"
    assert workflow["concurrency"] == "gpu"


def test_the_cases_exist_and_bench_takes_the_command_line() -> None:
    cases = yaml.safe_load(WORKFLOW.read_text())["env"]["CASES"].split()
    assert all(select(registry(), [pattern], ["*/14b-*"]) for pattern in cases)
    lines = [
        line for step in steps() for line in re.findall(r"-m profiling (bench .*?)\)?;? ?\}?\n", step.get("run", ""))
    ]
    assert len(lines) == 1
    name, *arguments = shlex.split(lines[0].rstrip(";)} "))
    command: Any = typer.main.get_command(app)
    command.commands[name].make_context(name, arguments)  # raises for an unknown option


def test_main_is_measured_before_and_after_the_pull_request() -> None:
    (measured,) = (step["run"] for step in steps() if step.get("name", "").startswith("Measure"))
    assert re.findall(r"^measure (\w+) (\w+)$", measured, re.MULTILINE) == [
        ("before", "before"),
        ("after", "after"),
        ("before", "again"),
    ]
