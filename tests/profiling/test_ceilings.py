"""Ceilings of old and new runs, and why a time can be better than one."""

from dataclasses import replace

import pytest

from profiling.ceilings import above_ceiling, ceiling_notes, with_launched_copy
from profiling.devices import named
from profiling.results import CaseResult, Ceilings, Machine, Run

H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 132, 80, "9.0")
CPU = Machine("cpu", "some CPU", 2, 8)
LAUNCHED = Ceilings(3.0e12, {"bf16": 8e14}, copy_launched=True)
CASE = CaseResult("op/shape/bf16", "op", "shape", "bf16", flops=8e12, bytes=3e9)
PASS = replace(CASE, is_matmul=False)


def run(machine: Machine, ceilings: Ceilings) -> Run:
    return Run("bench", "2026-01-01", machine, ceilings=ceilings)


def test_a_copy_in_a_graph_is_replaced_by_a_launched_one_of_the_same_device() -> None:
    old, new = run(H100, replace(LAUNCHED, copy_bytes_s=2.4e12, copy_launched=False)), run(H100, LAUNCHED)
    (_, corrected), (_, kept) = with_launched_copy([("old.json", old), ("results/new.json", new)])
    assert (corrected.ceilings, kept) == (LAUNCHED, new)
    (note,) = corrected.notes
    assert note.startswith(
        "the copy's ceiling is 3.00 TB/s, of new.json, as in the run itself the copy was timed as a node"
    )


def test_of_several_launched_copies_the_newest_counts() -> None:
    old, newer = run(H100, Ceilings(2.4e12)), run(H100, Ceilings(3.1e12, copy_launched=True))
    corrected = with_launched_copy([("newer", newer), ("older", run(H100, LAUNCHED)), ("old", old)])[2][1]
    assert corrected.ceilings.copy_bytes_s == 3.1e12
    assert ceiling_notes([corrected, corrected, newer]) == [f"T{corrected.notes[0][1:]}."]


def test_without_a_launched_copy_the_run_says_that_its_shares_are_too_high() -> None:
    old = run(H100, Ceilings(2.4e12))
    other = run(replace(H100, device="NVIDIA H200"), LAUNCHED)
    (_, kept), _ = with_launched_copy([("old.json", old), ("other.json", other)])
    assert kept.ceilings == old.ceilings
    assert kept.notes[0].startswith("shares of the copy's ceiling are too high")


@pytest.mark.parametrize("old", [run(CPU, Ceilings(2e10)), run(H100, Ceilings())])
def test_a_cpu_has_no_graphs_and_nothing_has_nothing_to_correct(old: Run) -> None:
    assert with_launched_copy([("old.json", old), ("new.json", run(H100, LAUNCHED))])[0] == ("old.json", old)


@pytest.mark.parametrize(
    ("case", "seconds", "ceilings", "machine", "reason"),
    [
        (CASE, None, LAUNCHED, H100, ""),
        (CASE, 0.010, LAUNCHED, H100, ""),  # exactly the ceiling
        (CASE, 0.009, Ceilings(), H100, ""),
        (CASE, 0.009, LAUNCHED, H100, "the ceiling of products is too low, or another algorithm"),  # 889 TFLOP/s
        (CASE, 0.005, LAUNCHED, H100, "another algorithm, with fewer FLOPs: the data sheet allows 989 TFLOP/s"),
        (CASE, 0.005, LAUNCHED, CPU, "the ceiling of products is too low, or another algorithm"),
        (PASS, 0.00095, LAUNCHED, H100, "the ceiling of the copy is too low"),  # 3.16 TB/s
        (PASS, 0.0005, LAUNCHED, H100, "fewer bytes than counted, or from a cache: the data sheet allows 3.35 TB/s"),
        (PASS, 0.0009, Ceilings(2.4e12), H100, "a wrong ceiling: the copy was timed as a node of a CUDA graph"),
    ],
)
def test_a_time_above_the_ceiling_has_its_reason(
    case: CaseResult, seconds: float | None, ceilings: Ceilings, machine: Machine, reason: str
) -> None:
    found = above_ceiling(case, seconds, ceilings, machine)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("driver", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40S", "L40S"),
        ("AMD EPYC 9B14", None),
    ],
)
def test_a_device_is_found_by_a_word_of_its_name(driver: str, device: str | None) -> None:
    found = named(driver)
    assert (found.name if found else None) == device
