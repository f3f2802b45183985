"""Pages of made-up runs: what may be odd about a run, and what a browser would fetch or show."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from profiling.__main__ import TARGETS
from profiling.analyse.targets import read_targets
from profiling.report import report
from profiling.report.verdict import answered_goals, changes
from profiling.results import WRONG, Ceilings, Measurement, NvmlTrace, Run, VariantResult
from tests.profiling import runs
from tests.profiling.runs import HOSTILE

SCRIPT = Path(report.__file__).with_name("sort.js").read_text()


def evidence(run: Run, others: Sequence[Run] = (), unreadable: Sequence[str] = ()) -> report.Evidence:
    named = [(f"{i}.json", other) for i, other in enumerate(others)]
    goals, changed = answered_goals(run, "run.json", read_targets(TARGETS)), changes(run, "run.json", named[::-1])
    return report.Evidence(run, named, list(unreadable), goals, changed)


def all_wrong(run: Run) -> Run:
    run = each(lambda m: Measurement(m.backend, WRONG, m.ours, "wrong"), run)
    return replace(run, nvml=NvmlTrace(), variants=tuple(VariantResult(v.variant, WRONG) for v in run.variants))


def hostile(run: Run) -> Run:
    cases = tuple(
        replace(
            c,
            case=f"{HOSTILE}{i}",
            operation=HOSTILE,
            shape=HOSTILE,
            dtype=HOSTILE,
            dims={HOSTILE: 1},
            measurements=tuple(replace(m, backend=HOSTILE, detail=HOSTILE) for m in c.measurements),
        )
        for i, c in enumerate(run.cases)
    )
    variants = tuple(
        replace(v, variant=HOSTILE, detail=HOSTILE, stages={HOSTILE: v.stages.get("decode", ())}) for v in run.variants
    )
    audit = tuple(replace(a, kernel=HOSTILE, case=HOSTILE, faults=(HOSTILE,), warnings=(HOSTILE,)) for a in run.audit)
    machine = replace(run.machine, device=HOSTILE, versions={HOSTILE: HOSTILE}, revision=HOSTILE)
    gauges = replace(run.nvml, throttled={HOSTILE: 0.5})
    return replace(
        run,
        command=HOSTILE,
        cases=cases,
        variants=variants,
        audit=audit,
        machine=machine,
        nvml=gauges,
        notes=(HOSTILE,),
    )


def cases_alone(run: Run) -> Run:
    return replace(run, variants=(), audit=(), nvml=NvmlTrace(note="no NVIDIA GPU in this run"))


def one_sample(m: Measurement) -> Measurement:
    return replace(m, samples=m.samples[:1])


def unsampled(m: Measurement) -> Measurement:
    return replace(m, samples=())


def each(change: Callable[[Measurement], Measurement], run: Run) -> Run:
    cases = (replace(c, measurements=tuple(map(change, c.measurements))) for c in run.cases)
    return replace(run, cases=tuple(cases))


VARIATIONS: dict[str, Callable[[Run], Run]] = {
    "nothing": lambda run: Run(run.command, run.started, run.machine),
    "quality alone": lambda run: Run(run.command, run.started, run.machine, quality=runs.quality()),
    "quality without long streams": lambda run: Run(run.command, run.started, run.machine, quality=runs.quality()[:4]),
    "a soak alone": lambda run: Run(run.command, run.started, run.machine, soak=(runs.soak(),)),
    "a visit alone": lambda run: Run(run.command, run.started, run.machine, visits=(runs.visit(),)),
    "cases alone": cases_alone,
    "audit alone": lambda run: replace(run, variants=(), cases=(), nvml=NvmlTrace()),
    "no ceilings": lambda run: replace(cases_alone(run), ceilings=Ceilings()),
    "no copy": lambda run: replace(cases_alone(run), ceilings=Ceilings(None, run.ceilings.matmul_flop_s)),
    "no products": lambda run: replace(cases_alone(run), ceilings=Ceilings(run.ceilings.copy_bytes_s)),
    "single samples": lambda run: each(one_sample, cases_alone(run)),
    "checked only": lambda run: each(unsampled, cases_alone(run)),
    "undated": lambda run: replace(cases_alone(run), started=""),
    "all wrong": all_wrong,
    "no work": lambda run: replace(cases_alone(run), cases=tuple(replace(c, flops=0, bytes=0) for c in run.cases)),
    "no stages": lambda run: replace(
        run, cases=(), nvml=NvmlTrace(), variants=tuple(replace(v, stages={}, frames=0) for v in run.variants)
    ),
    "one variant": lambda run: replace(run, cases=(), nvml=NvmlTrace(), variants=run.variants[:1]),
    "one reading": lambda run: replace(
        cases_alone(run), nvml=NvmlTrace((0.0,), (1.0,), (1.0,), (1.0,), (1.0,), (1.0,))
    ),
    "ragged readings": lambda run: replace(
        run, cases=(), variants=(), nvml=replace(run.nvml, watts=run.nvml.watts[:-1], sm_mhz=())
    ),
    "idle": lambda run: replace(
        run, cases=(), variants=(), nvml=replace(run.nvml, sm_mhz=(0.0,) * len(run.nvml.seconds))
    ),
}


class Page(HTMLParser):
    """Collects what a browser would fetch or show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.links += [values[name] or "" for name in ("src", "href", "srcset", "data", "action") if name in values]
        if tag == "picture":
            self.pictures.append(values["id"] or "")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["h2"] and data.strip():
            self.headings.append(data.strip())
        if self.tags[-1:] != ["script"]:
            self.text += data


def checked(text: str) -> Page:
    """The page, after what holds for any: one script, which is ours, nothing fetched, no value that was not there."""
    page = Page(text)
    assert page.tags.count("script") == 1
    assert f"<script>{SCRIPT}</script>" in text
    assert base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode() in text  # which the policy allows
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in page.links)
    assert "@import" not in text
    assert "url(" not in text
    assert "None" not in page.text
    assert "nan" not in page.text.split()
    return page


def page_of(run: Run, others: Sequence[Run] = (), unreadable: Sequence[str] = ()) -> str:
    found = evidence(run, others, unreadable)
    return report.render_page(found, report.draw_figures(found))
