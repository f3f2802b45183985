"""A session as users open it: what `TalkingHeadPipeline.live` takes, refuses and resumes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.config import PRESETS
from model.errors import UserError
from streaming import LiveSession, Moment, TalkingHeadPipeline
from tests.streaming.live.stage import LETTERS, tone
from tests.streaming.live.test_session import VirtualClock

PORTRAIT = np.random.default_rng(0).integers(0, 255, (32, 48, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def _small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, LETTERS.name, LETTERS)


@pytest.fixture(scope="module")
def pipeline() -> TalkingHeadPipeline:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, LETTERS.name, LETTERS)
        return TalkingHeadPipeline.from_pretrained("letters", device="cpu", random_weights=True, steps=3)


def opened(pipeline: TalkingHeadPipeline, portrait: np.ndarray = PORTRAIT, **options: Any) -> LiveSession:
    return pipeline.live(portrait, clock=VirtualClock(), **options)


def taken(live: LiveSession, count: int) -> list[Moment]:
    moments = live.moments()
    return [next(moments) for _ in range(count)]


def test_what_cannot_be_is_refused_and_the_pipeline_stays_free(pipeline: TalkingHeadPipeline) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"kind": "file"}, "kind"),
        ({"lag": "hurry"}, "lag"),
        ({"lag": "drop"}, "lag drop: only a microphone's sound may be dropped"),
        ({"wait_frames": 0}, "wait_frames 0: name a number from 1 to 4"),
        ({"wait_frames": 5}, "wait_frames 5"),
        ({"max_queued": 0.1}, "max_queued 0.1: name 0.32 seconds"),
        ({"max_queued": float("inf")}, "max_queued inf"),
        ({"resume": "missing"}, "missing cannot be read"),
    ]
    for options, problem in cases:
        with pytest.raises(UserError, match=problem) as caught:
            opened(pipeline, **options)
        assert "\n" not in str(caught.value)


def test_one_session_at_a_time(pipeline: TalkingHeadPipeline) -> None:
    with opened(pipeline), pytest.raises(RuntimeError, match="making another video"):
        opened(pipeline)


def test_a_session_goes_on_from_its_snapshot_and_only_there(pipeline: TalkingHeadPipeline, tmp_path: Path) -> None:
    path = tmp_path / "session"
    with opened(pipeline, seed=5) as live:
        live.push_audio(tone(40), 16000)
        live.end_segment()
        taken(live, 20)
        live.snapshot(path)
        position = live.position
        rest = taken(live, 15)
    with opened(pipeline, resume=path) as live:
        assert live.position == position
        assert live.stats()["state"] == "speaking"
        again = taken(live, 15)
    for one, other in zip(rest, again, strict=True):
        assert (one.index, one.segment) == (other.index, other.segment)
        np.testing.assert_array_equal(one.rgb, other.rgb)
        np.testing.assert_array_equal(one.sound, other.sound)
    with pytest.raises(UserError, match="is of a session with another portrait: nothing was resumed"):
        opened(pipeline, PORTRAIT[:, ::-1].copy(), resume=path)
    with pytest.raises(UserError, match="is of a session with another prompt: nothing was resumed"):
        opened(pipeline, prompt="a dog", resume=path)


def test_a_portrait_that_changes_meanwhile_changes_nothing(pipeline: TalkingHeadPipeline) -> None:
    videos = []
    for change in (False, True):
        picture = PORTRAIT.copy()
        with opened(pipeline, picture) as live:
            if change:
                picture[:] = 0
            videos.append(np.stack([m.rgb for m in taken(live, 8)]))
    np.testing.assert_array_equal(*videos)


def test_a_smaller_picture_is_shown_in_the_size_of_the_session(pipeline: TalkingHeadPipeline) -> None:
    with opened(pipeline, lag="smaller") as live:
        assert [q.steps for q in live._director.face.qualities] == [3, 2, 2, 2]
        assert live._director.face.qualities[-1].width < 48
        live._director.quality.index = 3
        moments = taken(live, 12)
        live._director.quality.index = 0
        moments += taken(live, 12)
    assert {m.rgb.shape for m in moments} == {(32, 48, 3)}
