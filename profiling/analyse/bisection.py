"""One step of `git bisect run`: measures a case in the current folder's checkout and compares it with a good run.

`bench` runs in a process of its own, so that the code of the checkout is measured, also where this code is another's.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from model.errors import UserError
from profiling.analyse.compare import Outcome, show
from profiling.analyse.samples import FASTER, SAME, SLOWER
from profiling.analyse.trees import Source, Tree, items_of
from profiling.analyse.verdicts import BROKEN, compare_trees, join, require_comparable, tree_notes
from profiling.formats import load
from profiling.results import OK, Run

GOOD, BAD, SKIP = 0, 1, 125  # what git bisect takes exit codes for
ABORT = 128  # any code from here on; a user's mistake must not make every revision bad


def bisect_command(case: str, good: Path, rounds: int, threshold: float) -> int:
    """Implements `python -m profiling bisect`; returns 0 for good, 1 for bad, 125 if it cannot be measured.

    It is bad if a back-end of ours that the good run has timed became slower or broke. A user's mistake is told in one
    line and returns 128, which ends the bisection.
    """
    try:
        before = _good_run(good, case)
        with TemporaryDirectory() as folder:
            after = _measured(case, before.machine.kind, rounds, Path(folder) / "bench.json")
        return SKIP if after is None else _judge(Source(str(good), before), Source("this revision", after), threshold)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return ABORT


def _good_run(file: Path, case: str) -> Run:
    """The good run, of which only the case is kept. Raises `UserError` if it has no time of ours on it."""
    kept = _only(load(file), case)
    if not any(item.ours and item.samples for item in items_of(kept).values()):
        raise UserError(
            f"{file} has no time of ours on {case}; measure it at a good revision by bench {case} --out {file}"
        )
    return kept


def _only(run: Run, case: str) -> Run:
    return replace(run, cases=tuple(c for c in run.cases if c.case == case), variants=())


def _measured(case: str, device: str, rounds: int, out: Path) -> Run | None:
    """What `bench` measures in the current folder's checkout; None, with the reason on standard error, if it cannot."""
    options = ["--device", device, "--rounds", str(rounds), "--out", str(out)]
    command = [sys.executable, "-m", "profiling", "bench", case, *options]
    code = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())}, check=False).returncode
    try:
        if code in (0, 1) and out.is_file():  # 1: a back-end is wrong or raised
            return _only(load(out), case)  # bench takes a name that others contain for theirs, too
        print(f"cannot be measured: bench ended with code {code}", file=sys.stderr)
    except UserError as error:
        print(f"cannot be measured: {error}", file=sys.stderr)
    return None


def _judge(before: Source, after: Source, threshold: float) -> int:
    joined = join(*(Tree(source.name, (source,), whole=False) for source in (before, after)))
    require_comparable(joined, force=False)
    rows = compare_trees(joined, [], threshold, force=False)
    show(Outcome(joined, [], [], tree_notes(joined, rows, threshold), rows))
    timed = {key for key, item in items_of(before.run).items() if item.ours and item.status == OK}
    verdicts = {row.change.verdict for row in rows if (row.name, row.part) in timed}
    if verdicts & {BROKEN, SLOWER}:
        return BAD
    return GOOD if verdicts and verdicts <= {SAME, FASTER} else SKIP
