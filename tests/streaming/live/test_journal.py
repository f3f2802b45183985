"""A process that is killed at any moment loses neither sound that it took nor a moment that it handed over."""

import shutil
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming.live import journal as journal_module
from streaming.live import opening
from streaming.live import session as session_module
from streaming.live.director import Director, Options
from streaming.live.journal import End, Interrupt, Journal, Record, Sound, Taken, records, replay
from streaming.live.session import LiveSession
from streaming.live.snapshot import Snapshot, load, restore
from streaming.live.voice import Voice
from tests.streaming.live.stage import DrawnFace, tone
from tests.streaming.live.test_session import VirtualClock

IDENTITY = {"portrait": "a"}


def fresh() -> Director:
    face = DrawnFace()
    return Director(face, Voice("segments", face.chunk, 1500), Options("wait", 28))


def resumed(folder: Path, position: int | None = None) -> Director:
    director, path = fresh(), folder / "session"
    snapshot = load(path, IDENTITY)
    restore(director, snapshot)
    replay(director, records(path, snapshot.values["journal"]), position, 0.0)
    return director


def unshown_sound(director: Director) -> list[NDArray[np.float32]]:
    """The sound that somebody sent and nobody has heard: of frames that are made or in work, and of the queue."""
    return [sound.sound for sound in (*director._planned, *director.voice.frames) if sound.segment is not None]


def assert_same(one: Director, other: Director) -> None:
    assert (one.shown, one.last_shown, one.playback.state) == (other.shown, other.last_shown, other.playback.state)
    np.testing.assert_array_equal(np.stack(one.recent), np.stack(other.recent))
    for before, after in zip(one.made, other.made, strict=False):  # a chunk in work is whole in the resumed one
        np.testing.assert_array_equal(before.rgb, after.rgb)
    assert len(other.made) >= len(one.made)
    np.testing.assert_array_equal(unshown_sound(one), unshown_sound(other))
    assert one.voice.segments == other.voice.segments
    assert one.voice.next_number == other.voice.next_number


class Killed:
    """A session whose files are copied at many moments, as a kill would leave them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.copies = folder / "live", folder / "copies"
        self.folder.mkdir()
        self.count = self.checked = 0
        self.director = fresh()
        write = session_module.save

        def save(*arguments: object) -> None:
            """Also a kill between the new journal and its snapshot."""
            if self.count:
                with self.live._changed:
                    self.check()
            write(*arguments)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(session_module, "save", save)
        self.live = LiveSession(
            self.director, IDENTITY, on_event=lambda _: None, snapshots=self.folder / "session", clock=VirtualClock(),
            release=lambda: None,
        )  # fmt: skip

    def check(self) -> None:
        """What a process that reads the files now would go on from is what this session is."""
        copy = self.copies / str(self.checked)
        shutil.copytree(self.folder, copy)
        assert_same(self.director, resumed(copy))
        self.checked += 1

    def take(self, count: int) -> None:
        moments = self.live.moments()
        for _ in range(count):
            assert next(moments).index == self.count
            self.count += 1
            with self.live._saving, self.live._changed:
                self.check()


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Killed]:
    session = Killed(tmp_path, monkeypatch)
    with session.live:
        yield session


def test_whatever_happened_before_a_kill_has_happened_after_it(killed: Killed) -> None:
    killed.take(5)
    killed.live.push_audio(tone(40), 16000)
    killed.take(20)
    killed.live.push_audio((tone(3) * 30000).astype(np.int16)[:-77], 16000)
    killed.live.end_segment()
    killed.live.push_audio(np.stack([tone(9), tone(9)], 1), 24000, 7)
    killed.take(15)
    assert killed.live.interrupt() is not None
    killed.take(10)
    killed.live.push_audio(tone(30), 16000)
    killed.live.end_segment()
    killed.take(60)
    assert killed.director.stats.counts.cut > 0
    assert killed.checked > 110
    assert len(list(killed.folder.iterdir())) == 2, "old journals are removed"


def test_moments_that_did_not_arrive_are_shown_again(killed: Killed) -> None:
    killed.live.push_audio(tone(100), 16000)
    killed.live.end_segment()
    killed.take(40)
    with killed.live._saving, killed.live._changed:
        again, snapshot = resumed(killed.folder, 37), load(killed.folder / "session", IDENTITY)
    assert again.shown == max(37, snapshot.values["shown"])
    assert resumed(killed.folder, 1000).shown == 40
    np.testing.assert_array_equal(
        [frame.rgb for frame in again.made][: 40 - again.shown], np.stack(killed.director.recent)[again.shown - 40 :]
    )


def test_a_snapshot_that_is_replaced_while_it_is_read_is_read_again(
    killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was taken for dead still writes: its new snapshot removes the journal of the one that was read."""
    path, read, times = killed.folder / "session", opening.load, []

    def load_and_replace(*arguments: object) -> Snapshot:
        snapshot = read(*arguments)  # pyright: ignore[reportArgumentType]
        times.append(snapshot.values["journal"])
        if len(times) < 3:
            killed.live.snapshot(path)
            killed.live.push_audio(tone(2), 16000)
        return snapshot

    killed.take(5)
    monkeypatch.setattr(opening, "load", load_and_replace)
    snapshot, happened = opening.kept(path, IDENTITY)
    assert len(times) == 4
    assert times == sorted(times)
    assert snapshot.values["journal"] == times[-1]
    assert [type(record) for record in happened] == [Sound]


