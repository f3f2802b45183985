"""Accepted regressions: which become a note, which still fail, and which entries no longer apply."""

import sys
from datetime import date
from pathlib import Path

import pytest

from model.errors import UserError
from profiling.__main__ import main
from profiling.analyse.accepted import accept, read_accepted
from profiling.analyse.samples import Change
from profiling.analyse.verdicts import Comparison
from profiling.results import OK, CaseResult, Machine, Measurement, Run, save

TODAY = date(2026, 6, 15)


def row(name: str, part: str, verdict: str, ratio: float | None, ours: bool = True) -> Comparison:
    change = Change(verdict, ratio, None, None, None)
    return Comparison("GPU", name, part, ours, False, 1.0, ratio, (9, 9), ("a", "b"), change)


def entry(case: str, factor: float = 1.1, until: str = "2026-06-15") -> str:
    return f'[[accepted]]\ncase = "{case}"\nfactor = {factor}\nwhy = "sums are exact now"\nuntil = {until}\n'


def accepted(tmp_path: Path, rows: list[Comparison], *entries: str) -> tuple[dict[str, str], list[str]]:
    (tmp_path / "accepted.toml").write_text("".join(entries))
    found, lines = accept(rows, read_accepted(tmp_path / "accepted.toml"), TODAY)
    assert [r.regressed for r in found] == sorted((r.regressed for r in found), reverse=True)
    return {f"{r.name}/{r.part}": r.accepted for r in found if not r.regressed and r.change.verdict != "same"}, lines


ROWS = [
    row("linear/a/fp8", "gluon", "slower", 1.08),
    row("linear/a/fp8", "triton", "slower", 1.2),
    row("linear/b/fp8", "gluon", "broken", None),
    row("norm/a/bf16", "triton", "same", 1.0),
]
NOTHING = "nothing of that name has regressed"
WHY = "up to 1.1 until 2026-06-15: sums are exact now"


@pytest.mark.parametrize(
    ("entries", "notes", "lines"),
    [
        ([], {}, []),
        ([entry("linear/*")], {"linear/a/fp8/gluon": WHY}, []),
        ([entry("linear/a/fp8/gluon")], {"linear/a/fp8/gluon": WHY}, []),
        ([entry("linear/a/fp8/triton")], {}, []),
        (
            [entry("linear/a/fp8", until="2026-06-14")],
            {},
            ["accepted regression linear/a/fp8 no longer applies: it was accepted until 2026-06-14"],
        ),
        (
            [entry("linear/a/fp8/gluon"), entry("norm/*"), entry("gone/*")],
            {"linear/a/fp8/gluon": WHY},
            [f"accepted regression {name} no longer applies: {NOTHING}" for name in ("norm/*", "gone/*")],
        ),
    ],
)  # fmt: skip
def test_a_regression_within_its_factor_is_a_note(
    tmp_path: Path, entries: list[str], notes: dict[str, str], lines: list[str]
) -> None:
    assert accepted(tmp_path, ROWS, *entries) == (notes, lines)


def test_the_larger_of_two_factors_counts(tmp_path: Path) -> None:
    notes, lines = accepted(tmp_path, ROWS, entry("linear/a/*"), entry("linear/a/*", 1.25))
    assert set(notes) == {"linear/a/fp8/gluon", "linear/a/fp8/triton"}
    assert lines == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("accepted = 1", "may hold entries [[accepted]] only, with case, factor, why, until"),
        ("[other]", "may hold entries [[accepted]] only"),
        ("[[accepted", "is not TOML"),
        ('[[accepted]]\ncase = "a"', "accepted[0] must have case, factor, why, until, and nothing else"),
        (entry("a") + "more = 1", "accepted[0] must have"),
        (entry(""), "accepted[0]: case and why are texts"),
        (entry("a", until='"2026-01-01"'), "accepted[0]: until is a day"),
        (entry("a", until="2026-01-01T00:00:00"), "accepted[0]: until is a day"),
        (entry("a", 0.9), "accepted[0]: factor 0.9 accepts nothing"),
        (entry("a").replace("1.1", "true"), "accepted[0].factor is True, wanted a finite number"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "accepted.toml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_accepted(file)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_accepted(tmp_path / "none.toml")


def test_compare_passes_with_what_is_accepted_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for day, name, seconds in ((1, "a", 1.0), (2, "b", 1.05)):
        m = Measurement("m", OK, True, samples=tuple(seconds * (1 + 1e-3 * (i * 7 % 10)) for i in range(10)))
        case = CaseResult("o/s/d", "o", "s", "d", 1.0, 1.0, measurements=(m,))
        save(Run("bench", f"2026-01-0{day}", Machine("cpu", "c", 1, 1), cases=(case,)), tmp_path / f"{name}.json")
    (tmp_path / "accepted.toml").write_text(entry("o/*", until="9999-12-31") + entry("gone/*"))
    monkeypatch.chdir(tmp_path)

    def call(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["profiling", "compare", "a.json", "b.json", *options])
        return main(), capsys.readouterr().out

    assert call()[0] == 1
    code, out = call("--accepted", "accepted.toml")
    assert code == 0
    assert "SLOWER, accepted" in out
    assert "accepted up to 1.1 until 9999-12-31: sums are exact now" in out
    assert "note: accepted regression gone/* no longer applies" in out
    assert "1 accepted" in out
    code, out = call("--accepted", "accepted.toml", "--markdown")
    assert code == 0
    assert out.startswith("**no regression**: 1 slower; 1 accepted\n")
