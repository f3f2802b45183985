"""The drawn heads against what is known of them: where the mouth is, what each number moves, and windows as crops."""

import dataclasses
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.distill import face
from model.distill.face import FIELDS, MOTION, MOUTH, Identity, draw_identity, mouth_centre, render
from model.errors import UserError
from model.machine import CACHE_ENV

POSES = ({}, {"yaw": 0.2, "pitch": 0.08, "roll": 0.05, "shift_x": 0.05}, {"yaw": -0.2, "pitch": -0.08, "shift_y": 0.04})
LIMITS = {"yaw": 0.25, "pitch": 0.1, "roll": 0.06, "shift_x": 0.06, "shift_y": 0.06} | dict.fromkeys(MOTION[5:], 1.0)
LOWEST = [-LIMITS[name] if name not in ("blink", "smile", *MOUTH) else 0.0 for name in MOTION]


def person(seed: int, textured: bool = False) -> Identity:
    return draw_identity(np.random.default_rng(seed), textured)


def motion(**numbers: float) -> NDArray[np.float32]:
    return np.asarray([[numbers.get(name, 0.0) for name in MOTION]], np.float32)


def changed(identity: Identity, before: dict[str, float], **after: float) -> NDArray[np.float32]:
    """How much each pixel changes, summed over the colours, [128, 128]."""
    pictures = render(identity, np.concatenate((motion(**before), motion(**before | after)))).astype(np.float32)
    return np.abs(pictures[1] - pictures[0]).sum(-1)


