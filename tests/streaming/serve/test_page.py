"""The page in a headless Chromium with a fake microphone: numbers are read from pixels, sound is decoded.

Bounds are loose, as machines are shared: what moves must move, in order, and what is heard must not be silence.
"""

import shutil
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import aioice.ice
import pytest
import soundfile

from streaming.serve.rtc import stay_on_loopback
from tests.streaming.serve.kit import TOKEN, Serving, eventually, run, serving, speech
from tests.streaming.serve.relay import Relay, through_relay, without_candidates

playwright = pytest.importorskip("playwright.async_api", reason="playwright is missing: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH"),
]

PATIENCE = 90_000  # ms until a page that hangs fails the test

INIT = """
window.seen = {numbers: [], peak: 0, offsets: [], peers: []};
const Peer = window.RTCPeerConnection;
window.RTCPeerConnection = class extends Peer { constructor(...a) { super(...a); window.seen.peers.push(this); } };
"""

WATCH = """() => {
  const video = document.getElementById("video"), canvas = document.createElement("canvas");
  canvas.width = canvas.height = 128;
  const context = canvas.getContext("2d", {willReadFrequently: true});
  const read = () => {
    context.drawImage(video, 0, 0, 128, 128);
    const {data} = context.getImageData(0, 0, 128, 128);
    let number = 0;
    for (let k = 0; k < 16; k++) {
      const at = (((k >> 2) * 32 + 16) * 128 + (k & 3) * 32 + 16) * 4;
      if (data[at] > 127) number |= 1 << k;
    }
    seen.numbers.push(number);
    video.requestVideoFrameCallback(read);
  };
  video.requestVideoFrameCallback(read);
  const audio = new AudioContext(), analyser = audio.createAnalyser(), wave = new Float32Array(2048);
  const stream = video.srcObject;
  const source = stream ? audio.createMediaStreamSource(stream) : audio.createMediaElementSource(video);
  source.connect(analyser);
  setInterval(async () => {
    analyser.getFloatTimeDomainData(wave);
    for (const value of wave) seen.peak = Math.max(seen.peak, Math.abs(value));
    const peer = seen.peers.at(-1);
    if (!peer) return;
    const times = {};
    (await peer.getStats()).forEach(s => {
      if (s.type === "inbound-rtp" && s.estimatedPlayoutTimestamp) times[s.kind] = s.estimatedPlayoutTimestamp;
    });
    if (times.audio && times.video) seen.offsets.push(times.audio - times.video);
  }, 100);
}"""


