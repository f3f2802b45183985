"""Pipecat's own output transport, which writes into lists, and a transport of it for somebody who only listens."""

from pipecat.frames.frames import OutputAudioRawFrame, StartFrame  # pyright: ignore[reportMissingImports]
from pipecat.processors.filters.identity_filter import IdentityFilter  # pyright: ignore[reportMissingImports]
from pipecat.processors.frame_processor import FrameProcessor  # pyright: ignore[reportMissingImports]
from pipecat.transports.base_output import BaseOutputTransport  # pyright: ignore[reportMissingImports]
from pipecat.transports.base_transport import BaseTransport, TransportParams  # pyright: ignore[reportMissingImports]

from tests.streaming.agents.stage import HEIGHT, WIDTH

VIDEO = {"video_out_enabled": True, "video_out_width": WIDTH, "video_out_height": HEIGHT}


class Loudspeaker(BaseOutputTransport):
    """Is ready as soon as the pipeline has started."""

    def __init__(self) -> None:
        super().__init__(TransportParams(audio_out_enabled=True, audio_out_end_silence_secs=0, **VIDEO))
        self.written: list[bytes] = []

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        self.written.append(frame.audio)
        return True


class Listener(BaseTransport):
    """Connects when the pipeline is ready, and leaves after so many pieces of sound."""

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self._loudspeaker, self._pieces = _Door(self), pieces
        for event in ("on_client_connected", "on_client_disconnected"):
            self._register_event_handler(event)

    def input(self) -> FrameProcessor:
        return IdentityFilter()

    def output(self) -> Loudspeaker:
        return self._loudspeaker

    async def come(self) -> None:
        await self._call_event_handler("on_client_connected", "listener")

    async def note(self, heard: int) -> None:
        if heard == self._pieces:
            await self._call_event_handler("on_client_disconnected", "listener")


class _Door(Loudspeaker):
    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self._listener.come()

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        await super().write_audio_frame(frame)
        await self._listener.note(len(self.written))
        return True
