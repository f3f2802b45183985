"""A session that ends anywhere, even by SIGKILL, and goes on from its snapshot shows the same frames."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from streaming.live.face import PortraitFace
from streaming.live.snapshot import load, restore, save, snapshot_of
from streaming.live.timeline import Moment
from tests.streaming.live.stage import Stage, small_face

IDENTITY = {"portrait": "a", "weights": "b"}
SOUND = (0.3 * np.random.default_rng(5).standard_normal(60 * 640)).astype(np.float32)
SCRIPT = {  # what happens when a frame is shown: pieces of sound, ends, interruptions
    1: lambda stage: stage.push(SOUND[: 3 * 640 + 77]),
    2: lambda stage: stage.push(SOUND[3 * 640 + 77 : 6 * 640], 24000),
    4: lambda stage: stage.director.end(),
    8: lambda stage: (stage.push(SOUND), stage.director.end()),
    12: lambda stage: stage.director.interrupt(stage.now),
    13: lambda stage: (stage.push(SOUND[: 3 * 640 + 1]), stage.director.end()),
}
LAST = 20


@pytest.fixture(scope="module")
def face() -> PortraitFace:
    return small_face()


def staged(face: PortraitFace) -> Stage:
    """A session whose work takes no time, so that what it does follows from its sound alone."""
    return Stage(face=face, wait_frames=face.chunk.new_frames, step=0.0, group=0.0)


def follow_script(stage: Stage, ended: list[Moment]) -> None:
    def keep(moment: Moment) -> bool:
        ended.append(moment)
        if moment.index in SCRIPT:
            SCRIPT[moment.index](stage)
        return False

    stage.keep = keep


def test_a_resumed_session_goes_on_to_the_bit_from_any_moment(face: PortraitFace, tmp_path: Path) -> None:
    """Snapshots at every moment, in silence, in speech, between pieces of sound, after cuts and interruptions."""
    whole: list[Moment] = []
    stage = staged(face)
    follow_script(stage, whole)
    saved: list[int] = []
    while stage.director.shown < LAST:
        position = stage.director.shown
        save(snapshot_of(stage.director), IDENTITY, tmp_path / str(position))
        saved.append(position)
        stage.run(0.04)
    assert len({m.segment for m in whole}) == 4
    assert stage.director.stats.counts.cut > 1
    for position in np.random.default_rng(0).permutation(saved)[:8]:
        again: list[Moment] = []
        resumed = staged(face)
        restore(resumed.director, load(tmp_path / str(position), IDENTITY))
        follow_script(resumed, again)
        resumed.run(7 * 0.04)
        assert [m.index for m in again][:3] == list(range(position, position + 3))
        for one, other in zip(whole[position:], again, strict=False):
            assert (one.index, one.segment, one.pts) == (other.index, other.segment, other.pts)
            np.testing.assert_array_equal(one.rgb, other.rgb, err_msg=f"frame {one.index}, resumed at {position}")
            np.testing.assert_array_equal(one.sound, other.sound)
        assert len(again) >= 6


@pytest.mark.slow
def test_a_killed_session_goes_on_to_the_bit(face: PortraitFace, tmp_path: Path) -> None:
    """Kills by SIGKILL at 20 random moments; what was written before and after is the video of one that lived."""
    whole: list[Moment] = []
    stage = staged(face)
    follow_script(stage, whole)
    stage.run(LAST * 0.04)
    video = np.stack([m.rgb for m in whole])
    random, path, frames = np.random.default_rng(1), tmp_path / "session", tmp_path / "frames"
    positions = set()
    for _ in range(20):
        path.unlink(missing_ok=True)
        frames.write_bytes(b"")
        child = os.fork()
        if not child:
            live_until_killed(face, path, frames)
        wanted = random.integers(LAST - 5) * video[0].size + random.integers(video[0].size)
        while frames.stat().st_size < wanted and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        resumed, after = staged(face), list[Moment]()
        restore(resumed.director, load(path, IDENTITY))
        position = resumed.director.shown
        positions.add(position)
        follow_script(resumed, after)
        resumed.run(5 * 0.04)
        before = np.frombuffer(frames.read_bytes(), np.uint8)
        before = before[: len(before) // video[0].size * video[0].size].reshape(-1, *video.shape[1:])
        assert len(before) >= position, "a snapshot is never ahead of what was handed over"
        joined = np.concatenate([before[:position], [m.rgb for m in after]])[: len(video)]
        np.testing.assert_array_equal(joined, video[: len(joined)])
    assert len(positions) > 3


def live_until_killed(face: PortraitFace, path: Path, frames: Path) -> None:
    """A session that writes its frames, and a snapshot after each; never returns."""
    try:
        stage = staged(face)
        follow_script(stage, [])
        keep = stage.keep
        with frames.open("ab", buffering=0) as file:
            stage.keep = lambda m: bool(file.write(m.rgb.tobytes())) and keep(m)
            while True:
                save(snapshot_of(stage.director), IDENTITY, path)
                stage.run(0.04)
    finally:
        os._exit(1)


@pytest.fixture(scope="module")
def spoken_at_once(face: PortraitFace) -> list[Moment]:
    return spoken_in_pieces(face, [])


@settings(max_examples=4)
@given(st.lists(st.integers(0, 9 * 640), max_size=9))
def test_any_pieces_of_the_same_sound_give_the_same_video(
    face: PortraitFace, spoken_at_once: list[Moment], cuts: list[int]
) -> None:
    for before, after in zip(spoken_at_once, spoken_in_pieces(face, sorted(cuts)), strict=True):
        np.testing.assert_array_equal(before.rgb, after.rgb)
        np.testing.assert_array_equal(before.sound, after.sound)
        assert before.segment == after.segment


def spoken_in_pieces(face: PortraitFace, places: list[int]) -> list[Moment]:
    stage = staged(face)
    stage.run(0.2)
    for begin, end in zip([0, *places], [*places, 9 * 640], strict=True):
        stage.push(SOUND[begin:end], 24000)
    stage.director.end()
    stage.run(0.4)
    return stage.moments


def test_a_snapshot_of_something_else_is_refused_in_one_line(face: PortraitFace, tmp_path: Path) -> None:
    save(snapshot_of(staged(face).director), IDENTITY, tmp_path / "session")
    with pytest.raises(
        UserError, match=r"is of a session with another portrait and another weights: nothing was resum"
    ):
        load(tmp_path / "session", {"portrait": "x", "weights": "y"})
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "torn").write_bytes((tmp_path / "session").read_bytes()[:5000])
    for name in ("empty", "torn", "missing"):
        with pytest.raises(UserError) as caught:
            load(tmp_path / name, IDENTITY)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be written"):
        save(snapshot_of(staged(face).director), IDENTITY, tmp_path / "no" / "such" / "folder")


def test_a_snapshot_is_small(face: PortraitFace, tmp_path: Path) -> None:
    """Little more than the eight seconds of sound that the speech encoder hears, twice."""
    stage = staged(face)
    stage.run(1)
    save(snapshot_of(stage.director), IDENTITY, tmp_path / "session")
    assert (tmp_path / "session").stat().st_size < 2.5 * 8 * 16000 * 4