def keep_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what `stay_on_loopback` does, until the end of the test."""
    monkeypatch.setattr(aioice.ice, "get_host_addresses", aioice.ice.get_host_addresses)
    stay_on_loopback()


@asynccontextmanager
async def page_of(serve: Serving, folder: Path, query: str, refusals: tuple[str, ...] = ()) -> AsyncIterator[Any]:
    """The server's page in a browser whose microphone hears a tone.

    The page must not complain in the browser's console; of these `refusals` the browser itself does.
    """
    microphone = folder / "microphone.wav"
    soundfile.write(microphone, speech(30, 48_000), 48_000, subtype="PCM_16")
    flags = [
        "--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}", "--autoplay-policy=no-user-gesture-required",
        "--allow-loopback-in-peer-connection", "--disable-features=WebRtcHideLocalIpsWithMdns",
    ]  # fmt: skip
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=flags)
        page = await browser.new_page(viewport={"width": 1180, "height": 800})
        page.set_default_timeout(PATIENCE)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        await page.add_init_script(INIT)
        await page.goto(f"{serve.client.make_url('/')}{query}#token={TOKEN}")
        await page.wait_for_selector(".faces img")
        yield page
        await browser.close()
        assert [fault for fault in faults if not any(status in fault for status in refusals)] == []


async def with_bad_network(page: Any, relays: list[Relay]) -> None:
    """40 ms +- 5 ms and 2 % of the datagrams lost, each way."""

    async def offer(route: Any) -> None:
        response = await route.fetch(post_data=without_candidates(route.request.post_data))
        answer, relay = await through_relay(await response.text(), 0.040, 0.005, 0.02)
        relays.append(relay)
        await route.fulfill(response=response, body=answer)

    await page.route("**/whep", offer)


async def seen(page: Any) -> dict[str, Any]:
    return await page.evaluate("({numbers: seen.numbers, peak: seen.peak, offsets: seen.offsets})")


@pytest.mark.parametrize("way", ["webrtc", "bad network", "mp4"])
def test_people_talk_hear_interrupt_and_leave(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_to_loopback(monkeypatch)
    recording = tmp_path / "recording.wav"
    soundfile.write(recording, speech(0.6), 16_000, subtype="PCM_16")
    relays: list[Relay] = []

    async def test() -> None:
        async with serving() as serve, page_of(serve, tmp_path, "?video=mp4" if way == "mp4" else "") as page:
            if way == "bad network":
                await with_bad_network(page, relays)
            await page.click("#start")
            await page.wait_for_selector("body[data-phase=live]")
            assert await page.inner_text("#path") == ("MP4" if way == "mp4" else "WebRTC")
            (session,) = serve.sessions.open.values()
            await page.evaluate(WATCH)
            await moves(page, 40)

            await page.click("#talk")
            await page.wait_for_selector("body[data-state=speaking]")
            await is_heard(page)
            await moves(page, 20)
            assert await page.inner_text("#talk-text") == "Stop"
            await page.click("#interrupt")
            await eventually(lambda: session.live.stats()["interrupts"] == 1)
            await page.click("#talk")
            await page.wait_for_selector("body[data-state=idle]")

            await page.set_input_files("#file", recording)
            await page.wait_for_selector("body[data-state=speaking]")
            await page.wait_for_selector("body[data-state=idle]")
            await moves(page, 20)
            events = await page.evaluate("document.getElementById('events').textContent")
            assert "playback_finished segment 0" in events
            assert "interrupted true" in events
            assert "interrupted false" in events
            for figure in ("fps", "latency", "queue", "made", "speed", "held", "trip"):
                assert await page.inner_text(f"#{figure}") != "\N{EN DASH}", figure

            await page.click("#end")
            await page.wait_for_selector("body[data-phase=choose]")
            await eventually(lambda: not serve.sessions.open)
            check(await seen(page), way)
        for relay in relays:
            assert relay.lost > 0.005 * relay.passed
            relay.close()

    run(test())


async def moves(page: Any, more: int) -> None:
    """Waits until so many other numbers were seen."""
    count = len(set((await seen(page))["numbers"])) + more
    while len(set((await seen(page))["numbers"])) < count:
        await page.wait_for_timeout(100)


async def is_heard(page: Any) -> None:
    while (await seen(page))["peak"] < 0.1:
        await page.wait_for_timeout(100)


def check(found: dict[str, Any], way: str) -> None:
    """Numbers rise, as far as they could be read; sound and picture are together."""
    numbers = found["numbers"]
    back = sum(later < earlier for earlier, later in pairwise(numbers))
    assert back <= len(numbers) // (20 if way == "bad network" else 100), numbers
    if way != "mp4":
        behind = [-offset for offset in found["offsets"]]
        print(f"{way}: {len(set(numbers))} frames, sound {statistics.median(behind):.0f} ms behind the picture")
        best = statistics.quantiles([abs(offset) for offset in behind], n=5)[0]  # a busy machine shows pictures late
        assert best < 100


def test_a_wrong_token_and_a_full_server_are_told(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving() as serve:
            await serve.create()
            async with page_of(serve, tmp_path, "", refusals=("401", "503")) as page:
                await page.evaluate("sessionStorage.token = 'wrong'")
                await page.click("#start")
                await page.wait_for_selector("#problem:not([hidden])")
                assert "token is missing or wrong" in await page.inner_text("#problem")
                assert await page.is_visible("#token")
                await page.fill("#token", TOKEN)
                await page.click("#start")
                while "sessions" not in await page.inner_text("#problem"):
                    await page.wait_for_timeout(50)

    run(test())


def test_the_server_outlives_a_page_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_to_loopback(monkeypatch)

    async def test() -> None:
        async with serving() as serve:
            async with page_of(serve, tmp_path, "") as page:
                await page.click("#start")
                await page.wait_for_selector("body[data-phase=live]")
                await page.goto("about:blank")
                await eventually(lambda: not serve.sessions.open)
            assert serve.sessions.free == 1

    run(test())
