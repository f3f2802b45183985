"""HTTP as clients use it: portraits, sessions, recordings, streams, health and figures."""

import asyncio
import io
import json
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import FormData
from PIL import Image

from streaming.serve import uploads
from tests.streaming.serve.kit import TOKEN, bearing, eventually, film, form, run, serving, speech, wav


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 64)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (200, 120, 90)).save(data, kind)
    return data.getvalue()


def test_the_page_and_its_parts_are_there_and_nothing_else() -> None:
    async def test() -> None:
        async with serving() as serve:
            for path in ("/", "/page/main.js", "/page/style.css", "/page/icon.svg"):
                response = await serve.client.get(path)
                assert response.status == 200, path
                assert "default-src 'self'" in response.headers["Content-Security-Policy"]
            names = (await (await serve.client.get("/v1/portraits")).json())["portraits"]
            assert "amara" in names
            response = await serve.client.get("/v1/portraits/amara")
            assert Image.open(io.BytesIO(await response.read())).format == "JPEG"
            for path in (
                "/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/v1/portraits/..%2f..%2fpyproject",
                "/v1/portraits/%2fetc%2fpasswd", "/v1/portraits/amara.jpg", "/nothing", "/page/",
            ):  # fmt: skip
                response = await serve.client.get(path)
                assert response.status in (403, 404), path
                assert (await response.json())["error"]["code"] in ("not_found", "bad_request")

    run(test())


