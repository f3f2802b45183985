"""Writes docs/performance.md: the committed results as tables in Markdown, so that no number in it is typed in."""

import re
from collections.abc import Iterator
from pathlib import Path

from profiling.formats import load
from profiling.results import CaseResult, Run, write
from profiling.tables import duration, measurement_rows, number, percent, variant_rows

HEAD = """# Performance

Written by `python -m profiling docs` from the runs in [profiling/results](../profiling/results). `python -m profiling
report RUN` shows one of them in full, `python -m profiling targets` holds them to the goals.

Weights and data are random. *Ours* is the fastest of our back-ends that ran, which need not be the one that runs by
default. A *peer* is what one would use instead: cuDNN, cuBLAS, PyTorch eager or compiled. Its time over ours is in
the column "x peer": above 1 is faster. *Of ceiling* is the share of what the same card copied or multiplied at the
start of the run.
"""


def docs_command(results: Path, out: Path) -> int:
    """Implements `python -m profiling docs`."""
    write(out, performance_page(results))
    print(out)
    return 0


def performance_page(results: Path) -> str:
    """The page of all results files in a folder, the newest first. Runs of other programs are left out."""
    parts = [HEAD]
    for path in sorted(results.glob("*.json"), reverse=True):
        run = load(path)
        if not run.command.startswith("gpu_first"):  # a program that is not in this repository
            parts.append("\n".join(_section(path, run)) + "\n")
    return "\n".join(parts)


def _section(path: Path, run: Run) -> Iterator[str]:
    versions = ", ".join(f"{name} {run.machine.versions[name]}" for name in ("torch", "triton"))
    revision = re.sub(r"^([0-9a-f]{9})[0-9a-f]*", r"\1", run.machine.revision or "unknown")
    yield f"## {run.started[:10]}, {run.machine.device}: {path.stem[11:]}\n"
    yield f"[{path.name}](../profiling/results/{path.name}), revision {revision}, {versions}.\n"
    if run.variants:
        yield from _variants(run)
    if run.cases:
        yield "| case | ours | | of ceiling | best peer | | x peer |"
        yield "|---|---|---|---|---|---|---|"
        yield from (line for case in run.cases if (line := _case(case, run)))


def _variants(run: Run) -> Iterator[str]:
    yield "| chunk | time | FPS | first frame | a step | decode | GPU idle | peak |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in variant_rows(run):
        step = row.stages["denoise/step"] / row.calls["denoise/step"]
        cells = (
            duration(row.seconds), f"{row.fps or 0:.1f}", duration(row.first_frame), duration(step),
            duration(row.stages["decode"]), percent(row.gaps), f"{(row.peak_bytes or 0) / 2**30:.1f} GiB",
        )  # fmt: skip
        yield f"| `{row.variant}` | {' | '.join(cells)} |"
    yield ""


def _case(case: CaseResult, run: Run) -> str | None:
    rows = {row.backend: row for row in measurement_rows(run) if row.case == case.case}
    ours, peer = case.best(ours=True), case.best(ours=False)
    if ours is None:
        return None
    row = rows[ours.backend]
    speed = f", {number(row.tflops)} TFLOP/s" if row.bound == "compute" else ""
    best = f"{peer.backend} | {duration(peer.seconds)}" if peer else " | "
    share, ratio = f"{percent(row.ceiling)} {row.bound or ''}", f"{row.ratio:.2f}" if row.ratio else ""
    return f"| `{case.case}` | {ours.backend} | {duration(ours.seconds)}{speed} | {share} | {best} | {ratio} |"