def test_a_torn_or_missing_journal_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "session"
    written: list[Record] = [
        Sound(np.arange(6, dtype=np.int16).reshape(3, 2), 8000, None), Sound(np.ones(3), 48000, 4), End(),
        Taken(2**40), Interrupt(3),
    ]  # fmt: skip
    journal = Journal(path)
    journal.note(End())  # there is no snapshot that it would follow
    first = journal.rotate()
    for record in written[:2]:
        journal.note(record)
    journal.rotate()
    for record in written[2:]:
        journal.note(record)
    journal.close()
    read = list(records(path, first))
    assert [type(record) for record in read] == [type(record) for record in written]
    assert read[2:] == written[2:]
    for record, expected in zip(read[:2], written[:2], strict=True):
        assert isinstance(record, Sound)
        assert isinstance(expected, Sound)
        assert (record.rate, record.segment) == (expected.rate, expected.segment)
        np.testing.assert_array_equal(record.pcm, expected.pcm)
    file = path.with_name("session.journal-1")
    whole = file.read_bytes()
    counts = set()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        counts.add(len(list(records(path, first))))
    assert counts == {3, 4}
    file.write_bytes(whole[:36] + b"?" + whole[37:])
    assert len(list(records(path, first))) == 4, "a file ends at a record of an unknown kind"
    assert list(records(path, 9)) == list(records(path, None)) == []
    journal = Journal(path)
    assert journal.rotate() == 3, "never a number that a snapshot may name already"
    journal.forget(3)
    journal.close()
    assert [name.name for name in tmp_path.iterdir()] == ["session.journal-3"]


def test_a_journal_looks_through_its_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder may be shared by many servers, and hold tens of thousands of files."""
    look, looks = journal_module._numbers, []
    monkeypatch.setattr(journal_module, "_numbers", lambda path: looks.append(path) or look(path))
    for number in (4, 6):
        (tmp_path / f"session.journal-{number}").touch()
    journal = Journal(tmp_path / "session")
    for number in range(7, 12):
        assert journal.rotate() == number
        journal.forget(number)
        assert [file.name for file in tmp_path.iterdir()] == [f"session.journal-{number}"]
    assert len(looks) == 1
    journal.close()


def test_a_full_disk_is_told_and_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:40])

    monkeypatch.setattr(journal_module, "FileIO", FullDisk)
    path = tmp_path / "session"
    journal = Journal(path)
    first = journal.rotate()
    journal.note(Taken(3))
    with pytest.raises(OSError, match="No space left on device"):
        journal.note(Sound(np.ones(30), 48000, 4))
    journal.note(Interrupt(5))  # comes after what is lost, so it is not written
    assert list(records(path, first)) == [Taken(3)]
    assert journal.rotate() == first + 1
    journal.note(End())
    assert list(records(path, first + 1)) == [End()]
    journal.close()
