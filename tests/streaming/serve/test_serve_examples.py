"""The clients in examples/ talk to a server."""

import asyncio
import base64
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import soundfile

from tests.streaming.serve.kit import PORTRAITS, TOKEN, bearing, film, run, serving, speech

EXAMPLES = Path(__file__).parents[3] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_talk_to_server_writes_what_viewers_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    voice, out = tmp_path / "voice.wav", tmp_path / "talk.mp4"
    soundfile.write(voice, speech(0.8), 16_000, subtype="PCM_16")
    monkeypatch.setenv("FLASHTALK_TOKEN", TOKEN)

    async def test() -> None:
        async with serving() as serve:
            url = str(serve.client.make_url(""))
            await example("talk_to_server").main(url, str(PORTRAITS / "kofi.jpg"), str(voice), str(out))
            assert not serve.sessions.open

    run(test())
    printed = capsys.readouterr().out
    assert "playback_started" in printed
    assert "'interrupted': False" in printed
    numbers, _, _ = film(out.read_bytes())
    assert len(set(numbers)) >= 20
    assert numbers == sorted(numbers)


def test_realtime_events_speak_and_are_cut_off() -> None:
    realtime = example("realtime_events")

    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            path = f"/v1/sessions/{facts['id']}/ws"
            async with serve.client.ws_connect(path, headers=bearing(facts["key"])) as socket:
                await socket.send_json({"type": "hello", "audio": {"rate": realtime.RATE}})
                avatar = realtime.Avatar(socket, (await socket.receive_json())["next_segment"])
                for item in ("item_1", "item_2"):
                    await avatar.take(delta(item, 0.2 if item == "item_1" else 30))
                    if item == "item_1":
                        await avatar.take({"type": "response.output_audio.done", "item_id": item})
                session = serve.sessions.open[facts["id"]]
                answers = avatar.answers()
                answering = asyncio.ensure_future(anext(answers))
                while session.live.stats()["moments"] < 10 or session.live.state != "speaking":
                    await asyncio.sleep(0.01)
                await avatar.take({"type": "input_audio_buffer.speech_started"})
                answer = await answering
                assert answer["type"] == "conversation.item.truncate"
                assert answer["item_id"] in ("item_1", "item_2")
                assert 0 <= answer["audio_end_ms"] < 30_000
                json.dumps(answer)

    def delta(item: str, seconds: float) -> dict[str, Any]:
        pcm = speech(min(seconds, 1.0), realtime.RATE).tobytes()
        return {"type": "response.output_audio.delta", "item_id": item, "delta": base64.b64encode(pcm).decode()}

    run(test())


def test_the_examples_import_nothing_of_this_project() -> None:
    for name in ("talk_to_server", "realtime_events"):
        before = set(sys.modules)
        example(name)
        assert not [module for module in set(sys.modules) - before if module.split(".")[0] in ("streaming", "model")]
