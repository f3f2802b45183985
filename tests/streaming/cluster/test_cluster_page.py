"""The page in a headless Chromium, whose session moves to another replica while it speaks."""

from pathlib import Path

import pytest
import soundfile

from tests.streaming.cluster.kit import clustered
from tests.streaming.serve.kit import eventually, run, speech
from tests.streaming.serve.test_page import CHROMIUM, WATCH, keep_to_loopback, moves, page_of, seen

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH"),
]


@pytest.mark.parametrize("way", ["webrtc", "mp4"])
def test_the_page_moves_with_its_session(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_to_loopback(monkeypatch)
    recording = tmp_path / "recording.wav"
    soundfile.write(recording, speech(12), 16_000, subtype="PCM_16")

    async def test() -> None:
        async with (
            clustered(tmp_path / "kept", 1, 1) as cluster,
            page_of(cluster, tmp_path, "?video=mp4" if way == "mp4" else "") as page,
        ):
            await page.click("#start")
            await page.wait_for_selector("body[data-phase=live]")
            await page.evaluate(WATCH)
            await page.set_input_files("#file", recording)
            await page.wait_for_selector("body[data-state=speaking]")
            await moves(page, 30)
            before = next(replica for replica in cluster.replicas if replica.sessions.open)
            last = max((await seen(page))["numbers"])
            await cluster.end(before)
            (after,) = cluster.replicas
            await eventually(lambda: bool(after.sessions.open))
            await page.wait_for_selector("body[data-phase=live]")
            await moves(page, 30)
            numbers = [number for number in (await seen(page))["numbers"] if number]
            assert max(numbers) > last + 20
            assert numbers == sorted(numbers), "no frame comes again"
            (session,) = after.sessions.open.values()
            await page.wait_for_selector("body[data-state=idle]")
            assert session.live.position > 12 * 25, "all of the recording was said"
            await page.click("#end")
            await eventually(lambda: not after.sessions.open)

    (tmp_path / "kept").mkdir()
    run(test())
