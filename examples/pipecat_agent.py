"""A Pipecat bot with a face that says what is in a file: python examples/pipecat_agent.py, then open the page it names

Needs the extra `pipecat`, and `pip install 'pipecat-ai[runner,webrtc]'` for the page. To converse, put speech to text,
a language model and text to speech before the face; nothing else changes.
"""

from pathlib import Path

import soundfile
from pipecat.frames.frames import TTSAudioRawFrame, TTSStartedFrame, TTSStoppedFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.transports.base_transport import BaseTransport, TransportParams
from pipecat.workers.runner import WorkerRunner

from streaming import TalkingHeadPipeline
from streaming.agents.pipecat import TalkingHeadService

HERE = Path(__file__).parent
SIZE = 128  # pixels, those of the preset
VIDEO = {"video_out_enabled": True, "video_out_width": SIZE, "video_out_height": SIZE, "video_out_framerate": 25}

faces = TalkingHeadPipeline.from_pretrained("tiny")


async def talk(transport: BaseTransport) -> None:
    """Greets whoever connects."""
    face = TalkingHeadService(faces, HERE / "portraits" / "amara.jpg")
    worker = PipelineWorker(Pipeline([transport.input(), face, transport.output()]))

    @transport.event_handler("on_client_connected")
    async def greet(*_: object) -> None:
        samples, rate = soundfile.read(HERE / "voice.wav", dtype="int16")
        sound = TTSAudioRawFrame(samples.tobytes(), rate, 1)
        await worker.queue_frames([TTSStartedFrame(), sound, TTSStoppedFrame()])

    @transport.event_handler("on_client_disconnected")
    async def leave(*_: object) -> None:
        await worker.cancel()

    runner = WorkerRunner()
    await runner.add_workers(worker)
    await runner.run()


async def bot(arguments: object) -> None:
    """What Pipecat's development runner calls for each client."""
    from pipecat.runner.utils import create_transport

    params = TransportParams(audio_out_enabled=True, **VIDEO)
    await talk(await create_transport(arguments, {"webrtc": lambda: params}))


if __name__ == "__main__":
    from pipecat.runner.run import main

    main()
