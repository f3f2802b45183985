"""Sinks: every frame once, in order, in time with the sound, in its colours, whatever happens on the way."""

import errno
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
import soundfile
from av.error import InvalidDataError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.errors import UserError
from streaming import sinks
from streaming.sinks import Sink, open_sink
from streaming.sources import SOUND_RATE
from tests.processes import Interpreter

FPS = 25
PERIOD = SOUND_RATE // FPS
SIDE = 32


def marked(first: int, count: int) -> np.ndarray:
    """Frames that show their number in binary: a 4 x 4 board of black and white squares."""
    bits = (np.arange(first, first + count)[:, None] >> np.arange(16)) & 1
    board = bits.reshape(count, 4, 4).repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
    return np.repeat(board[..., None] * 255, 3, axis=3).astype(np.uint8)


def number(picture: np.ndarray) -> int:
    """The number that a frame shows."""
    squares = picture.reshape(4, SIDE // 4, 4, SIDE // 4, 3).mean(axis=(1, 3, 4))
    return int(((squares.ravel() > 128) << np.arange(16)).sum())


def silence(frames: int, channels: int = 1) -> np.ndarray:
    return np.zeros((frames * PERIOD, channels), np.float32)


def written(out: str | Path, *counts: int, channels: int = 1) -> Sink:
    """A sink, still open, that took marked frames in writes of so many each."""
    sink = open_sink(str(out), SIDE, SIDE, FPS, SOUND_RATE, channels)
    for count in counts:
        sink.write(marked(sink.frames, count), silence(count, channels))
    return sink


class Film(NamedTuple):
    """What a player makes of a file."""

    times: np.ndarray  # [frame], seconds
    pictures: np.ndarray  # [frame, height, width, 3]
    sound: np.ndarray  # [sample, channel]
    start: float  # of the sound, seconds

    @property
    def numbers(self) -> list[int]:
        return [number(picture) for picture in self.pictures]


def played(path: Path) -> Film:
    with av.open(path) as film:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in film.decode(video=0)]
    with av.open(path) as film:
        channels, rate = film.streams.audio[0].codec_context.channels, film.streams.audio[0].rate
        blocks = list(film.decode(audio=0))
    times, pictures = zip(*frames, strict=True)
    starts = np.array([block.time for block in blocks])
    lengths = np.array([block.samples for block in blocks])
    np.testing.assert_allclose(starts, starts[:1] + (np.cumsum(lengths) - lengths) / rate, atol=1e-6)  # no gap
    sound = np.concatenate([np.zeros((channels, 0)), *(block.to_ndarray() for block in blocks)], axis=1).T
    return Film(np.array(times), np.array(pictures), sound, starts[0] if len(starts) else 0.0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# MP4


@settings(max_examples=10)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=4), channels=st.sampled_from([1, 2]))
def test_mp4_has_every_frame_in_order(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], channels: int
) -> None:
    folder = tmp_path_factory.mktemp("out")
    with written(folder / "film.mp4", *counts, channels=channels):
        assert names(folder) == ["film.part.mp4"]
        part = played(folder / "film.part.mp4")
    assert names(folder) == ["film.mp4"]
    film = played(folder / "film.mp4")
    assert part.numbers == film.numbers == list(range(sum(counts)))
    np.testing.assert_allclose(film.times, np.arange(sum(counts)) / FPS, atol=1e-6)
    np.testing.assert_allclose(part.times - film.times, 1024 / SOUND_RATE, atol=1e-6)
    assert film.sound.shape[1] == part.sound.shape[1] == channels
    assert film.start == part.start == 0
    assert sum(counts) * PERIOD <= len(film.sound) < sum(counts) * PERIOD + 1024
    assert len(part.sound) - 1024 > sum(counts) * PERIOD - 3072  # what it lacks is in the encoder


