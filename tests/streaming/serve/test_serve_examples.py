"""The clients in examples/ talk to a server."""

import asyncio
import base64
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import numpy as np
import pytest
import soundfile

from tests.streaming.serve.kit import PORTRAITS, TOKEN, Serving, bearing, film, run, serving, speech

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
    numbers, sound, _ = film(out.read_bytes())
    begin = int(printed.partition("'moment': ")[2].partition("}")[0])
    assert set(range(begin + 1, begin + 21)) <= set(numbers), "a moment's number is one more than its index"
    assert numbers == sorted(numbers)
    loud = np.abs(sound[: len(sound) // 480 * 480]).reshape(-1, 480).max(1) > 0.1  # by 10 ms
    assert 0.78 <= loud.sum() / 100 <= 0.85


def test_talk_to_server_says_what_the_server_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voice = tmp_path / "voice.wav"
    soundfile.write(voice, speech(0.1), 16_000, subtype="PCM_16")
    talk = example("talk_to_server")

    async def say(serve: Serving, token: str, refusal: str) -> None:
        monkeypatch.setenv("FLASHTALK_TOKEN", token)
        url, portrait = str(serve.client.make_url("")), str(PORTRAITS / "kofi.jpg")
        with pytest.raises(aiohttp.ClientError, match=refusal):
            await talk.main(url, portrait, str(voice), str(tmp_path / "talk.mp4"))

    async def test() -> None:
        async with serving(viewers=0) as serve:
            await say(serve, "wrong", "token")
            await say(serve, TOKEN, "viewers")

    run(test())


def test_talk_to_server_says_how_it_is_called() -> None:
    script = str(EXAMPLES / "talk_to_server.py")
    for arguments in ([], ["http://127.0.0.1:9", "portrait.jpg", "voice.wav", "talk.mp4"]):
        done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env={})
        assert done.returncode == 1
        assert done.stderr.startswith("usage: FLASHTALK_TOKEN=... python examples/talk_to_server.py http://")
        assert done.stderr.count("\n") == 1


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
                    await avatar.take(delta(item, 0.2 if item == "item_1" else 1))
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
                assert 0 <= answer["audio_end_ms"] < 1_000
                json.dumps(answer)

    def delta(item: str, seconds: float) -> dict[str, Any]:
        pcm = speech(seconds, realtime.RATE).tobytes()
        return {"type": "response.output_audio.delta", "item_id": item, "delta": base64.b64encode(pcm).decode()}

    run(test())


def test_the_examples_import_nothing_of_this_project() -> None:
    for name in ("talk_to_server", "realtime_events"):
        before = set(sys.modules)
        example(name)
        assert not [module for module in set(sys.modules) - before if module.split(".")[0] in ("streaming", "model")]