@pytest.mark.parametrize(
    "path",
    ["/page/../app.py", "/page/%2e%2e/app.py", "/page/../../../pyproject.toml", "//etc/passwd", "/page//etc/passwd"],
)
def test_paths_out_of_the_page_lead_nowhere(path: str) -> None:
    """Sent as they are: a well-behaved client would tidy them up first."""

    async def test() -> None:
        async with serving() as serve:
            reader, writer = await asyncio.open_connection(serve.client.host, serve.client.port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {serve.client.host}\r\nConnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert head.split()[1] in (b"400", b"404")
            assert b"error" in body
            writer.close()

    run(test())


def test_every_part_of_the_page_is_used_and_exists() -> None:
    page = Path(__file__).parents[3] / "streaming" / "serve" / "page"
    html = (page / "index.html").read_text()
    scripts = "".join(path.read_text() for path in page.glob("*.js"))
    for path in page.iterdir():
        assert path.name == "index.html" or path.name in html + scripts, path
    for name in [part.split('"')[0] for part in scripts.split('$("')[1:]]:
        assert f'id="{name}"' in html, name


def test_a_session_is_begun_shown_and_ended() -> None:
    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create(picture(), {"kind": "microphone", "lag": "drop"})
            assert (facts["width"], facts["height"], facts["fps"], facts["rate"]) == (128, 128, 25, 48_000)
            path = f"/v1/sessions/{facts['id']}"
            response = await serve.client.get(path, headers=bearing(facts["key"]))
            assert (await response.json())["stats"]["state"] == "idle"
            assert (await serve.client.get(path)).status == 401
            assert (await serve.client.get(path, headers=bearing(TOKEN))).status == 401  # the token only begins them
            assert (await serve.client.delete(path, headers=bearing(facts["key"]))).status == 204
            for _ in range(20):  # whoever asks again is not locked out
                assert (await serve.client.get(path, headers=bearing(facts["key"]))).status == 404
            assert (await serve.client.get(path, headers=bearing("guess"))).status == 401
            assert serve.sessions.free == 1

    run(test())


def test_an_operator_sees_and_ends_sessions_without_their_keys() -> None:
    async def test() -> None:
        async with serving(sessions=2) as serve:
            facts, other = await serve.create(), await serve.create()
            assert (await serve.client.get("/v1/sessions", headers=bearing(facts["key"]))).status == 401
            response = await serve.client.get("/v1/sessions", headers=bearing(TOKEN))
            one, two = (await response.json())["sessions"]
            assert [one["id"], two["id"]] == [facts["id"], other["id"]]
            assert (one["state"], one["viewers"]) == ("idle", 0)
            assert set(one) == {"id", "state", "position", "viewers", "seconds"}
            for status in (204, 404):
                response = await serve.client.delete(f"/v1/sessions/{facts['id']}", headers=bearing(TOKEN))
                assert response.status == status
            assert list(serve.sessions.open) == [other["id"]]

    run(test())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_portraits_are_taken_by_their_content(kind: str) -> None:
    async def test() -> None:
        async with serving() as serve:
            assert await serve.create(picture(kind))

    run(test())


def damaged() -> bytes:
    data = bytearray(picture("JPEG", (400, 400)))
    return bytes(data[: len(data) // 3])


@pytest.mark.parametrize(
    ("portrait", "options", "status", "code"),
    [
        (b"GIF89a" + bytes(200), None, 400, "bad_portrait"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", None, 400, "bad_portrait"),
        (b"", None, 400, "bad_portrait"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), None, 400, "bad_portrait"),
        ("nobody", None, 404, "not_found"),
        ("../../../etc/passwd", None, 404, "not_found"),
        ("x" * 1000, None, 413, "too_large"),
        ("amara", "{", 400, "bad_request"),
        ("amara", {"kind": "film"}, 400, "bad_request"),
        ("amara", {"lag": "drop"}, 400, "bad_request"),
        ("amara", "x" * 100_000, 413, "too_large"),
    ],
)
def test_what_cannot_be_a_session_is_refused(
    portrait: str | bytes, options: dict[str, str] | str | None, status: int, code: str
) -> None:
    async def test() -> None:
        async with serving() as serve:
            response = await serve.client.post("/v1/sessions", data=form(portrait, options), headers=bearing(TOKEN))
            body = await response.json()
            assert (response.status, body["error"]["code"]) == (status, code)
            assert "\n" not in body["error"]["message"]
            assert "/tmp" not in body["error"]["message"]
            assert serve.sessions.free == 1

    run(test())


def test_large_portraits_are_refused() -> None:
    async def test() -> None:
        async with serving(portrait_bytes=5000, portrait_pixels=10_000) as serve:
            for data in (bytes(6000), picture("PNG", (200, 51))):
                response = await serve.client.post("/v1/sessions", data=form(data), headers=bearing(TOKEN))
                assert response.status == 413, await response.text()

    run(test())


def test_damaged_forms_are_refused() -> None:
    async def test() -> None:
        async with serving() as serve:
            headers = bearing(TOKEN)
            other = FormData(default_to_multipart=True)
            other.add_field("else", "x")
            assert (await serve.client.post("/v1/sessions", data=other, headers=headers)).status == 400
            assert (await serve.client.post("/v1/sessions", json={}, headers=headers)).status == 400
            assert (await serve.client.post("/v1/sessions", data=form(), headers={})).status == 401
            for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
                response = await serve.client.post(
                    "/v1/sessions", data=b"--x\r\ngarbage", headers=headers | {"Content-Type": kind}
                )
                assert response.status == 400, kind

    run(test())


def test_a_recording_is_said_and_streamed_as_a_film() -> None:
    """What `curl` and `ffplay` do: a WAV file in, an endless MP4 out."""

    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            session = serve.sessions.open[facts["id"]]
            path = f"/v1/sessions/{facts['id']}/stream.mp4"
            async with serve.client.get(path, headers=bearing(facts["key"])) as response:
                assert response.headers["Content-Type"] == "video/mp4"
                status, said = await serve.post(facts, "audio", data=wav(0.6))
                assert (status, said) == (200, {"segment": 0, "seconds": 0.6})
                data = bytearray()
                while session.live.stats()["moments"] < 40 or session.live.state != "idle":
                    data += await response.content.readany()
            numbers, heard, _ = film(bytes(data))
            assert numbers == sorted(numbers)
            assert numbers[0] == 1
            assert len(set(numbers)) > 30
            assert np.abs(heard).max() > 0.2
            await eventually(lambda: not session.broadcast.viewers)

    run(test())


def test_the_event_loop_writes_no_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    make, writers = tempfile.NamedTemporaryFile, []

    def noted(**options: Any) -> Any:
        file = make(**options)
        write = file.write
        file.write = lambda data: writers.append(threading.current_thread()) or write(data)  # pyright: ignore
        return file

    async def test() -> None:
        async with serving() as serve:
            monkeypatch.setattr(tempfile, "NamedTemporaryFile", noted)
            assert (await serve.post(await serve.create(), "audio", data=wav(0.1)))[0] == 200
            assert writers
            assert threading.main_thread() not in writers

    run(test())


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage" * 100, picture(), wav(0.1, rate=500), wav(0.1, rate=2_000_000)],
    ids=["empty", "garbage", "picture", "too few samples a second", "too many"],
)
def test_recordings_that_are_none_are_refused(data: bytes) -> None:
    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            status, body = await serve.post(facts, "audio", data=data)
            assert (status, body["error"]["code"]) == (400, "bad_audio")
            status, _ = await serve.post(facts, "audio", data=wav(0.1))  # and the session is as good as before
            assert status == 200

    run(test())


def test_a_recording_that_is_too_large_is_refused() -> None:
    async def test() -> None:
        async with serving(recording_bytes=5000) as serve:
            facts = await serve.create()
            status, body = await serve.post(facts, "audio", data=wav(0.3))
            assert (status, body["error"]["code"]) == (413, "too_large")
            assert (await serve.post(facts, "audio", data=wav(0.1)))[0] == 200

    run(test())


def test_a_recording_can_be_interrupted_while_it_waits_for_room() -> None:
    async def test() -> None:
        async with serving(queue=3.0) as serve:
            facts = await serve.create()
            session = serve.sessions.open[facts["id"]]
            saying = asyncio.create_task(serve.post(facts, "audio", data=wav(30)))
            await eventually(lambda: session.live.stats()["queued_frames"] >= 70)
            status, body = await serve.post(facts, "audio", data=wav(1))
            assert (status, body["error"]["code"]) == (409, "busy")
            status, body = await serve.post(facts, "interrupt")
            assert status == 200
            assert body["interrupted"]["segment"] == 0
            status, body = await saying
            assert status == 200
            assert body["seconds"] < 30
            assert (await serve.post(facts, "interrupt"))[1] == {"interrupted": None}

    run(test())


def test_a_recording_ends_when_its_sender_has_gone() -> None:
    async def test() -> None:
        async with serving(queue=3.0) as serve:
            facts = await serve.create()
            session = serve.sessions.open[facts["id"]]
            saying = asyncio.create_task(serve.post(facts, "audio", data=wav(60)))
            await eventually(lambda: session.live.stats()["queued_frames"] >= 70)
            saying.cancel()  # which closes its connection
            await eventually(lambda: not session._connections)
            assert session._speaker is None
            assert session.live._director.voice.arriving is None
            assert session.live.stats()["queued_frames"] > 50  # what was taken before is said

    run(test())


def test_a_recording_that_is_interrupted_between_two_of_its_blocks_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            (session,) = serve.sessions.open.values()

            async def blocks(_decoder: object) -> AsyncIterator[np.ndarray]:
                yield speech(0.5)
                assert session.interrupt()
                yield speech(0.5)

            monkeypatch.setattr(uploads, "_blocks", blocks)
            status, body = await serve.post(facts, "audio", data=wav(1))
            assert (status, body) == (200, {"segment": 0, "seconds": 0.5})

    run(test())


def test_snapshots_are_taken_and_sessions_resumed(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            status, body = await serve.post(facts, "snapshot")
            assert (status, body["error"]["code"]) == (409, "no_snapshots")
        async with serving(folder=tmp_path) as serve:
            facts = await serve.create()
            status, body = await serve.post(facts, "snapshot")
            assert (status, body) == (200, {"position": 0})
            assert await serve.post(facts, "resume") == (200, facts)  # it is open, and goes on
        async with serving(folder=tmp_path) as serve:
            status, body = await serve.post(facts | {"key": "wrong"}, "resume")
            assert status == 404
            status, body = await serve.post(facts, "resume?position=-1")
            assert (status, body["error"]["code"]) == (400, "bad_request")
            status, body = await serve.post(facts, "resume?position=0")
            assert status == 201
            assert (body["id"], body["key"]) == (facts["id"], facts["key"])

    run(test())


def test_health_readiness_and_figures() -> None:
    async def test() -> None:
        async with serving() as serve:
            assert (await serve.client.get("/healthz")).status == 200
            assert await (await serve.client.get("/readyz")).json() == {"free": 1, "capacity": 1}
            facts = await serve.create()
            response = await serve.client.get("/readyz")
            assert response.status == 503
            assert response.headers["Retry-After"]
            assert (await serve.client.get("/metrics")).status == 401
            talk = await serve.socket(facts, video="fmp4")
            await talk.read_media(5)
            figures = await metrics(serve)
            assert figures["flashtalk_sessions_capacity"] == 1
            assert figures['flashtalk_viewers{outlet="mp4"}'] == 1
            assert figures['flashtalk_refused_total{code="unauthorised"}'] == 1
            assert figures['flashtalk_refused_total{code="limit_sessions"}'] == 1
            moments = figures["flashtalk_moments_total"]
            assert moments >= 4
            assert figures['flashtalk_first_frame_seconds_bucket{le="+Inf"}'] >= 1
            assert figures["flashtalk_encode_seconds_count"] >= 4
            await serve.client.delete(f"/v1/sessions/{facts['id']}", headers=bearing(facts["key"]))
            after = await metrics(serve)
            assert after["flashtalk_moments_total"] >= moments  # counts of ended sessions stay
            assert after['flashtalk_sessions_ended_total{reason="closed"}'] == 1
            serve.sessions.draining = True
            assert (await serve.client.get("/readyz")).status == 503

    async def metrics(serve) -> dict[str, float]:
        response = await serve.client.get("/metrics", headers=bearing(TOKEN))
        lines = [line for line in (await response.text()).splitlines() if not line.startswith("#")]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    run(test())


def test_a_friendly_site_may_ask_and_its_browser_is_told_so() -> None:
    async def test() -> None:
        async with serving(origins=["https://friend.example"]) as serve:
            headers = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
            response = await serve.client.options("/v1/sessions", headers=headers)
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "https://friend.example"
            response = await serve.client.post("/v1/sessions", data=form(), headers=headers | bearing(TOKEN))
            assert response.status == 201
            assert response.headers["Access-Control-Allow-Origin"] == "https://friend.example"
            facts = await response.json()
            stream = f"/v1/sessions/{facts['id']}/stream.mp4"
            async with serve.client.get(stream, headers=headers | bearing(facts["key"])) as response:
                assert response.headers["Access-Control-Allow-Origin"] == "https://friend.example"
                assert response.headers["Cache-Control"] == "no-store"
            response = await serve.client.get("/v1/portraits")
            assert "Access-Control-Allow-Origin" not in response.headers

    run(test())


def test_secrets_are_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as serve:
            facts = await serve.create()
            _, body = await serve.post(facts, "ticket")
            path = f"/v1/sessions/{facts['id']}/ws?ticket={body['ticket']}"
            socket = await serve.client.ws_connect(path, protocols=["flashtalk.v1"])
            await socket.close()
            logged = "\n".join(json.dumps(record.__dict__, default=str) for record in caplog.records)
            assert facts["id"] in logged
            for secret in (facts["key"], body["ticket"], TOKEN):
                assert secret not in logged

    with caplog.at_level("INFO"):
        run(test())
