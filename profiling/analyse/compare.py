"""Compares two trees of results: what became faster or slower, and what broke.

`profiling.analyse.trees` finds the results that a name stands for, `profiling.analyse.verdicts` joins them by case, and
`profiling.analyse.samples` has the statistics of a verdict.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from model.errors import UserError
from profiling.analyse.accepted import accept, read_accepted
from profiling.analyse.samples import FASTER, SAME, UNSURE
from profiling.analyse.trees import Source, find_tree
from profiling.analyse.verdicts import (
    FIXED,
    NEW,
    ORDER,
    REGRESSIONS,
    SMALLER,
    UNMEASURED,
    UNMEASURED_CODE,
    Comparison,
    Join,
    compare_trees,
    join,
    require_comparable,
    tree_notes,
)
from profiling.results import as_json_text
from profiling.tables import duration, number, percent, terminal

MAX_FULL_ROWS = 40  # of longer comparisons, new and unchanged rows are only counted; what was not measured, always
COLOURS = dict.fromkeys(REGRESSIONS, "red") | dict.fromkeys((FASTER, SMALLER, FIXED), "green") | {UNSURE: "yellow"}
JSON, MARKDOWN = "json", "markdown"  # formats besides the terminal's


@dataclass(frozen=True)
class Outcome:
    """A comparison as it is shown."""

    joined: Join
    again: list[str]
    forced: list[str]  # differences that --force overrode
    notes: list[str]
    rows: list[Comparison]

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have each verdict, the most important first."""
        counts = Counter(row.change.verdict for row in self.rows)
        return {verdict: counts[verdict] for verdict in ORDER if counts[verdict]}

    @property
    def regressed(self) -> int:
        """How many rows make the comparison fail."""
        return sum(row.regressed for row in self.rows)

    @property
    def accepted(self) -> list[Comparison]:
        """The regressions that are accepted."""
        return [row for row in self.rows if row.accepted]


def compare_command(
    before: str,
    after: str,
    again: list[str],
    threshold: float,
    force: bool,
    results: Path,
    accepted: Path | None,
    shown_as: str,
) -> int:
    """Implements `python -m profiling compare`; returns 1 on a regression of ours, 3 if nothing was measured again."""
    if not 0 <= threshold < 1:
        raise UserError(f"--threshold {threshold}: it is a share between 0 and 1; 0.02 is 2 %")
    entries = read_accepted(accepted) if accepted else []
    first, second, *further = (find_tree(name, results) for name in (before, after, *again))
    joined = join(first, second, any_device=force)
    differing = require_comparable(joined, force=force)
    for tree in further:
        differing += require_comparable(join(first, tree, any_device=force), force=force)
    rows = compare_trees(joined, further, threshold, force=force)
    if not rows:
        raise UserError(f"{before} and {after} hold no times; compare runs of bench, or of gpu --phase bench or e2e")
    if all(row.change.verdict == UNMEASURED for row in rows):
        why = f"nothing was measured between {before} and {after}: no case has two measurements on one device"
        print(why, file=sys.stderr)
        return UNMEASURED_CODE
    rows, no_longer = accept(rows, entries, datetime.now(UTC).date())
    notes = [f"not compared: {line}" for line in differing if not force] + tree_notes(joined, rows, threshold)
    outcome = Outcome(joined, again, differing if force else [], notes + no_longer, rows)
    if shown_as == JSON:
        print(as_json_text(_document(outcome)))
    elif shown_as == MARKDOWN:
        print("\n".join(_markdown(outcome)))
    else:
        show(outcome)
    return int(outcome.regressed > 0)


def _document(outcome: Outcome) -> dict[str, Any]:
    def about(source: Source) -> dict[str, Any]:
        return {"file": source.name, "started": source.run.started, "machine": asdict(source.run.machine)}

    runs = outcome.joined.run_pairs()
    return {
        "regressed": outcome.regressed > 0,
        "counts": outcome.counts,
        "forced": outcome.forced,
        "notes": outcome.notes,
        "before": outcome.joined.before.name,
        "after": outcome.joined.after.name,
        "again": outcome.again,
        "runs": [{"before": about(a), "after": about(b)} for a, b in runs],
        "rows": [asdict(row) | {"regressed": row.regressed} for row in outcome.rows],
    }


def _headings(outcome: Outcome) -> Iterator[str]:
    """What is compared with what, a line for each pair of runs."""
    joined = outcome.joined
    yield f"before {joined.before.name}; after {joined.after.name}"
    for a, b in joined.run_pairs():
        yield f"{_about(a)}, with {_about(b)}"


