"""A LiveKit agent with a face that says what is in a file: python examples/livekit_agent.py dev

Needs the extra `livekit`, and a LiveKit server in LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET. To converse,
give `AgentSession` its `stt`, `llm` and `tts`; nothing else changes.
"""

from pathlib import Path

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, JobProcess, cli
from livekit.agents.utils.audio import audio_frames_from_file

from streaming import TalkingHeadPipeline
from streaming.agents.livekit import AvatarSession

HERE = Path(__file__).parent
server = AgentServer()


def prewarm(process: JobProcess) -> None:
    """Loads the networks before somebody comes."""
    process.userdata["pipeline"] = pipeline = TalkingHeadPipeline.from_pretrained("tiny")
    pipeline.load()


server.setup_fnc = prewarm


@server.rtc_session()
async def talk(job: JobContext) -> None:
    """Greets who comes into the room."""
    session = AgentSession()
    avatar = AvatarSession(job.proc.userdata["pipeline"], HERE / "portraits" / "amara.jpg")
    await avatar.start(session, room=job.room)
    await session.start(agent=Agent(instructions="Be kind."), room=job.room)
    await session.say("Hello. I am a portrait.", audio=audio_frames_from_file(str(HERE / "voice.wav"), 24_000))


if __name__ == "__main__":
    cli.run_app(server)
