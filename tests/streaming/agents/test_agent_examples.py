"""The examples of agents, with a room and a transport of these tests in place of a server's."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest

from streaming import TalkingHeadPipeline
from tests.streaming.agents.stage import Faces, run

EXAMPLES = Path(__file__).parents[3] / "examples"
SPOKEN = 14.5  # seconds of examples/voice.wav


def example(name: str, faces: Faces, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(TalkingHeadPipeline, "from_pretrained", lambda *_, **__: faces)
    return runpy.run_path(str(EXAMPLES / name), run_name="example")


def test_the_agent_of_livekit_greets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session has a room, so what it says goes through what keeps the transcript in step, too."""
    pytest.importorskip("livekit.agents", reason="LiveKit Agents is not installed: pip install -e '.[livekit]'")
    from tests.streaming.agents.livekit_room import Participant, Room, watch

    class BusyParticipant(Participant):
        """Sends messages into the void."""

        add_rpc_interceptor = MagicMock()

        def __getattr__(self, name: str) -> AsyncMock:
            return AsyncMock()

    class BusyRoom(Room):
        """Nobody sends messages."""

        def __getattr__(self, name: str) -> MagicMock:
            return MagicMock()

    async def main() -> None:
        viewers, faces = watch(monkeypatch), Faces()
        names = example("livekit_agent.py", faces, monkeypatch)
        process = SimpleNamespace(userdata={})
        names["prewarm"](process)
        room = BusyRoom()
        room.local_participant = BusyParticipant(room)
        await names["talk"](SimpleNamespace(room=room, proc=process))
        assert viewers[0].heard_frames == pytest.approx(SPOKEN * 25, abs=2)
        assert faces.session
        assert faces.session.state == "idle"
        faces.session.close()

    run(main())


def test_the_bot_of_pipecat_greets_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pipecat", reason="Pipecat is not installed: pip install -e '.[pipecat]'")
    from tests.streaming.agents.pipecat_transport import Listener

    async def main() -> None:
        faces, listener = Faces(), Listener(pieces=100)
        names = example("pipecat_agent.py", faces, monkeypatch)
        await names["talk"](listener)
        assert len(listener.output().written) >= 100
        assert faces.open == 0

    run(main())
