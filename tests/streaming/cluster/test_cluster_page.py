"""The page in a headless Chromium, whose session moves to another replica while it speaks."""

from pathlib import Path

import pytest
import soundfile

from profiling.measure.viewer import Sight, chromium_path, watch, with_stamps
from tests.streaming.cluster.kit import clustered
from tests.streaming.serve.browser import Browser
from tests.streaming.serve.kit import BLOCK, NumberedPipeline, eventually, speech
from tests.streaming.serve.test_page import keep_to_loopback, moves, page_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium_path() is None, reason="no chromium or google-chrome on the PATH"),
]


@pytest.mark.parametrize("way", ["webrtc", "mp4"])
def test_the_page_moves_with_its_session(
    way: str, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_to_loopback(monkeypatch)
    monkeypatch.setattr(NumberedPipeline, "live", with_stamps(NumberedPipeline.live, BLOCK))
    recording = tmp_path / "recording.wav"
    soundfile.write(recording, speech(8), 16_000, subtype="PCM_16")
    sight = Sight()

    async def test() -> None:
        async with (
            clustered(tmp_path / "kept", 1, 1) as cluster,
            page_of(cluster, browser, "?video=mp4" if way == "mp4" else "") as page,
        ):
            await page.click("#start")
            await page.wait_for_selector("body[data-phase=live]")
            await watch(page, BLOCK)
            await page.set_input_files("#file", recording)
            await page.wait_for_selector("body[data-state=speaking]")
            await moves(page, sight, 30)
            before = next(replica for replica in cluster.replicas if replica.sessions.open)
            await sight.look(page)
            last = max(sight.numbers)
            await cluster.end(before)
            (after,) = cluster.replicas
            await eventually(lambda: bool(after.sessions.open))
            await page.wait_for_selector("body[data-phase=live]")
            await moves(page, sight, 30)
            await sight.look(page)
            numbers = [number for number in sight.numbers if number]
            assert max(numbers) > last + 20
            assert numbers == sorted(numbers), "no frame comes again"
            (session,) = after.sessions.open.values()
            await page.wait_for_selector("body[data-state=idle]")
            assert session.live.position > 8 * 25, "all of the recording was said"
            await page.click("#end")
            await eventually(lambda: not after.sessions.open)

    (tmp_path / "kept").mkdir()
    browser.run(test())
