"""Turns a portrait and a voice into an endless video, chunk by chunk: sources, chunk loop, sinks, command line.

from streaming import TalkingHeadPipeline
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streaming.pipeline import TalkingHeadPipeline, VideoFrames, VideoStream

__all__ = ["TalkingHeadPipeline", "VideoFrames", "VideoStream"]


def __getattr__(name: str) -> Any:
    """Imports the API when it is first asked for: that takes seconds, and the command line answers before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import streaming.pipeline

    return getattr(streaming.pipeline, name)
