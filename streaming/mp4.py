"""H.264 and fragmented MP4: pixels in the colours of HDTV, a header, and fragments that play as soon as they come."""

import io
from collections.abc import Iterable, Sequence

import av
import numpy as np
from av import Packet
from av.audio.stream import AudioStream
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray


def set_colors(video: VideoStream) -> None:
    """Tells an encoder that its pixels are those of `to_yuv`: 4:2:0, BT.709, limited range."""
    video.pix_fmt, context = "yuv420p", video.codec_context
    context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def to_yuv(reformatter: VideoReformatter, pixels: NDArray[np.uint8]) -> av.VideoFrame:
    """RGB bytes [height, width, 3] as a frame for an encoder of `set_colors`."""
    return reformatter.reformat(
        av.VideoFrame.from_ndarray(pixels, format="rgb24"),
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
    )


class Fragments:
    """Packs what encoders give into a fragmented MP4.

    Attributes:
        header: comes before the first fragment, and is the same for every reader.
    """

    def __init__(self, encoders: Sequence[VideoStream | AudioStream]) -> None:
        """Takes the opened encoders, in the order of their `stream_index`."""
        self._encoders, self._count = encoders, 0
        self.header = self._muxed([])

    def pack(self, packets: Iterable[Packet]) -> bytes:
        """One fragment of these packets, which begins at the time of the first; nothing if there are none."""
        return self._muxed(packets)[len(self.header) :]

    def _muxed(self, packets: Iterable[Packet]) -> bytes:
        self._count += 1
        buffer = io.BytesIO()
        options = {
            "movflags": "empty_moov+default_base_moof+frag_discont+skip_trailer",
            "use_editlist": "0",
            "avoid_negative_ts": "disabled",
            "fragment_index": str(self._count),
        }
        with av.open(buffer, "w", format="mp4", options=options) as muxer:
            streams = [muxer.add_stream_from_template(encoder) for encoder in self._encoders]
            muxer.start_encoding()
            for packet in packets:
                packet.stream = streams[packet.stream_index]
                muxer.mux(packet)
        return buffer.getvalue()
