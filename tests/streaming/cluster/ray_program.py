"""`python -m streaming cluster` as the test of a killed replica starts it: it takes notes of what replicas show."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from streaming.__main__ import console
from streaming.cluster import placement
from streaming.live.session import LiveSession, Moments
from streaming.live.timeline import Moment
from streaming.pipeline import TalkingHeadPipeline


class Noted(TalkingHeadPipeline):
    """Notes each moment that it hands over, as JSON in a file of the session."""

    def live(self, image: Any, **options: Any) -> LiveSession:
        session = super().live(image, **options)
        if options.get("snapshots"):
            name = Path(options["snapshots"])
            session.moments = partial(_noted, session.moments, name.with_name(f"noted-{name.name.split('.')[0]}"))
        return session


def _noted(moments: Callable[[], Moments], path: Path) -> Moments:
    taken = moments()

    async def following() -> Moment | None:
        moment = await anext(taken, None)
        if moment is not None:
            note = {
                "index": moment.index, "chunk": moment.chunk, "segment": moment.segment, "process": os.getpid(),
                "picture": hashlib.sha256(moment.rgb.tobytes()).hexdigest(),
                "sound": hashlib.sha256(moment.sound.tobytes()).hexdigest(),
            }  # fmt: skip
            with path.open("a", buffering=1) as file:
                file.write(json.dumps(note) + "\n")
        return moment

    return Moments(lambda: None, following)


if __name__ == "__main__":
    placement.LOST = 600  # a starved replica is not dead; a killed one refuses connections
    import streaming.pipeline
    from tests.streaming.cluster import ray_program

    streaming.pipeline.TalkingHeadPipeline = ray_program.Noted
    sys.argv[0] = "flashtalk"
    console()
