"""Encodes moments once for all viewers: H.264, Opus, and a fragment of MP4 that holds both."""

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av import Packet
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from streaming.mp4 import Fragments, set_colors, to_yuv
from streaming.sources import SOUND_RATE

KEY_EVERY = 2  # seconds from key frame to key frame: as long as a viewer who lost something waits at most
OPUS_SAMPLES = SOUND_RATE // 50  # of a packet, 20 ms
OPUS_BITS = 64_000  # a second
_TICK = Fraction(1, SOUND_RATE)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A picture and its sound, as viewers get them. `tick` numbers them without gaps, from 0."""

    tick: int
    key: bool  # whether a decoder can begin here
    h264: bytes  # Annex B; a key frame comes with its parameter sets
    opus: tuple[bytes, ...]  # packets of 20 ms
    fragment: bytes  # of MP4, with the same packets
    moment: int = 0  # index of the moment that is seen; of a hold, the one before it


class MomentEncoder:
    """The encoders of one session. Not for several threads at once.

    Sound is encoded with 2.5 ms of look-ahead, and heard that much later than its picture is shown.

    Attributes:
        header: of the MP4, comes before the first fragment.
        mime: type and codecs of the MP4, as browsers ask for it.
    """

    def __init__(self, width: int, height: int, fps: int) -> None:
        """Opens the encoders for pictures with even sides."""
        self._owner, self._video, self._sound = _open(width, height, fps)
        self._fragments, self._reformatter = Fragments((self._video, self._sound)), VideoReformatter()
        self._period = SOUND_RATE // fps
        self._parameters = bytes(self._video.codec_context.extradata or b"")
        profile = self._parameters[self._parameters.index(b"\0\0\0\1\x67") + 5 :][:3]
        self.header = self._fragments.header
        self.mime = f'video/mp4; codecs="avc1.{profile.hex()},opus"'

    def encode(self, tick: int, rgb: NDArray[np.uint8], sound: NDArray[np.float32], key: bool) -> Encoded:
        """Encodes a picture uint8 [height, width, 3] and float32 sound [SOUND_RATE / fps] in [-1, 1].

        Ticks rise by 1 from call to call. `key` asks for a key frame; others come every `KEY_EVERY` seconds.
        """
        frame = to_yuv(self._reformatter, rgb)
        frame.pts, frame.duration, frame.time_base = tick * self._period, self._period, _TICK
        frame.pict_type = PictureType.I if key else PictureType.NONE
        (picture,) = self._video.encode(frame)
        opus = [self._encode_sound(part, tick * self._period) for part in enumerate(sound.reshape(-1, OPUS_SAMPLES))]
        h264 = bytes(picture)
        return Encoded(
            tick,
            picture.is_keyframe,
            self._parameters + h264 if picture.is_keyframe else h264,
            tuple(bytes(packet) for packet in opus),
            self._fragments.pack([picture, *opus]),
        )

    def _encode_sound(self, part: tuple[int, NDArray[np.float32]], start: int) -> Packet:
        index, samples = part
        pcm = np.rint(np.clip(samples, -1, 1) * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
        frame.pts, frame.sample_rate, frame.time_base = start + index * OPUS_SAMPLES, SOUND_RATE, _TICK
        (packet,) = self._sound.encode(frame)
        packet.pts = packet.dts = frame.pts  # the encoder subtracts its look-ahead, which would be before 0
        return packet


def _open(width: int, height: int, fps: int) -> tuple[OutputContainer, VideoStream, AudioStream]:
    """The encoders, opened, and the container that owns them and is otherwise unused."""
    owner = av.open(io.BytesIO(), "w", format="mp4")
    rate = max(800_000, 5 * width * height)  # bits a second
    options = {
        "preset": "superfast", "tune": "zerolatency", "profile": "baseline", "threads": "1", "crf": "21",
        "maxrate": str(rate), "bufsize": str(rate // 4),  # so that a key frame takes no longer than 0.25 s to arrive
    }  # fmt: skip
    video = owner.add_stream("libx264", rate=fps, options=options)
    video.width, video.height = width, height
    set_colors(video)
    video.codec_context.time_base, video.codec_context.gop_size = _TICK, KEY_EVERY * fps
    sound = owner.add_stream(
        "libopus", rate=SOUND_RATE, layout="mono", bit_rate=OPUS_BITS,
        options={"application": "lowdelay", "frame_duration": "20"},
    )  # fmt: skip
    owner.start_encoding()
    return owner, video, sound