@pytest.mark.parametrize("rate", [SOUND_RATE, 16000])
def test_mp4_flashes_and_clicks_coincide(tmp_path: Path, rate: int) -> None:
    """A minute, written in uneven pieces: every white frame begins with a click, in the part file and in the end."""
    flashes, period = np.arange(7, 60 * FPS, 50), rate // FPS
    frames = np.zeros((60 * FPS, SIDE, SIDE, 3), np.uint8)
    frames[flashes] = 255
    sound = np.zeros((len(frames) * period, 1), np.float32)
    for flash in flashes:
        sound[flash * period : flash * period + rate // 1000] = 0.9
    cuts = np.cumsum(np.random.default_rng(0).integers(1, 60, 40))
    cuts = [0, *cuts[cuts < len(frames)], len(frames)]
    with open_sink(str(tmp_path / "film.mp4"), SIDE, SIDE, FPS, rate, 1) as sink:
        for one, two in pairwise(cuts):
            sink.write(frames[one:two], sound[one * period : two * period])
        part = played(tmp_path / "film.part.mp4")
    for film in (part, played(tmp_path / "film.mp4")):
        white = film.times[film.pictures.mean(axis=(1, 2, 3)) > 128]
        loud = np.flatnonzero(np.abs(film.sound[:, 0]) > 0.3)
        clicks = film.start + loud[np.diff(loud, prepend=-period) > period // 2] / rate
        assert len(white) == len(clicks) == len(flashes)
        np.testing.assert_allclose(white, clicks, atol=0.001)


def test_mp4_sound_is_the_sound(tmp_path: Path) -> None:
    """A tone comes back sample for sample but for the codec's noise, in pieces as at once."""
    tone = 0.4 * np.sin(2 * np.pi * 440 * np.arange(3 * SOUND_RATE) / SOUND_RATE).astype(np.float32)[:, None]
    heard = []
    for step in (5, 75):
        with open_sink(str(tmp_path / "film.mp4"), SIDE, SIDE, FPS, SOUND_RATE, 1) as sink:
            for first in range(0, 75, step):
                sink.write(marked(first, step), tone[first * PERIOD : (first + step) * PERIOD])
        heard.append(played(tmp_path / "film.mp4").sound)
    np.testing.assert_array_equal(*heard)
    np.testing.assert_allclose(heard[0][8192 : 2 * SOUND_RATE], tone[8192 : 2 * SOUND_RATE], atol=0.02)


def test_mp4_colours(tmp_path: Path) -> None:
    """Flat patches, read back by the formula of BT.709 in float64 (limited range), and said to be so in the file."""
    patches = np.random.default_rng(1).integers(0, 256, (20, 3))
    patches[:5] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]]
    frames = np.broadcast_to(patches[:, None, None], (20, SIDE, SIDE, 3)).astype(np.uint8)
    with open_sink(str(tmp_path / "film.mp4"), SIDE, SIDE, FPS, SOUND_RATE, 1) as sink:
        sink.write(frames, silence(20))
    with av.open(tmp_path / "film.mp4") as film:
        context = film.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        tags = (context.color_range, context.colorspace, context.color_primaries, context.color_trc)
        planes = [frame.to_ndarray().astype(np.float64) for frame in film.decode(video=0)]
    assert tags == (1, 1, 1, 1)  # MPEG; BT.709, BT.709, BT.709 of ITU-T H.273
    for plane, patch in zip(planes, patches, strict=True):
        y, u, v = (plane[:SIDE].mean() - 16) / 219, *((plane[SIDE:].reshape(2, -1).mean(axis=1) - 128) / 224)
        red, blue = y + 1.5748 * v, y + 1.8556 * u
        green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
        np.testing.assert_allclose(np.array([red, green, blue]) * 255, patch, atol=3)


def test_mp4_starts_with_its_index_and_is_the_same_twice(tmp_path: Path) -> None:
    for name in ("one.mp4", "two.mp4"):
        written(tmp_path / name, 28, 28, 5).close()
    one, two = ((tmp_path / name).read_bytes() for name in ("one.mp4", "two.mp4"))
    assert one == two
    assert 0 < one.index(b"moov") < one.index(b"mdat")
    assert b"moof" not in one


def test_mp4_replaces_the_old_target_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "film.mp4"
    target.write_bytes(b"old")
    sink = written(target, 5)
    assert target.read_bytes() == b"old"
    sink.close()
    sink.close()  # once more does nothing
    assert played(target).numbers == list(range(5))


@pytest.mark.parametrize(
    "name",
    [
        "2026-11-28T17:30:00.mp4",
        "take:2.mp4",
        "file:a.mp4",
        "http:x.mp4",
        "pipe:1.mp4",
        "a|b?c#d.mp4",
        "%03d.mp4",
        "\udcff.mp4",
    ],
)
def test_mp4_names_are_no_addresses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a relative name, of which FFmpeg takes what stands before a colon for a protocol
    written(name, 3).close()
    assert names(tmp_path) == [name]
    Path(name).rename("film.mp4")
    assert played(tmp_path / "film.mp4").numbers == [0, 1, 2]


