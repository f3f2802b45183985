"""Figures of a soak and of a visit: what is drawn is what was read and counted."""

from typing import cast

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from profiling.report import soak
from profiling.report.figures import NARROW, WIDE
from profiling.results import Run
from tests.profiling import runs

RUN = Run("soak", "2026-01-01T00:00:00+00:00", runs.CPU, soak=(runs.soak(),))


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_every_reading_has_a_strip(width: float) -> None:
    figure = soak.soak_tracks(RUN, width)
    assert figure is not None
    assert len(figure.axes) == len(soak.TRACKS)
    for axes, (name, (_, unit, _)) in zip(figure.axes, soak.TRACKS.items(), strict=True):
        drawn = np.asarray(axes.lines[0].get_ydata(), float)
        np.testing.assert_allclose(drawn * unit, RUN.soak[0].tracks[name])
    assert "bound 56" in figure.axes[2].get_title(loc="left")


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_latencies_that_happened_have_a_histogram(width: float) -> None:
    figure = soak.soak_latencies(RUN, width)
    assert figure is not None
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in drawn] == ["silence to speech: p50 0.60, p95 0.90 s"]
    heights = [cast(Rectangle, bar).get_height() for bar in drawn[0].patches]
    assert heights == [3, 0, 1]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_every_reading_of_a_visit_has_a_strip_that_shows_all_of_it(width: float) -> None:
    run = Run("visit", RUN.started, runs.CPU, visits=(runs.visit(),))
    figure = soak.visit_tracks(run, width)
    assert figure is not None
    assert len(figure.axes) == len(soak.VISIT_TRACKS)
    for axes, (name, (_, unit, _)) in zip(figure.axes, soak.VISIT_TRACKS.items(), strict=True):
        drawn = np.asarray(axes.lines[0].get_ydata(), float)
        np.testing.assert_allclose(drawn * unit, run.visits[0].tracks[name])
        low, high = axes.get_ylim()
        assert low <= drawn.min()
        assert drawn.max() <= high


def test_without_a_soak_nothing_is_drawn() -> None:
    empty = Run("bench", RUN.started, runs.CPU)
    assert soak.soak_tracks(empty) is soak.soak_latencies(empty) is soak.visit_tracks(empty) is None
