"""What a precision changes in the video, and what kernels take on each GPU, for docs/precision-and-memory.md."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from model.errors import UserError
from profiling.report.markdown import head, line
from profiling.results import AuditResult, Run

AUDIT, PSNR = "audit", "psnr"  # the commands whose runs have the figures
ASYNC_COPIES = {"UTMALDG": "TMA", "LDGSTS": "cp.async"}  # what loads that overlap products are called, by instruction
Row = tuple[str, str, str]  # operation, dtype, kernel


def psnr_table(runs: Sequence[tuple[str, Run]]) -> str:
    """The PSNR of each precision in the newest run of `profiling psnr`. Raises `UserError` if there is none."""
    file, run = _newest(runs, PSNR)
    rows = (line(row.setting, "the same bytes" if row.value is None else f"{row.value:.1f} dB") for row in run.quality)
    said = f"By `python -m profiling psnr`, {'; '.join(run.notes)}, on a {run.machine.kind.upper()}: {_link(file)}."
    return "\n".join((said, "", *head("setting", "PSNR against `fp32`"), *rows))


def kernels_table(runs: Sequence[tuple[str, Run]]) -> str:
    """Registers and spills of each kernel on each target in the newest audit. Raises `UserError` if there is none."""
    file, run = _newest(runs, AUDIT)
    targets = list(dict.fromkeys(result.target for result in run.audit))
    rows: dict[Row, dict[str, list[AuditResult]]] = {}
    for result in run.audit:
        operation, _, dtype = result.case.split("/")
        rows.setdefault((operation, dtype, result.kernel), {}).setdefault(result.target, []).append(result)
    said = f"By `python -m profiling audit`, with {_versions(run)}: {_link(file)}."
    return "\n".join((said, "", *head("operation", "kernel", *targets), *_lines(rows, targets)))


def _lines(rows: Mapping[Row, Mapping[str, Sequence[AuditResult]]], targets: Sequence[str]) -> Iterator[str]:
    for (operation, dtype, kernel), found in sorted(rows.items()):
        yield line(f"`{operation}`, {dtype}", f"`{kernel}`", *(_cell(found.get(target, ())) for target in targets))


def _cell(results: Sequence[AuditResult]) -> str:
    """The most that any of the kernel's shapes takes; instructions of products, and of loads that overlap them."""
    if not results:
        return ""
    registers, spills = (max(getattr(result, name) for result in results) for name in ("registers", "spills"))
    names = {name for result in results for name in result.instructions}
    told = [name for name in sorted(names) if name.endswith("MMA")]
    told += [copies for name, copies in ASYNC_COPIES.items() if name in names]
    return ", ".join((str(registers), *told, *([f"**{spills} B spilled**"] if spills else [])))


def _newest(runs: Sequence[tuple[str, Run]], command: str) -> tuple[str, Run]:
    """The newest run of a command; `runs` are the newest first."""
    found = next(((file, run) for file, run in runs if run.command == command), None)
    if found is None:
        raise UserError(f"no results of `profiling {command}`: run it with --out profiling/results/NAME.json")
    return found


def _versions(run: Run) -> str:
    return f"triton {run.machine.versions['triton']}"


def _link(file: str) -> str:
    name = Path(file).name
    return f"[{name}](../profiling/results/{name})"
