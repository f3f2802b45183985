"""`python -m streaming serve`: mistakes end in one line; a real process serves, and ends with a snapshot."""

import json
import logging
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp import web

from model.config import PRESETS
from model.errors import UserError
from streaming.pipeline import TalkingHeadPipeline
from streaming.ranks import environments
from streaming.serve import server
from streaming.serve.limits import Limits
from streaming.serve.server import JsonLines, Settings
from tests.processes import Interpreter, Process
from tests.streaming import command
from tests.streaming.live.stage import LETTERS
from tests.streaming.serve.kit import NumberedPipeline, bearing, eventually, form, run


def checked(**options: Any) -> Settings:
    defaults: dict[str, Any] = {
        "host": "127.0.0.1", "port": 0, "limits": None, "viewers": None, "idle": None, "portraits": None,
        "snapshots": None, "origins": [], "ice_servers": [], "log_json": False, "environment": {},
    }  # fmt: skip
    return Settings.checked(**defaults | options)


def test_settings_have_a_token_the_examples_and_servers_for_ice(tmp_path: Path) -> None:
    settings = checked(
        snapshots=tmp_path / "kept", ice_servers=["stun:a:1", "turn:b:2"], environment={"FLASHTALK_TURN": "me:secret"}
    )
    assert settings.portraits is not None
    assert (settings.portraits / "amara.jpg").exists()
    assert [(s.urls, s.username, s.credential) for s in settings.ice_servers] == [
        ("stun:a:1", None, None), ("turn:b:2", "me", "secret"),
    ]  # fmt: skip
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    assert len(settings.token) >= 32


def test_the_address_of_the_page_has_a_new_token_and_never_one_that_was_chosen() -> None:
    settings = checked()
    assert settings.page("http://127.0.0.1:1") == f"The page is http://127.0.0.1:1/#token={settings.token}"
    settings = checked(environment={"FLASHTALK_TOKEN": "se+cret\n"})  # files of secrets often end so
    assert settings.token == "se+cret"
    assert settings.page("http://127.0.0.1:1") == "The page is http://127.0.0.1:1/ (token: $FLASHTALK_TOKEN)"


def test_limits_come_from_a_file_and_options_win(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text("viewers = 3\nidle = 60\nqueue = 12.5\n")
    limits = checked(limits=tmp_path / "limits.toml", idle=90.0).limits
    assert limits == replace(Limits(), viewers=3, idle=90.0, queue=12.5)
    assert checked().limits == Limits()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("speed = 3", "speed is no limit; there are viewers, message_bytes, "),
        ("viewers = 0", "viewers = 0: write a whole number above 0"),
        ("viewers = 2.5", "viewers = 2.5: write a whole number above 0"),
        ("idle = -1", "idle = -1: write a number above 0"),
        ("idle = nan", "idle = nan: write a number above 0"),
        ("idle = inf", "idle = inf: write a number above 0"),
        ("idle = true", "idle = True: write a number above 0"),
        ("queue = '60'", "queue = '60': write a number above 0"),
        ("[viewers]\nof = 1", "viewers = {'of': 1}: write a whole number above 0"),
        ("viewers =", "is not TOML"),
        (None, "cannot be read"),
    ],
)
def test_limits_that_are_none_are_refused_in_a_line(text: str | None, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as error:
        checked(limits=file)
    assert str(error.value).startswith(f"--limits {file}")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 is open to the network"),
        ({"origins": ["example.com"]}, "--origin example.com: write it as https://example.com"),
        ({"origins": ["https://example.com/"]}, "without a path"),
        ({"proxies": ["example.com"]}, "--proxy example.com: write the address"),
        ({"ice_servers": ["turn:a:1"]}, "--ice-server turn:a:1"),
        ({"ice_servers": ["http://a"]}, "--ice-server http://a"),
        ({"portraits": Path("missing")}, "--portraits missing is no folder"),
        ({"snapshots": Path("/proc/no")}, "--snapshots /proc/no cannot be made"),
    ],
)
def test_what_cannot_be_or_is_not_safe_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        checked(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("proxies", "seen"), [(["127.0.0.1"], "2.2.2.2"), (["10.0.0.1"], "127.0.0.1")])
def test_a_proxy_says_where_a_request_comes_from_and_nobody_else(proxies: list[str], seen: str) -> None:
    async def remote(request: web.Request) -> web.Response:
        return web.Response(text=request.remote)

    async def test() -> None:
        app = web.Application()
        app.router.add_get("/", remote)
        async with server.listening(app, checked(proxies=proxies)) as url, aiohttp.ClientSession() as client:
            headers = {"X-Forwarded-For": "1.1.1.1, 2.2.2.2"}  # the first is what the client says
            assert await (await client.get(url, headers=headers)).text() == seen
            assert await (await client.get(url)).text() == "127.0.0.1"

    run(test())


