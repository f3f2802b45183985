"""Figures of generated video's quality: what is drawn is what was measured."""

import numpy as np
import pytest

from profiling.report import quality
from profiling.report.figures import NARROW, WIDE
from profiling.results import Run
from tests.profiling import runs

RUN = Run("quality", "2026-01-01T00:00:00+00:00", runs.CPU, quality=runs.quality())
SETTINGS = ["fp32, 4 steps, 33 frames", "bf16, 2 steps, 17 frames"]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_each_measure_has_a_panel_with_a_point_and_an_interval_for_each_setting(width: float) -> None:
    figure = quality.measures(RUN, width)
    assert figure is not None
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}
    assert list(panels) == ["r of open", "lag of open, frames", "seam ratio", "sharpness, of the portrait's"]
    for name, axes in panels.items():
        for place, setting in enumerate(SETTINGS):
            row = RUN.quality_of(setting, name)
            assert row is not None
            interval, point = (np.asarray(line.get_xdata()).tolist() for line in axes.lines[2 * place : 2 * place + 2])
            assert (interval, point) == ([row.low, row.high], [row.value])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == SETTINGS


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_a_drift_is_drawn_along_its_streams(width: float) -> None:
    figure = quality.drift(RUN, width)
    assert figure is not None
    distance, sharp = figure.axes
    assert (distance.get_title(loc="left"), sharp.get_title(loc="left")) == ("distance to the portrait", "sharpness")
    assert (distance.get_xlabel(), distance.get_xlim()) == ("chunk", (0, 40))
    row = RUN.quality_of(SETTINGS[1], "sharpness, last over first 10 of 40 chunks")
    assert row is not None
    assert tuple(np.asarray(sharp.lines[1].get_ydata()).tolist()) == row.track


def test_without_measures_nothing_is_drawn() -> None:
    empty = Run("bench", RUN.started, runs.CPU)
    assert quality.measures(empty) is quality.drift(empty) is None
