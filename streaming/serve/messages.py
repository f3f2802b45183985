"""The messages of `flashtalk.v1`: what a WebSocket carries in each direction, and the bodies of HTTP requests.

Text is JSON with a `type`. Binary begins with eight bytes, little endian: kind (1), flags (1), moment (2), number (4).
`docs/serve.md` has all of them in tables, which a test compares with this file.
"""

import struct
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from streaming.serve.errors import RefusedError

PROTOCOL = "flashtalk.v1"
RATES = (8_000, 192_000)  # samples a second that a socket may bring

SOUND, MEDIA_HEADER, MEDIA = 1, 2, 3  # kinds of binary messages
KEY = 1  # flag of MEDIA: a decoder can begin here
MOMENTS = 1 << 16
_BINARY = struct.Struct("<BBHI")


# --- To the server ---------------------------------------------------------------------------------------------------


class SoundFormat(Struct, forbid_unknown_fields=True):
    """How the samples of a socket are written, little endian; two channels alternate."""

    rate: Annotated[int, Meta(ge=RATES[0], le=RATES[1])]
    format: Literal["pcm_s16le", "pcm_f32le"] = "pcm_s16le"
    channels: Literal[1, 2] = 1

    @property
    def frame_bytes(self) -> int:
        """Bytes of a sample of all channels."""
        return self.channels * (2 if self.format == "pcm_s16le" else 4)


class Hello(Struct, tag="hello", forbid_unknown_fields=True):
    """The first message: whether this socket brings sound, and whether it takes media."""

    audio: SoundFormat | None = None
    video: Literal["none", "fmp4"] = "none"


class End(Struct, tag="end", forbid_unknown_fields=True):
    """The segment that is arriving has ended."""


class Interrupt(Struct, tag="interrupt", forbid_unknown_fields=True):
    """Stop speech at once."""


class Ping(Struct, tag="ping", forbid_unknown_fields=True):
    """Is answered by `pong` with the same `t`."""

    t: float


ToServer = Hello | End | Interrupt | Ping
_to_server = msgspec.json.Decoder(ToServer)


class SessionOptions(Struct, forbid_unknown_fields=True):
    """How a session behaves; `TalkingHeadPipeline.live` documents each."""

    kind: Literal["segments", "microphone"] = "segments"
    lag: Literal["wait", "drop", "smaller"] | None = None
    wait_frames: Annotated[int, Meta(ge=1, le=1000)] | None = None
    prompt: Annotated[str, Meta(max_length=2000)] | None = None
    seed: Annotated[int, Meta(ge=0, lt=2**53)] = 9999


_options = msgspec.json.Decoder(SessionOptions)


# --- From the server -------------------------------------------------------------------------------------------------


class Ready(Struct, tag="ready"):
    """Answers `hello`. Sound is sent for segment `next_segment` first."""

    width: int
    height: int
    fps: int
    rate: int  # of the sound in media
    state: str
    position: int  # index of the next moment
    next_segment: int
    mime: str  # of the media, for a browser's MediaSource
    limits: dict[str, float]


class StateMessage(Struct, tag="state"):
    """The session is in another state: idle, listening, speaking, interrupted or closed."""

    state: str


class PlaybackStartedMessage(Struct, tag="playback_started"):
    """The first frame of a segment was handed to the viewers."""

    segment: int
    moment: int  # its index


class PlaybackFinishedMessage(Struct, tag="playback_finished"):
    """A segment will be heard no further. Once a segment."""

    segment: int
    position: float  # seconds that were heard
    interrupted: bool


class Clear(Struct, tag="clear"):
    """Speech was interrupted: skip what is buffered, the media go on with silence from `tick` on."""

    tick: int


class LagMessage(Struct, tag="lag"):
    """Generation has become slower than real time, or fast enough again."""

    lagging: bool
    ratio: float  # seconds that a second of video takes


class StatsMessage(Struct, tag="stats"):
    """Figures, once a second."""

    state: str
    position: int  # index of the next moment
    fps: float  # moments a second, of the last seconds
    latency_p50: float | None  # seconds from when sound could be heard at the earliest to its frame
    latency_p95: float | None
    queue: float  # seconds of sound that wait
    made: float  # seconds of video that wait
    lagging: bool
    speed: float | None  # seconds of video that a second of generation makes
    held: int  # frames that were shown again because no new one had come
    viewers: int
    dropped: int  # moments that this viewer lost


class Pong(Struct, tag="pong"):
    """Answers `ping`."""

    t: float


class ErrorMessage(Struct, tag="error"):
    """Something was refused, or has failed. If it is fatal, the socket is closed."""

    code: str
    message: str
    fatal: bool


class Bye(Struct, tag="bye"):
    """The session has ended: closed, idle, unattended, failed, draining, or lost with a replica of a cluster."""

    reason: str
    position: int  # index of the first moment that nobody has got; a resumed session begins there


FromServer = (
    Ready
    | StateMessage
    | PlaybackStartedMessage
    | PlaybackFinishedMessage
    | Clear
    | LagMessage
    | StatsMessage
    | Pong
    | ErrorMessage
    | Bye
)
_from_server = msgspec.json.Decoder(FromServer)
_encoder = msgspec.json.Encoder()


# --- Bytes -----------------------------------------------------------------------------------------------------------


class Binary(NamedTuple):
    """A binary message."""

    kind: int
    flags: int
    moment: int  # MEDIA: index of the moment that is seen, modulo MOMENTS; else 0
    number: int  # SOUND: segment. MEDIA: tick
    body: memoryview


def encode(message: FromServer | ToServer) -> str:
    """The text of a message."""
    return _encoder.encode(message).decode()


def decode(text: str | bytes) -> ToServer:
    """A message to the server. Raises `RefusedError` for anything else."""
    try:
        return _to_server.decode(text)
    except msgspec.MsgspecError as error:
        raise RefusedError("bad_message", str(error)) from error


def decode_from_server(text: str | bytes) -> FromServer:
    """A message from the server. Raises `msgspec.ValidationError` for anything else."""
    return _from_server.decode(text)


def decode_options(text: str | bytes) -> SessionOptions:
    """Options of a session. Raises `RefusedError` for anything else."""
    try:
        return _options.decode(text)
    except msgspec.MsgspecError as error:
        raise RefusedError("bad_request", f"options: {error}") from error


def pack(kind: int, number: int, body: bytes | memoryview, flags: int = 0, moment: int = 0) -> bytes:
    """A binary message."""
    return _BINARY.pack(kind, flags, moment % MOMENTS, number) + body


def unpack(data: bytes) -> Binary:
    """The parts of a binary message. Raises `RefusedError` if it is shorter than its header."""
    if len(data) < _BINARY.size:
        raise RefusedError("bad_message", f"a binary message has {_BINARY.size} bytes or more, not {len(data)}")
    kind, flags, moment, number = _BINARY.unpack_from(data)
    return Binary(kind, flags, moment, number, memoryview(data)[_BINARY.size :])
