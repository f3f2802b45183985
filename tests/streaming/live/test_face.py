"""A portrait's face: chunks piece by piece, cuts, and what they go on from."""

import numpy as np
import pytest
import torch

from model.audio import Ring
from streaming.live.face import FaceState, Finished, PortraitFace, Rendered, cut
from tests.streaming.live.stage import small_face


@pytest.fixture(scope="module")
def face() -> PortraitFace:
    return small_face()


def generated(face: PortraitFace, state: FaceState, speech: np.ndarray) -> tuple[list, np.ndarray, FaceState]:
    units = list(face.generate(state, speech, 0))
    assert isinstance(units[-1], Finished)
    return units, np.concatenate([unit.rgb for unit in units if isinstance(unit, Rendered)]), units[-1].state


def speech_of(face: PortraitFace, seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(face.chunk.slice_samples)).astype(np.float32)


def test_a_chunk_is_steps_then_frames_then_its_end(face: PortraitFace) -> None:
    units, frames, state = generated(face, face.start(), speech_of(face, 0))
    kinds = [type(unit) for unit in units]
    steps = face.chunk.sample_steps - 1
    assert kinds[:steps] == [type(None)] * steps
    assert set(kinds[steps:-1]) == {Rendered}
    assert frames.shape == (4, 32, 48, 3)
    assert state.number == 1
    np.testing.assert_array_equal(state.tail, np.concatenate([face.start().tail, frames])[-5:])


def test_a_cut_at_a_chunks_end_is_what_the_chunk_hands_on_but_for_rounding(face: PortraitFace) -> None:
    speech = speech_of(face, 1)
    _, _, before = generated(face, face.start(), speech_of(face, 0))
    _, _, state = generated(face, before, speech)
    again = cut(before, speech, face.chunk.new_frames, state.tail)
    np.testing.assert_array_equal(again.ring.samples, state.ring.samples)
    assert again.motion is None
    motion, wanted = face._begin(again, 0).motion, state.motion
    assert wanted is not None
    assert float((motion - wanted).norm() / wanted.norm()) < 0.15, "random weights make much of half a level"


def test_the_frames_of_an_abandoned_chunk_do_not_matter_to_the_next(face: PortraitFace) -> None:
    _, frames, _ = generated(face, face.start(), speech_of(face, 1))
    for pieces in (1, 2, 3):
        units = face.generate(face.start(), speech_of(face, 2), 0)
        for _ in range(pieces):
            next(units)
        units.close()
        _, again, _ = generated(face, face.start(), speech_of(face, 1))
        np.testing.assert_array_equal(again, frames)


def test_a_ring_without_its_last_samples_keeps_the_gain_of_the_others() -> None:
    chunk = small_face().chunk
    rng = np.random.default_rng(0)
    rings = [Ring.empty(chunk)]
    for k in range(60):
        rings.append(rings[-1].append((0.01 * (1 + k % 7) * rng.standard_normal(2560)).astype(np.float32)))
    for before, after in (rings[:2], rings[30:32], rings[-2:]):
        np.testing.assert_array_equal(after.without_last(0, before).samples, after.samples)
        np.testing.assert_array_equal(after.without_last(2560, before).samples, before.samples)
        np.testing.assert_array_equal(after.without_last(2560, before).raw, before.raw)
        part = after.without_last(640, before)
        np.testing.assert_array_equal(part.samples[-1920:], after.samples[-2560:-640])
        np.testing.assert_array_equal(part.samples[:-1920], before.samples[1920:])
        assert len(part.samples) == chunk.cached_samples
        if before.gain is not None and after.gain is not None and part.gain is not None:
            assert part.gain == pytest.approx(after.gain + (before.gain - after.gain) / 4)
    with pytest.raises(ValueError, match=r"^count: got 2561"):
        rings[1].without_last(2561, rings[0])


def test_colours_are_compared_with_the_portrait(face: PortraitFace) -> None:
    portrait = face.start().tail[-1]
    assert face._distance(portrait) == 0
    darker = (portrait * 0.8).astype(np.uint8)
    assert 3 < face._distance(darker) < 30


def test_frames_that_are_not_finite_end_the_chunk(face: PortraitFace) -> None:
    motion = torch.full_like(face._begin(face.start(), 0).motion, float("nan"))
    state = FaceState(0, motion, face.start().tail, face.start().ring)
    with pytest.raises(Exception, match="holds NaN or infinity"):
        list(face.generate(state, speech_of(face, 0), 0))