def centroid(weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean column and row."""
    rows, columns = np.mgrid[: weight.shape[0], : weight.shape[1]] + 0.5
    return np.asarray(((weight * columns).sum(), (weight * rows).sum())) / weight.sum()


@given(left=st.integers(0, 90), top=st.integers(0, 90), width=st.integers(1, 38), seed=st.integers(0, 3))
@settings(max_examples=25)
def test_window_is_a_crop_of_the_picture(left: int, top: int, width: int, seed: int) -> None:
    moving = np.concatenate((motion(yaw=0.1, open=0.4, roll=0.03), motion(pitch=-0.1, wide=0.7, blink=0.5)))
    identity = person(seed, textured=seed % 2 == 1)
    picture = render(identity, moving)
    window = render(identity, moving, window=(left, top, width))
    np.testing.assert_array_equal(window, picture[:, top : top + width, left : left + width])


def test_same_seed_draws_the_same_person_and_picture() -> None:
    first, again, other = person(7), person(7), person(8)
    np.testing.assert_array_equal(first.values, again.values)
    moving = motion(yaw=0.1, open=0.5)
    np.testing.assert_array_equal(render(first, moving), render(again, moving))
    assert np.abs(render(first, moving).astype(int) - render(other, moving)).mean() > 5


def test_threads_draw_the_same_as_one() -> None:
    people = [person(seed, textured=seed % 2 == 0) for seed in range(6)]
    moving = np.concatenate([motion(yaw=0.02 * k, open=0.1 * k) for k in range(4)])
    alone = [render(identity, moving) for identity in people]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda identity: render(identity, moving), people))
    np.testing.assert_array_equal(alone, together)


def test_threads_compile_the_renderer_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = Path(face._library()._name)
    together, second, compiled = threading.Barrier(4), threading.Barrier(2), []

    def copy_library(target: Path) -> None:
        compiled.append(target)
        with suppress(threading.BrokenBarrierError):
            second.wait(timeout=0.3)  # gives another thread time to come here, which it must not
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)

    def first_render(_: int) -> NDArray[np.uint8]:
        together.wait()
        return render(person(0), motion(), size=8)

    monkeypatch.setenv(CACHE_ENV, str(tmp_path))
    monkeypatch.setattr(face, "_compile", copy_library)
    face._loaded.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(first_render, range(4)))
    face._loaded.cache_clear()
    assert len(compiled) == 1


def test_frames_do_not_depend_on_the_frames_before() -> None:
    identity, first, second = person(3), motion(open=0.8, yaw=-0.2), motion(open=0.1, yaw=0.2)
    both = render(identity, np.concatenate((first, second)))
    np.testing.assert_array_equal(both[1:], render(identity, second))


@pytest.mark.parametrize("pose", POSES)
@pytest.mark.parametrize("size", [96, 128])
def test_mouth_centre_is_that_of_the_lips(pose: dict[str, float], size: int) -> None:
    for seed in range(6):
        identity = person(seed)
        values, start = identity.values.copy(), 0
        for name, count in FIELDS.items():
            if name in ("lip_inner", "lip_rim"):
                values[start : start + count] = 0, 6, 0  # a green that nothing else has
            start += count
        painted = render(dataclasses.replace(identity, values=values), motion(**pose), size)[0].astype(np.float32)
        lips = np.maximum(painted - render(identity, motion(**pose), size)[0], 0)[..., 1]
        column, row = mouth_centre(identity, motion(**pose), size)[0] - centroid(lips)
        assert abs(column) < 0.015 * size
        assert 0 < row < 0.04 * size  # a little below the closed lips


@pytest.mark.parametrize("pose", POSES)
def test_opening_changes_the_picture_at_the_mouth(pose: dict[str, float]) -> None:
    for seed in range(6):
        identity = person(seed)
        weight = changed(identity, pose, open=0.15)
        column, row = centroid(weight) - mouth_centre(identity, motion(**pose))[0]
        assert abs(column) < 6  # the whole jaw moves, of which the near side is the larger part
        assert -1 < row < 12


@pytest.mark.parametrize("name", MOUTH)
def test_numbers_of_the_mouth_change_the_lower_face_only(name: str) -> None:
    for seed in range(6):
        identity = person(seed)
        weight = changed(identity, {"open": 0.2} if name in ("close", "tongue") else {}, **{name: 1.0})
        column, row = np.round(mouth_centre(identity, motion())[0]).astype(int)
        mouth = weight[row - 16 : row + 16, column - 22 : column + 22]
        assert mouth.mean() > 8
        assert weight[: row - 24].max() <= 6  # above the nose's tip
        assert mouth.sum() > (0.45 if name == "open" else 0.7) * weight.sum()


def test_more_opening_changes_more() -> None:
    for seed in range(6):
        total = [changed(person(seed), {}, open=opening).sum() for opening in (0.2, 0.4, 0.6, 0.8, 1.0)]
        assert total == sorted(total)


def test_pressed_lips_hide_an_opening() -> None:
    for seed in range(6):
        assert changed(person(seed), {"close": 1.0}, open=1.0, tongue=1.0, lip_teeth=1.0).max() <= 6


def test_blink_changes_the_eyes_only() -> None:
    for seed in range(6):
        identity = person(seed)
        weight = changed(identity, {}, blink=1.0)
        column, row = mouth_centre(identity, motion())[0]
        middle = centroid(weight)
        assert abs(middle[0] - column) < 3
        assert 20 < row - middle[1] < 60
        assert weight[int(row) - 10 :].max() <= 6
        assert weight[:, int(column) - 30 : int(column) + 30].sum() > 0.95 * weight.sum()


numbers = st.tuples(*(st.floats(low, LIMITS[name]) for low, name in zip(LOWEST, MOTION, strict=True)))


@given(moving=numbers, seed=st.integers(0, 400))
@settings(max_examples=40)
def test_pictures_stay_sane_and_move_smoothly(moving: tuple[float, ...], seed: int) -> None:
    start = np.asarray([moving], np.float32)
    step = np.random.default_rng(seed).uniform(-0.002, 0.002, start.shape).astype(np.float32)
    first, second = render(person(seed, seed % 3 == 0), np.concatenate((start, start + step)), 64).astype(np.float32)
    assert 20 < first.mean() < 235
    assert first.std() > 10
    assert np.abs(second - first).mean() < 3
    assert np.abs(second - first).max() < 110
    assert np.isfinite(mouth_centre(person(seed), start)).all()


def test_texture_keeps_the_person() -> None:
    plain, textured = person(11), person(11, textured=True)
    kept = np.asarray([name != "textured" for name, count in FIELDS.items() for _ in range(count)])
    np.testing.assert_array_equal(plain.values[kept], textured.values[kept])
    assert np.abs(render(plain, motion()).astype(int) - render(textured, motion())).mean() > 2


def test_share_of_textured_heads_and_spread_of_skin_tones() -> None:
    rng = np.random.default_rng(0)
    people = [draw_identity(rng) for _ in range(400)]
    assert 0.22 < np.mean([identity["textured"] for identity in people]) < 0.38
    tones = np.asarray([identity.skin_tone for identity in people])
    assert tones.min() < 0.05
    assert tones.max() > 0.95
    red = np.asarray([identity.values[list(FIELDS).index("skin")] for identity in people])  # all before it are numbers
    assert np.corrcoef(tones, red)[0, 1] < -0.9


@pytest.mark.parametrize("bad", [np.zeros(17), np.zeros((2, 16)), np.zeros((1, 2, 17)), np.full((1, 17), np.nan)])
def test_bad_motion(bad: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="motion"):
        render(person(0), bad)
    with pytest.raises(ValueError, match="motion"):
        mouth_centre(person(0), bad)


@pytest.mark.parametrize("window", [(-1, 0, 8), (0, 125, 8), (0, 0, 0), (0, 0, 129)])
def test_bad_window(window: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="window"):
        render(person(0), motion(), window=window)


def test_bad_size_and_identity() -> None:
    with pytest.raises(ValueError, match="size"):
        render(person(0), motion(), size=4)
    short = dataclasses.replace(person(0), values=person(0).values[:-1])
    with pytest.raises(ValueError, match=r"identity\.values"):
        render(short, motion())


@pytest.mark.parametrize(("compiler", "message"), [("no-such-compiler", "no-such-compiler"), ("false", "exit code 1")])
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, message: str) -> None:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    face._loaded.cache_clear()
    with pytest.raises(UserError, match=message) as error:
        render(person(0), motion())
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # no half-written library
    face._loaded.cache_clear()
