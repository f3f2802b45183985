"""The states of a session, as a table of what leads from one to the next.

             sound                    frame of speech
     IDLE ----------> LISTENING ----------------------> SPEAKING
      ^ ^                 |  ^                           |  |  |
      | |   all heard     |  |   filler: sound is late   |  |  |
      | +-----------------+  +---------------------------+  |  |
      +-----------------------------------------------------+  |
      |                   |               all heard            |
      |                   |                                    |
      |                   v      interrupt                     |
      +----------- INTERRUPTED <-------------------------------+
       first frame             first frame after it: to LISTENING or SPEAKING where new sound has come

CLOSED can be reached from everywhere and is left for nowhere. Whether a session lags is not a state: any may lag.
"""

from enum import StrEnum


class State(StrEnum):
    """What a session is doing."""

    IDLE = "idle"  # nobody has sent sound; the face hears silence
    LISTENING = "listening"  # sound has come or is awaited, and the frame that is shown has none of it
    SPEAKING = "speaking"  # the frame that is shown belongs to a segment
    INTERRUPTED = "interrupted"  # unshown frames are gone, and no new one has been shown
    CLOSED = "closed"


class Cause(StrEnum):
    """What may change the state."""

    SOUND = "sound"  # a segment has begun to arrive
    SPEECH_FRAME = "frame of speech"  # a frame of a segment is handed over
    WAITING_FRAME = "frame of silence, sound awaited"  # a frame of filler, while a segment is queued or open
    IDLE_FRAME = "frame of silence"  # a frame of filler, while nothing is queued or open
    ALL_HEARD = "all heard"  # every segment has ended and was handed over
    INTERRUPT = "interrupt"
    CLOSE = "close"


TABLE: dict[tuple[State, Cause], State] = {
    (State.IDLE, Cause.SOUND): State.LISTENING,
    (State.IDLE, Cause.IDLE_FRAME): State.IDLE,
    (State.IDLE, Cause.ALL_HEARD): State.IDLE,
    (State.LISTENING, Cause.SOUND): State.LISTENING,
    (State.LISTENING, Cause.SPEECH_FRAME): State.SPEAKING,
    (State.LISTENING, Cause.WAITING_FRAME): State.LISTENING,
    (State.LISTENING, Cause.ALL_HEARD): State.IDLE,
    (State.LISTENING, Cause.INTERRUPT): State.INTERRUPTED,
    (State.SPEAKING, Cause.SOUND): State.SPEAKING,
    (State.SPEAKING, Cause.SPEECH_FRAME): State.SPEAKING,
    (State.SPEAKING, Cause.WAITING_FRAME): State.LISTENING,
    (State.SPEAKING, Cause.ALL_HEARD): State.IDLE,
    (State.SPEAKING, Cause.INTERRUPT): State.INTERRUPTED,
    (State.INTERRUPTED, Cause.SOUND): State.INTERRUPTED,
    (State.INTERRUPTED, Cause.SPEECH_FRAME): State.SPEAKING,
    (State.INTERRUPTED, Cause.WAITING_FRAME): State.LISTENING,
    (State.INTERRUPTED, Cause.IDLE_FRAME): State.IDLE,
    (State.INTERRUPTED, Cause.ALL_HEARD): State.INTERRUPTED,
    (State.INTERRUPTED, Cause.INTERRUPT): State.INTERRUPTED,
    **{(state, Cause.CLOSE): State.CLOSED for state in State},
}


def next_state(state: State, cause: Cause) -> State:
    """The state after `cause`. Raises `ValueError` for what cannot happen in `state`."""
    if (state, cause) not in TABLE:
        raise ValueError(f"cause: {cause} cannot happen while {state}")
    return TABLE[state, cause]