@pytest.mark.parametrize(
    "error", [InvalidDataError(1, "Invalid data found"), ValueError("no such\nstream"), MemoryError("out of memory")]
)
def test_mp4_that_cannot_be_finished_keeps_its_frames(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(part: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise error

    sink = written(tmp_path / "film.mp4", 4)
    with monkeypatch.context() as patched:
        patched.setattr(sinks, "_remux", fail)
        with pytest.raises(
            UserError, match=r"film\.mp4' cannot be written \(.+\); the 4 frames .*film\.part\.mp4'"
        ) as raised:
            sink.close()
    assert "\n" not in str(raised.value)
    sink.close()
    assert names(tmp_path) == ["film.part.mp4"]
    assert played(tmp_path / "film.part.mp4").numbers == [0, 1, 2, 3]
    with pytest.raises(UserError, match="holds the frames of another run; move or delete it first"):
        written(tmp_path / "film.mp4")
    (tmp_path / "film.part.mp4").unlink()
    written(tmp_path / "film.mp4", 2).close()
    assert names(tmp_path) == ["film.mp4"]


def test_mp4_at_a_link_into_a_folder_that_is_missing_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").symlink_to(tmp_path / "missing" / "film.mp4")
    with pytest.raises(UserError, match=r"film\.mp4' cannot be written \(No such file or directory\); name another"):
        written(tmp_path / "film.mp4")
    assert names(tmp_path) == ["film.mp4"]


def test_mp4_of_an_exception(tmp_path: Path) -> None:
    """The frames so far are a finished film; without any, nothing is left."""
    for count, left in ((3, ["film.mp4"]), (0, [])):
        folder = tmp_path / str(count)
        folder.mkdir()
        with pytest.raises(RuntimeError, match="elsewhere"), written(folder / "film.mp4", count):
            raise RuntimeError("elsewhere")
        assert names(folder) == left
    assert played(tmp_path / "3" / "film.mp4").numbers == [0, 1, 2]


CHILD = """
import signal, sys
from tests.streaming.test_sinks import marked, silence, written
sink = written(sys.argv[1])
for count in map(int, sys.argv[2:]):
    sink.write(marked(sink.frames, count), silence(count))
    print(sink.frames, flush=True)
signal.pause()
"""


def killed(python: Interpreter, out: Path, *counts: int) -> int:
    """Frames of the last `write` that returned before the process that made it was killed."""
    process = python.start("-c", CHILD, out, *counts)
    lines = [process.stdout.readline() for _ in counts]
    process.kill()
    assert process.wait() == -signal.SIGKILL
    return int(lines[-1])


def test_mp4_survives_sigkill(python: Interpreter, tmp_path: Path) -> None:
    counts = (28, 1, 28, 3, 28)
    assert killed(python, tmp_path / "film.mp4", *counts) == sum(counts)
    assert names(tmp_path) == ["film.part.mp4"]
    film = played(tmp_path / "film.part.mp4")
    assert film.numbers == list(range(sum(counts)))
    np.testing.assert_allclose(film.times, np.arange(sum(counts)) / FPS + 1024 / SOUND_RATE, atol=1e-6)
    with pytest.raises(UserError, match=r"film\.part\.mp4' holds the frames of another run"):
        written(tmp_path / "film.mp4")
    assert played(tmp_path / "film.part.mp4").numbers == film.numbers


def test_folder_survives_sigkill(python: Interpreter, tmp_path: Path) -> None:
    assert killed(python, tmp_path / "film", 3, 4) == 7
    assert names(tmp_path / "film") == [*(f"{k:06d}.png" for k in range(7)), "sound.wav"]
    assert soundfile.info(tmp_path / "film" / "sound.wav").frames == 7 * PERIOD


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root and the capability")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def noisy(first: int) -> np.ndarray:
    """Two marked frames with noise that no encoder makes small."""
    noise = np.random.default_rng(first).integers(-60, 60, (2, SIDE, SIDE, 3))
    return np.clip(marked(first, 2).astype(int) + noise, 0, 255).astype(np.uint8)


def fill(sink: Sink) -> None:
    """Writes until there is an end to it."""
    with sink:
        while True:
            sink.write(noisy(sink.frames), silence(2))


def test_mp4_on_a_disk_that_fills_up(small_disk: Path) -> None:
    part = small_disk / "film.part.mp4"
    sink = written(small_disk / "film.mp4")
    with pytest.raises(UserError) as raised:
        fill(sink)
    count = sink.frames
    assert count > 20
    message = f"cannot be written (No space left on device); the {count} frames made so far are in '{part}'"
    assert str(raised.value).endswith(message)
    assert "\n" not in str(raised.value)
    assert names(small_disk) == ["film.part.mp4"]
    assert played(part).numbers == list(range(count))


@pytest.mark.parametrize("spare", [0, 20_000, 60_000])
def test_mp4_without_room_for_the_final_copy(small_disk: Path, spare: int) -> None:
    """Fills half the disk, then the other half but for some bytes with another file."""
    sink = open_sink(str(small_disk / "film.mp4"), SIDE, SIDE, FPS, SOUND_RATE, 1)
    part = small_disk / "film.part.mp4"
    while part.stat().st_size < 128 * 1024:
        sink.write(noisy(sink.frames), silence(2))
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "other").write_bytes(bytes(free - spare))
    with pytest.raises(UserError, match=rf"the {sink.frames} frames made so far are in '{part}'"):
        sink.close()
    assert names(small_disk) == ["film.part.mp4", "other"]
    assert played(part).numbers == list(range(sink.frames))


def test_folder_on_a_disk_that_fills_up(small_disk: Path) -> None:
    sink = written(small_disk / "film")
    with pytest.raises(UserError, match=r"takes no more \(No space left on device\)"):
        fill(sink)
    pictures = sorted((small_disk / "film").glob("*.png"))
    assert [number(np.array(Image.open(path))) for path in pictures] == list(range(len(pictures)))
    assert len(pictures) >= sink.frames > 5
    assert names(small_disk / "film") == [*(path.name for path in pictures), "sound.wav"]
    assert soundfile.read(small_disk / "film" / "sound.wav")[0].shape[0] >= sink.frames * PERIOD


def test_mp4_whose_writes_fail_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = written(tmp_path / "film.mp4", 4, 5)

    def half(file, data) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(sinks, "_write_all", half)
    with pytest.raises(UserError, match=r"Disk quota exceeded.*the 9 frames"):
        sink.write(marked(9, 3), silence(3))
    sink.close()
    assert names(tmp_path) == ["film.part.mp4"]
    assert played(tmp_path / "film.part.mp4").numbers == list(range(9))


def test_mp4_interrupted_while_writing_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = written(tmp_path / "film.mp4", 4, 5)

    def half(file, data) -> None:
        file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sinks, "_write_all", half)
        with pytest.raises(KeyboardInterrupt):
            sink.write(marked(9, 3), silence(3))
    sink.close()
    assert played(tmp_path / "film.mp4").numbers == list(range(9))


