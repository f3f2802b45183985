"""The JSON schema of results files: it is the one of the dataclasses, and holds for what is committed and written."""

import json
from pathlib import Path
from typing import Any

import pytest

from profiling.formats import load
from profiling.results import as_json_text, to_json
from profiling.schema import results_schema
from tests.profiling import runs

PROFILING = Path(__file__).parents[2] / "profiling"
COMMITTED = sorted((PROFILING / "results").glob("*.json"))


def test_the_committed_schema_is_current() -> None:
    text = (PROFILING / "results.schema.json").read_text()
    assert text == as_json_text(results_schema()) + "\n", (
        "run python -m profiling.schema > profiling/results.schema.json"
    )


def test_fields_are_described_by_the_comments_beside_them() -> None:
    definitions = results_schema()["$defs"]
    assert definitions["Ceilings"]["properties"]["copy_bytes_s"]["description"] == (
        "bytes read plus bytes written, a second"
    )
    assert definitions["CaseResult"]["description"] == "All back-ends on one case."


def valid(values: Any) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    schema = results_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(values)


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_results_keep_to_the_schema(file: Path) -> None:
    assert valid(json.loads(file.read_text()))
    load(file)


def test_what_is_written_keeps_to_the_schema() -> None:
    assert valid(to_json(runs.run()))
    assert valid(to_json(runs.run(machine=runs.CPU, patterns=("lab_transfer/*",))))


@pytest.mark.parametrize(
    "spoilt",
    [{"flavour": 1}, {"version": 2}, {"seconds": "3"}, {"seconds": 1e31}, {"cases": [{}]}, {"notes": None}],
)
def test_what_is_refused_when_it_is_read_breaks_the_schema(spoilt: dict[str, Any]) -> None:
    assert not valid(to_json(runs.run(patterns=())) | spoilt)