def test_an_open_server_without_a_token_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FLASHTALK_TOKEN", raising=False)
    assert command.call(monkeypatch, "serve", "--host", "0.0.0.0") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "set $FLASHTALK_TOKEN" in line


def test_a_port_that_is_taken_is_found_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = Mock()
    monkeypatch.setattr(TalkingHeadPipeline, "from_pretrained", load)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command.call(monkeypatch, "serve", "--port", str(port), "--quiet") == 2
    problem = f"--host 127.0.0.1 --port {port} cannot be listened at (Address already in use)"
    assert capsys.readouterr().err == f"error: {problem}; name others\n"
    load.assert_not_called()


def test_a_queue_that_no_session_can_have_ends_the_start() -> None:
    pipeline: Any = NumberedPipeline()
    with pytest.raises(UserError, match=r"--limits: queue = 1: write 2.24 seconds, two chunks, or more"):
        server.warm(pipeline, Limits(queue=1.0))
    server.warm(pipeline, Limits(queue=2.24))


def test_ranks_serve_one_session(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.call(monkeypatch, "serve", "--sessions", "3", "--quiet") == 2
    assert capsys.readouterr().err == "error: --sessions 3: 2 ranks generate one session together; name 1\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_server_politely_and_ctrl_c_after_it_at_once(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        ended, exits = server.on_signals(), []
        monkeypatch.setattr(server.os, "_exit", exits.append)
        signal.raise_signal(number)
        await ended.wait()
        assert exits == []
        signal.raise_signal(signal.SIGTERM)  # whoever sends signals to many processes may send it twice
        signal.raise_signal(signal.SIGINT)
        await eventually(lambda: exits)
        assert exits == [130]

    run(test())


def test_a_log_line_is_json() -> None:
    record = logging.makeLogRecord({"msg": "GET %s %d", "args": ("/", 200), "levelname": "INFO", "status": 200})
    values = json.loads(JsonLines().format(record))
    assert values["message"] == "GET / 200"
    assert (values["level"], values["status"]) == ("info", 200)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_process_serves_until_sigterm_and_another_goes_on(
    python: Interpreter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """With two ranks, they are started as torchrun does it, which sends a signal to both."""
    monkeypatch.setitem(PRESETS, LETTERS.name, LETTERS)
    program = (
        "import sys; from model.config import PRESETS; from tests.streaming.live.stage import LETTERS;"
        "PRESETS[LETTERS.name] = LETTERS; from streaming.__main__ import console; console()"
    )
    arguments = [
        "-c", program, "serve", "--preset", "letters", "--random-weights", "--device", "cpu", "--steps",
        "1", "--port", "0", "--snapshots", str(tmp_path), "--log-json", "--quiet",
    ]  # fmt: skip

    def started() -> tuple[list[Process], str]:
        common = {"FLASHTALK_TOKEN": "secret"}
        ranks = [python.start(*arguments, environment=common | one) for one in environments(world)]
        line = ranks[0].stdout.readline()
        assert line.endswith("/ (token: $FLASHTALK_TOKEN)\n"), ranks[0].stderr.read()
        return ranks, line.split()[3].rstrip("/")

    def end(ranks: list[Process]) -> str:
        for process in ranks:
            process.send_signal(signal.SIGTERM)
        outputs = [process.communicate() for process in ranks]
        assert [process.returncode for process in ranks] == [0] * world, outputs
        assert all(output == ("", "") for output in outputs[1:])
        return outputs[0][1]

    async def begin(url: str) -> dict[str, Any]:
        async with aiohttp.ClientSession(url) as client:
            response = await client.post("/v1/sessions", data=form(), headers=bearing("secret"))
            facts = await response.json()
            path = f"/v1/sessions/{facts['id']}"
            async with client.get(f"{path}/stream.mp4", headers=bearing(facts["key"])) as stream:
                await stream.content.readexactly(3000)
            return facts

    async def resume(url: str, facts: dict[str, Any]) -> dict[str, Any]:
        async with aiohttp.ClientSession(url) as client:
            response = await client.post(f"/v1/sessions/{facts['id']}/resume", headers=bearing(facts["key"]))
            assert response.status == 201, await response.text()
            return await response.json()

    ranks, url = started()
    facts = run(begin(url))
    log = end(ranks)
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert any(line["message"].endswith("ends: draining") for line in lines), log
    ranks, url = started()
    try:
        assert run(resume(url, facts))["position"] > 0
    finally:
        end(ranks)
