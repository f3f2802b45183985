"""A viewer's queue: in order, from a key frame on, and bounded."""

import asyncio

from streaming.serve.encoder import Encoded
from streaming.serve.viewer import WAITING, Viewer
from tests.streaming.serve.kit import run


def item(tick: int, key: bool = False) -> Encoded:
    return Encoded(tick, key, b"", (), b"")


def taken(viewer: Viewer) -> list[int]:
    ticks = []
    while found := viewer.take():
        ticks.append(found.tick)
    return ticks


def viewer_at(times: list[float]) -> tuple[Viewer, list[int]]:
    requests: list[int] = []
    return Viewer("mp4", lambda: requests.append(1), lambda: times[-1]), requests


def test_it_begins_with_a_key_frame_which_it_asks_for() -> None:
    viewer, requests = viewer_at([0.0])
    for tick in range(5):
        viewer.offer(item(tick, key=tick == 3))
    assert taken(viewer) == [3, 4]
    assert requests == [1]
    assert viewer.dropped == 0  # what was before it came is no loss


def test_one_that_is_slow_goes_on_from_a_key_frame() -> None:
    viewer, _ = viewer_at([0.0])
    for tick in range(WAITING):
        viewer.offer(item(tick, key=tick == 0))
    assert viewer.take() is not None
    viewer.offer(item(WAITING))
    viewer.offer(item(WAITING + 1))  # too many: all that wait are lost, and this one
    viewer.offer(item(WAITING + 2))
    viewer.offer(item(WAITING + 3, key=True))
    viewer.offer(item(WAITING + 4))
    assert taken(viewer) == [WAITING + 3, WAITING + 4]
    assert viewer.dropped == WAITING + 2


def test_it_never_holds_more_than_its_queue() -> None:
    viewer, _ = viewer_at([0.0])
    for tick in range(1000):
        viewer.offer(item(tick, key=tick % 7 == 0))
        assert len(viewer._waiting) <= WAITING


def test_it_says_when_it_moved_last() -> None:
    times = [3.0]
    viewer, _ = viewer_at(times)
    assert viewer.moved == 3
    viewer.offer(item(0, key=True))
    times.append(9.0)
    assert viewer.moved == 3
    viewer.take()
    assert viewer.moved == 9


def test_a_reader_waits_and_ends_with_the_viewer() -> None:
    async def test() -> None:
        viewer, _ = viewer_at([0.0])
        reading = asyncio.create_task(viewer.next())
        await asyncio.sleep(0)
        viewer.offer(item(0, key=True))
        found = await reading
        assert found is not None
        assert found.tick == 0
        reading = asyncio.create_task(viewer.next())
        await asyncio.sleep(0)
        viewer.close()
        assert await reading is None

    run(test())
