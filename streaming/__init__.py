"""Turns a portrait and a voice into an endless video, chunk by chunk: sources, chunk loop, sinks, command line.

from streaming import TalkingHeadPipeline
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streaming.live.session import LiveSession
    from streaming.live.timeline import Moment
    from streaming.pipeline import TalkingHeadPipeline
    from streaming.video_stream import VideoFrames, VideoStream

_HOMES = {
    "LiveSession": "live.session",
    "Moment": "live.timeline",
    "TalkingHeadPipeline": "pipeline",
    "VideoFrames": "video_stream",
    "VideoStream": "video_stream",
}
__all__ = ["LiveSession", "Moment", "TalkingHeadPipeline", "VideoFrames", "VideoStream"]


def __getattr__(name: str) -> Any:
    """Imports the API when it is first asked for: that takes seconds, and the command line answers before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"streaming.{_HOMES[name]}"), name)