def test_mp4_with_no_room_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file, data) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sinks, "_write_all", full)
    with pytest.raises(UserError, match=r"No space left on device.; name another place"):
        written(tmp_path / "film.mp4")
    assert names(tmp_path) == []


# Folder of PNGs


@pytest.mark.parametrize("out", ["film", "film.d/"])
def test_folder_has_the_exact_pictures_and_sound(tmp_path: Path, out: str) -> None:
    rng = np.random.default_rng(2)
    frames = rng.integers(0, 256, (5, 20, 12, 3), np.uint8)
    sound = rng.uniform(-1.2, 1.2, (5 * PERIOD, 2)).astype(np.float32)
    folder = tmp_path / out
    with open_sink(f"{tmp_path}/{out}", 12, 20, FPS, SOUND_RATE, 2) as sink:
        for cut in (slice(0, 2), slice(2, 5)):
            sink.write(frames[cut], sound[cut.start * PERIOD : cut.stop * PERIOD])
            assert names(folder) == [*(f"{k:06d}.png" for k in range(cut.stop)), "sound.wav"]
            heard, rate = soundfile.read(folder / "sound.wav", dtype="int16")
            assert (rate, len(heard)) == (SOUND_RATE, cut.stop * PERIOD)
    for k, frame in enumerate(frames):
        np.testing.assert_array_equal(np.array(Image.open(folder / f"{k:06d}.png")), frame)
    heard, _ = soundfile.read(folder / "sound.wav")
    np.testing.assert_allclose(heard, np.clip(sound, -1, 1), atol=1e-4)


def test_wav_header_beyond_4_gib() -> None:
    header = sinks._wav_header(SOUND_RATE, 2, 2**33)
    assert len(header) == 44
    assert struct.unpack("<I", header[4:8]) == struct.unpack("<I", header[40:]) == (2**32 - 1,)


def test_folder_of_an_exception(tmp_path: Path) -> None:
    (tmp_path / "was").mkdir()
    for out in ("new", "was"):
        with pytest.raises(RuntimeError, match="elsewhere"), written(tmp_path / out):
            raise RuntimeError("elsewhere")
    assert names(tmp_path) == ["was"]
    assert names(tmp_path / "was") == []
    with pytest.raises(RuntimeError, match="elsewhere"), written(tmp_path / "new", 1):
        raise RuntimeError("elsewhere")
    assert names(tmp_path / "new") == ["000000.png", "sound.wav"]