def _about(source: Source) -> str:
    revision, found, rest = (source.run.machine.revision or "").partition("-dirty")
    code = f", {revision[:9]}{found}{rest}" if revision else ""
    return f"{source.name} ({source.run.started}{code})"


def _totals(outcome: Outcome) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in outcome.counts.items())


# --- For a terminal -------------------------------------------------------------------------------------------------


def show(outcome: Outcome) -> None:
    """Prints the table, the notes and the counts."""
    rows = outcome.rows
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    out.add_column("case, back-end", overflow="fold")
    for heading in ("before", "after", "ratio", "99 % sure", "noise"):
        out.add_column(heading, justify="right", no_wrap=True)
    long, title = sum(row.change.verdict != UNMEASURED for row in rows) > MAX_FULL_ROWS, None
    for row in rows:
        verdict = row.change.verdict
        if verdict == UNMEASURED or (verdict in (NEW, SAME) and long):
            continue
        if (verdict, bool(row.accepted)) != title:
            title = verdict, bool(row.accepted)
            out.add_section()
            colour = None if row.accepted else COLOURS.get(verdict)
            out.add_row(verdict.upper() + (", accepted" if row.accepted else ""), style=colour)
        out.add_row(*_cells(row))
    console = terminal()
    for line in outcome.forced:
        console.print(f"[yellow]forced: {escape(line)}[/]")
    for line in _headings(outcome):
        console.print(escape(line), highlight=False, soft_wrap=True)
    if out.row_count:
        console.print(out)
    for line in outcome.notes:
        console.print(f"note: {escape(line)}", soft_wrap=True)
    console.print(_totals(outcome), highlight=False, soft_wrap=True)
    if outcome.accepted:
        console.print(f"{len(outcome.accepted)} accepted", soft_wrap=True)
    if outcome.regressed:
        console.print(f"[red]{outcome.regressed} regressed[/]", soft_wrap=True)


def _cells(row: Comparison) -> Iterator[str]:
    details = [text for text in (row.change.detail, row.accepted and f"accepted {row.accepted}") if text]
    below = "".join(f"\n  [dim]{escape(text)}[/]" for text in details)
    yield f"{escape(row.name)}\n  {escape(row.part)}{'' if row.ours else ' [dim](peer)[/]'}{below}"
    yield from _numbers(row)


def _numbers(row: Comparison) -> Iterator[str]:
    """Before, after, ratio, its interval, noise."""
    change = row.change
    for value in (row.before, row.after):
        yield (f"{value / 2**30:.2f} GiB" if value is not None else "") if row.memory else duration(value)
    yield _ratio(change.ratio)
    yield f"{_ratio(change.low)}-{_ratio(change.high)}" if change.low and change.high and not row.memory else ""
    yield f"±{percent(change.noise)}" if change.noise is not None and not row.memory else ""


def _ratio(value: float | None) -> str:
    return f"{value:.3f}" if value and 0.1 < value < 10 else number(value)


# --- For a pull request ---------------------------------------------------------------------------------------------


def _markdown(outcome: Outcome) -> Iterator[str]:
    verdict = f"{outcome.regressed} regressed" if outcome.regressed else "no regression"
    yield f"**{verdict}**: {_totals(outcome)}" + (f"; {len(outcome.accepted)} accepted" if outcome.accepted else "")
    yield ""
    rows = [row for row in outcome.rows if row.change.verdict not in (SAME, NEW, UNMEASURED)]
    if rows:
        yield "| verdict | case | back-end | before | after | ratio | 99 % sure | noise |"
        yield "|---|---|---|--:|--:|--:|--:|--:|"
        for row in rows:
            cells = (_markdown_verdict(row), f"`{row.name}`", row.part if row.ours else f"{row.part} (peer)")
            yield f"| {' | '.join(_in_a_cell(text) for text in (*cells, *_numbers(row)))} |"
        yield ""
    yield from _details("Compared runs", _headings(outcome))
    yield from _details("Notes", outcome.forced + outcome.notes)


def _markdown_verdict(row: Comparison) -> str:
    verdict = f"**{row.change.verdict}**" if row.regressed else row.change.verdict
    details = [text for text in (row.change.detail, row.accepted and f"accepted {row.accepted}") if text]
    return verdict + (f" ({'; '.join(details)})" if details else "")


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _details(title: str, lines: Iterable[str]) -> Iterator[str]:
    if listed := [f"- {_in_a_cell(line)}" for line in lines]:
        yield from (f"<details><summary>{title}</summary>", "", *listed, "", "</details>")
