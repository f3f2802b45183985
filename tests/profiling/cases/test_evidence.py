"""Tuned tables as runs, and what is gathered from files and folders."""

from dataclasses import replace
from pathlib import Path

import pytest

from kernels.tuning import TunedEntry, TunedTable, to_json
from model.errors import UserError
from profiling.cases.evidence import gather, tuned_runs
from profiling.results import Ceilings, Machine, Run, save

DIMS = {"rows": 12096, "inputs": 5120, "outputs": 13824}
SECONDS = {"gluon": 0.0012, "library": 0.0013, "scaled-mm-row": 0.0014}
ENTRY = TunedEntry("linear", "fp8", DIMS, "gluon", {}, SECONDS, "2026-02-02T00:00:00+00:00", {"torch": "2.11.0"})
H100 = Machine("cuda", "NVIDIA H100", 132, 80)


def table(*entries: TunedEntry) -> TunedTable:
    return TunedTable("NVIDIA H100", "9.0", entries)


def test_an_entry_is_a_run_of_its_cases() -> None:
    (run,) = tuned_runs(table(ENTRY))
    assert (run.command, run.started, run.machine.device, run.machine.capability) == (
        "tune", ENTRY.measured, "NVIDIA H100", "9.0"
    )  # fmt: skip
    assert run.ceilings == Ceilings()
    (case,) = run.cases
    assert (case.case, case.flops) == ("linear/14b-w1-up/fp8", 2 * 12096 * 5120 * 13824)
    found = {m.backend: (m.ours, m.seconds) for m in case.measurements}
    assert found == {"gluon": (True, 0.0012), "library": (True, 0.0013), "scaled-mm-row": (False, 0.0014)}


def test_an_entry_that_is_no_case_is_left_out() -> None:
    assert not list(tuned_runs(table(replace(ENTRY, dims={**DIMS, "rows": 7}))))


def test_files_and_folders_are_gathered_the_newest_first(tmp_path: Path) -> None:
    save(Run("bench", "2026-01-01", H100, ceilings=Ceilings(2e12)), tmp_path / "a" / "old.json")
    save(Run("bench", "2026-03-01", H100, ceilings=Ceilings(3e12, {}, True)), tmp_path / "new.json")
    (tmp_path / "a" / "table.json").write_text(to_json(table(ENTRY)))
    (tmp_path / "a" / "broken.json").write_text("{")
    found, notes = gather([tmp_path / "a", tmp_path / "new.json"])
    assert [(Path(file).name, run.command) for file, run in found] == [
        ("new.json", "bench"), ("table.json", "tune"), ("old.json", "bench")
    ]  # fmt: skip
    assert found[2][1].ceilings.copy_bytes_s == 3e12
    assert len(notes) == 1
    assert "broken.json is not JSON" in notes[0]


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(to_json(table(ENTRY)).replace('"linear"', "3"))
    with pytest.raises(UserError, match=r"table.json: table.entries\[0\].operation is 3"):
        gather([tmp_path / "table.json"])
