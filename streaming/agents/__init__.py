"""Adapters for voice-agent frameworks: the agent speaks, and a portrait speaks for it.

livekit.py        LiveKit Agents: an avatar for an `AgentSession`;  pipecat.py: Pipecat: a service of a pipeline
async_session.py  a live session on an event loop, which both stand on

Each needs the extra of its name: pip install 'flashtalk-triton[livekit]' or 'flashtalk-triton[pipecat]'.
"""
