"""Tables of precision and memory: the newest run's figures, the worst of a kernel's shapes, and what fits on a card."""

import pytest

from model.errors import UserError
from profiling.devices import devices
from profiling.report.memory import as_card, memory_tables
from profiling.report.precision import AUDIT, PSNR, kernels_table, psnr_table
from profiling.results import AuditResult, Machine, Quality, Run

CPU = Machine("cpu", "AMD EPYC", 2, 8, versions={"triton": "3.6.0"})


def judged(started: str, **values: float | None) -> Run:
    rows = tuple(Quality(name, "PSNR", value, None, None) for name, value in values.items())
    return Run(PSNR, started, CPU, quality=rows, notes=("the first 84 frames",))


def test_psnr_is_that_of_the_newest_run() -> None:
    table = psnr_table([("x/new.json", judged("2", bf16=47.84, int8=None)), ("x/old.json", judged("1", bf16=1.0))])
    assert table.splitlines() == [
        "By `python -m profiling psnr`, the first 84 frames, on a CPU: [new.json](../profiling/results/new.json).",
        "",
        "| setting | PSNR against `fp32` |",
        "| --- | --- |",
        "| bf16 | 47.8 dB |",
        "| int8 | the same bytes |",
    ]


def compiled(case: str, target: str, registers: int, spills: int, *names: str) -> AuditResult:
    counts = dict.fromkeys(names, 1)
    return AuditResult(case, "linear_fwd", target, registers=registers, spills=spills, instructions=counts)


def test_a_kernel_has_the_worst_of_its_shapes_on_each_target() -> None:
    audit = (
        compiled("linear/14b-w1-up/bf16", "sm_80", 100, 0, "HMMA", "LDGSTS", "FADD"),
        compiled("linear/14b-w1-down/bf16", "sm_80", 90, 36, "HMMA"),
        compiled("linear/14b-w1-up/bf16", "sm_90", 80, 0, "HGMMA", "UTMALDG"),
        compiled("linear/14b-w1-up/fp8", "sm_90", 70, 0, "QGMMA"),
    )
    table = kernels_table([("x/audit.json", Run(AUDIT, "1", CPU, audit=audit))])
    assert table.splitlines() == [
        "By `python -m profiling audit`, with triton 3.6.0: [audit.json](../profiling/results/audit.json).",
        "",
        "| operation | kernel | sm_80 | sm_90 |",
        "| --- | --- | --- | --- |",
        "| `linear`, bf16 | `linear_fwd` | 100, HMMA, cp.async, **36 B spilled** | 80, HGMMA, TMA |",
        "| `linear`, fp8 | `linear_fwd` |  | 70, QGMMA |",
    ]


def test_without_a_run_it_is_said_what_to_run() -> None:
    for table, command in ((psnr_table, PSNR), (kernels_table, AUDIT)):
        with pytest.raises(UserError, match=f"no results of `profiling {command}`: run it with --out"):
            table([])


def test_what_fits_on_which_card() -> None:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in memory_tables().splitlines() if line]
    rows = {cells[0]: cells[1:] for cells in lines}
    heads = rows["card"]
    rtx3090, rtx4090, h100 = (dict(zip(heads, rows[name], strict=True)) for name in ("RTX3090", "RTX4090", "H100"))
    assert rtx3090["`bf16`"] == rtx4090["`bf16`"] == "no"
    assert rtx3090["`fp8`"] == rtx3090["`int8-vae`"] == "no FP8"
    assert rtx4090["`fp8-vae`"] == rtx3090["`int8`"] == "launched; text on CPU"
    assert h100["`bf16`"] == "graphs"
    assert as_card(devices()["RTX3090"]).capability == (8, 6)
