"""The page of a report in a browser, on a phone as well."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from profiling.report import figures
from profiling.results import Run
from tests.profiling.report.pages import VARIATIONS, cases_alone, checked, hostile, page_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the PATH")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# An iframe as wide as a phone, since a browser's own window may not be that narrow.
ON_A_PHONE = """<iframe id="phone" style="width:390px;height:800px;border:0" srcdoc="{page}"></iframe><script>
onload = () => {{
  const page = document.getElementById("phone").contentDocument, wide = [];
  for (const element of page.querySelectorAll("body *"))
    if (!element.closest(".scroll table") && element.getBoundingClientRect().right > 390) wide.push(element.outerHTML);
  const sources = [...page.images].map(image => image.currentSrc === image.src);
  document.title = JSON.stringify([page.documentElement.scrollWidth, wide, sources]);
}}</script>"""
# Sorts each table by its second column, then writes down the order of the first one.
SORTED = """<iframe id="page" srcdoc="{page}"></iframe><script>
onload = () => {{
  const page = document.getElementById("page").contentDocument;
  const table = page.querySelector("#cases table");
  const order = () => [...table.tBodies].map(body => body.rows[0].textContent.split(" ")[0].trim());
  const found = [order()];
  for (let i = 0; i < 2; i++) {{ table.tHead.rows[0].cells[1].click(); found.push(order()); }}
  document.title = JSON.stringify(found);
}}</script>"""


def browse(page: Path, folder: Path, *options: str) -> str:
    """What a browser makes of the page, as HTML."""
    command = [str(BROWSER), *OPTIONS, f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout


def measured(script: str, text: str, folder: Path) -> Any:
    """What a script finds out about a page inside of its own."""
    outer = folder / "outer.html"
    outer.write_text(script.format(page=html.escape(text)))
    title = re.search(r"<title>(.*?)</title>", browse(outer, folder), re.DOTALL)
    assert title is not None
    return json.loads(html.unescape(title[1]))


@pytest.fixture(scope="module")
def without_cases(whole: Run, earlier: list[Run]) -> str:
    return page_of(replace(whole, cases=()), earlier)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_in_a_browser(scheme: str, without_cases: str, tmp_path: Path) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    page.write_text(without_cases)
    prefers = f"--blink-settings=preferredColorScheme={('dark', 'light').index(scheme)}"
    shown = checked(browse(page, tmp_path, "--window-size=1000,4000", prefers, f"--screenshot={picture}"))
    assert shown.headings == checked(without_cases).headings
    assert shown.pictures == ["figure-timeline", "figure-history", "figure-gauges"]
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (4000, 1000, 3)
    paper, blue = ((figures.DARK_SCHEME if scheme == "dark" else {}).get(c, c) for c in (figures.WHITE, figures.BLUE))
    assert near(pixels, paper).mean() > 0.8  # also of the figures, which are a large part of the page
    assert near(pixels, blue).sum() > 20_000  # denoising
    assert near(pixels, figures.ORANGE).sum() > 2_000  # decode


def near(pixels: np.ndarray, colour: str) -> np.ndarray:
    return np.abs(pixels - [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).sum(-1) < 12


@needs_browser
@pytest.mark.parametrize("kind", ["whole", "hostile", "audit alone"])
def test_on_a_phone_nothing_is_wider_than_the_screen(kind: str, whole: Run, earlier: list[Run], tmp_path: Path) -> None:
    small = replace(whole, cases=whole.cases[:5])
    run = {"whole": small, "hostile": hostile(small), "audit alone": VARIATIONS["audit alone"](small)}[kind]
    width, wide, for_a_page = measured(ON_A_PHONE, page_of(run, earlier), tmp_path)
    assert wide == []
    assert width == 390
    assert not any(for_a_page)  # each figure is the one for phones


@needs_browser
def test_a_click_on_a_heading_sorts_the_cases(earlier: list[Run], tmp_path: Path) -> None:
    run = cases_alone(earlier[0])
    before, up, down = measured(SORTED, page_of(run), tmp_path)
    by_time = sorted(run.cases, key=lambda case: (case.best(ours=True) or case.measurements[0]).seconds or 0)
    assert before == [case.case for case in run.cases]
    assert up == [case.case for case in by_time]
    assert down == up[::-1]