# Raw frames on stdout


def test_stdout_gets_the_bytes_at_once(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    with open_sink("-", SIDE, SIDE, FPS, SOUND_RATE, 1) as sink:
        for first in (0, 3):
            sink.write(marked(first, 3), silence(3))
            assert capfdbinary.readouterr().out == marked(first, 3).tobytes()
        sink.write(marked(0, 6)[::2], silence(3))  # not contiguous
    assert capfdbinary.readouterr().out == marked(0, 6)[::2].tobytes()


def test_stdout_whose_reader_goes(python: Interpreter) -> None:
    program = (
        "from tests.streaming.test_sinks import written; from model.errors import UserError\n"
        "try: written('-', *[28] * 100)\n"
        "except UserError as error: raise SystemExit(str(error))"
    )
    process = python.start("-c", program)
    os.read(process.stdout.fileno(), 10)
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() == 1
    assert told.startswith("stdout takes no more after ")
    assert told.endswith("(Broken pipe); keep its reader running\n")
    assert told.count("\n") == 1


# All of them


@pytest.mark.parametrize("out", ["film.mp4", "film/", "-"])
def test_frames_in_any_memory_layout(tmp_path: Path, out: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """As they come from a tensor [frame, channel, row, column], of which every second frame is taken."""
    planar = np.ascontiguousarray(marked(0, 6).transpose(0, 3, 1, 2))
    with open_sink(out if out == "-" else f"{tmp_path}/{out}", SIDE, SIDE, FPS, SOUND_RATE, 1) as sink:
        sink.write(planar.transpose(0, 2, 3, 1)[::2], silence(3))
    if out == "-":
        pictures = np.frombuffer(capfdbinary.readouterr().out, np.uint8).reshape(3, SIDE, SIDE, 3)
    elif out == "film/":
        pictures = [np.array(Image.open(path)) for path in sorted((tmp_path / out).glob("*.png"))]
    else:
        pictures = played(tmp_path / out).pictures
    assert [number(picture) for picture in pictures] == [0, 2, 4]


# Mistakes


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "dir.mp4").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "picture").touch()
    before = names(tmp_path)
    for out, word in {
        "missing/film.mp4": "No such file or directory",
        "file/film.mp4": "Not a directory",
        "dir.mp4": "is a directory",
        "film.avi": r"NAME\.mp4 .* FOLDER/ .* - for raw",
        "full": "is not empty",
        "file/": "exists and is no folder; give NAME.mp4",
        "missing/film": "No such file or directory",
    }.items():
        with pytest.raises(UserError, match=word) as raised:
            open_sink(f"{tmp_path}/{out}", SIDE, SIDE, FPS, SOUND_RATE, 1)
        assert "\n" not in str(raised.value)
    assert names(tmp_path) == before


def test_a_read_only_place(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a read-only file system needs root and the capability")
    try:
        for out in ("film.mp4", "film/"):
            with pytest.raises(UserError, match="Read-only file system"):
                open_sink(f"{tmp_path}/{out}", SIDE, SIDE, FPS, SOUND_RATE, 1)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_programming_mistakes_name_the_argument(tmp_path: Path) -> None:
    sink = written(tmp_path / "film.mp4")
    good, sound = marked(0, 2), silence(2)
    bad: list[tuple[Any, Any, str]] = [
        (good.astype(np.float32), sound, "frames: float32"),
        (good[:, 1:], sound, r"frames: uint8 of shape \(2, 31, 32, 3\)"),
        (good[0], sound, "frames"),
        (good, sound[:, 0], "sound"),
        (good, silence(2, channels=2), "sound"),
        (good, sound.astype(np.float64), "sound: float64"),
    ]
    for frames, samples, name in bad:
        with pytest.raises(ValueError, match=name):
            sink.write(frames, samples)
    sink.close()
    for size in ((31, 32), (32, 31)):
        with pytest.raises(ValueError, match="width, height"):
            open_sink(str(tmp_path / "odd.mp4"), *size, FPS, SOUND_RATE, 1)
    with pytest.raises(ValueError, match="channels: 6"):
        open_sink(str(tmp_path / "odd.mp4"), SIDE, SIDE, FPS, SOUND_RATE, 6)
    with pytest.raises(ValueError, match="fps: 29"):
        open_sink(str(tmp_path / "odd.mp4"), 32, 32, 29, SOUND_RATE, 1)
    assert names(tmp_path) == []
