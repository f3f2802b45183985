"""Clips: seeds, motion that fits the data, and files that read back."""

from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from model.distill import espeak
from model.distill.clips import Clip, draw_clip, draw_motion, write_clip
from model.distill.face import MOTION, MOUTH
from model.distill.speech import HELD_OUT_VOICES, draw_track
from model.errors import UserError

needs_espeak = pytest.mark.skipif(not espeak.available(), reason="needs espeak-ng")
MOUTH_COLUMNS = [MOTION.index(name) for name in MOUTH]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return next(clip for clip in (draw_clip(1, index) for index in range(20)) if clip.track.kind == "speech")


@needs_espeak
def test_shapes_and_mouth(clip: Clip) -> None:
    assert (clip.motion.dtype, clip.motion.shape) == (np.float32, (33, 17))
    assert clip.reference_motion.shape == (17,)
    assert clip.track.wave.shape == (33 * 640,)
    assert np.array_equal(clip.motion[:, MOUTH_COLUMNS], clip.track.mouth)
    assert clip.frames(32).shape == (33, 32, 32, 3)
    assert clip.portrait(32).shape == (32, 32, 3)
    assert all(0 <= begin < 33 / 25 for begin, _ in clip.track.phonemes)


@needs_espeak
def test_index_and_seed_decide_everything(clip: Clip) -> None:
    same = draw_clip(clip.seed, clip.index)
    assert np.array_equal(same.motion, clip.motion)
    assert np.array_equal(same.track.wave, clip.track.wave)
    assert np.array_equal(same.identity.values, clip.identity.values)
    for other in (draw_clip(1, clip.index + 1), draw_clip(2, clip.index), draw_clip(1, clip.index, held_out=True)):
        assert not np.array_equal(other.motion, clip.motion)
        assert not np.array_equal(other.identity.values, clip.identity.values)


@needs_espeak
def test_held_out_clips_speak_with_held_out_voices() -> None:
    voices = {draw_clip(3, index, 5, held_out=True).track.voice for index in range(12)}
    assert voices - {""} <= set(HELD_OUT_VOICES)
    assert len(voices) > 3


@needs_espeak
def test_the_portrait_is_of_another_moment_and_its_mouth_is_closed_in_half_of_the_clips() -> None:
    clips = [draw_clip(4, index, 5) for index in range(40)]
    pose = slice(0, 3)
    distances = [np.abs(clip.reference_motion[pose] - clip.motion[0, pose]).max() for clip in clips]
    assert np.median(distances) > 0.005
    assert all(clip.reference_motion[MOTION.index("blink")] == 0 for clip in clips)
    closed = np.mean([not clip.reference_motion[MOUTH_COLUMNS].any() for clip in clips])
    assert 0.4 < closed < 0.9  # and where nobody speaks; the seed is fixed


def test_motion_has_the_documented_statistics() -> None:
    moved = [draw_motion(np.random.default_rng(seed), np.zeros((500, 6), np.float32)) for seed in range(40)]
    motion = dict(zip(MOTION, np.stack(moved).transpose(2, 0, 1), strict=True))  # [40 clips, 500 frames]
    assert motion["yaw"].std() == pytest.approx(0.1, rel=0.4)
    assert motion["pitch"].std() == pytest.approx(0.045, rel=0.4)
    blinks = ((motion["blink"] == 1)[:, 1:] & ~(motion["blink"] == 1)[:, :-1]).sum()
    assert 1 / 5 < blinks / (40 * 20) < 1 / 2.5  # per second
    assert np.corrcoef(motion["gaze_x"].ravel(), motion["yaw"].ravel())[0, 1] < -0.3
    assert all(motion[name].min() >= 0 and motion[name].max() <= 1 for name in ("blink", "smile"))
    assert np.abs(np.diff(motion["yaw"], axis=1)).max() < 0.06  # no jumps
    assert np.ptp(motion["breath"], axis=1).min() > 1.9


def test_liveliness_moves_the_head_and_not_the_lids() -> None:
    usual, calm = (draw_motion(np.random.default_rng(2), np.zeros((200, 6), np.float32), x) for x in (1.0, 0.25))
    for name, column in zip(MOTION, (usual - calm).T, strict=True):
        assert column.any() == (name not in ("blink", "breath", *MOUTH)), name
    for i in range(3):  # yaw, pitch, roll; each also has a place of its own
        np.testing.assert_allclose(np.ptp(calm[:, i]), np.ptp(usual[:, i]) / 4, rtol=1e-4)


def test_the_mouth_does_not_move_the_head() -> None:
    mouths = (np.zeros((50, 6), np.float32), np.ones((50, 6), np.float32))
    closed, moving = (draw_motion(np.random.default_rng(1), mouth) for mouth in mouths)
    others = [i for i in range(len(MOTION)) if i not in MOUTH_COLUMNS]
    assert np.array_equal(closed[:, others], moving[:, others])
    assert (moving[:, MOUTH_COLUMNS] == 1).all()


@needs_espeak
def test_a_written_clip_reads_back(clip: Clip, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "clip"
    write_clip(clip, folder, 64)
    assert sorted(path.name for path in folder.iterdir()) == ["portrait.png", "truth.npz", "video.mp4", "voice.wav"]
    assert np.array_equal(np.asarray(Image.open(folder / "portrait.png")), clip.portrait(64))
    wave, rate = soundfile.read(folder / "voice.wav", dtype="float32")
    assert rate == 16000
    np.testing.assert_allclose(wave, clip.track.wave, atol=2 / 32768)
    with np.load(folder / "truth.npz", allow_pickle=False) as truth:
        assert np.array_equal(truth["mouth"], clip.track.mouth)
        assert np.array_equal(truth["motion"], clip.motion)
        assert tuple(truth["motion_names"]) == MOTION
        assert truth["mouth_centre"].shape == (33, 2)
        assert np.array_equal(truth["identity"], clip.identity.values)
        assert truth["skin_tone"] == np.float32(clip.identity.skin_tone)
        assert (str(truth["kind"]), str(truth["voice"])) == (clip.track.kind, clip.track.voice)
        phonemes = zip(truth["phoneme_seconds"].tolist(), truth["phoneme_symbols"].tolist(), strict=True)
        assert [symbol for _, symbol in phonemes] == [symbol for _, symbol in clip.track.phonemes]
    with av.open(folder / "video.mp4") as container:
        assert container.streams.video[0].average_rate == 25
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(folder / "video.mp4") as container:
        sound = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert frames.shape == (33, 64, 64, 3)
    assert np.abs(frames.astype(float) - clip.frames(64)).mean() < 4
    assert abs(len(sound) - len(wave)) <= 2 * 1024  # AAC codes blocks of 1024 samples
    assert np.corrcoef(sound[: len(wave)], wave[: len(sound)])[0, 1] > 0.95


@needs_espeak
def test_a_clip_without_speech_is_written_too(tmp_path: Path) -> None:
    track = draw_track(np.random.default_rng(1), 5, kind="silence")
    drawn = draw_clip(1, 1, 5)
    write_clip(Clip(1, 1, False, drawn.identity, drawn.motion, drawn.reference_motion, track), tmp_path, 32)
    with np.load(tmp_path / "truth.npz") as truth:
        assert len(truth["phoneme_symbols"]) == 0


@needs_espeak
def test_a_folder_that_cannot_be_written_is_one_line(clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write clip \d+ to .*file"):
        write_clip(clip, tmp_path / "file", 32)
