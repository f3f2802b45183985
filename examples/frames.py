"""Frames and their sound for a window or a writer of your own: python examples/frames.py"""

from pathlib import Path

import soundfile

from streaming import TalkingHeadPipeline

HERE = Path(__file__).parent
samples, rate = soundfile.read(HERE / "voice.wav", frames=32_000)

with TalkingHeadPipeline.from_pretrained("tiny", size=(160, 96), steps=2) as pipeline:
    for rgb, sound in pipeline.stream(HERE / "portrait.jpg", (samples, rate), seed=7):
        print(f"{len(rgb)} frames of {rgb.shape[2]} x {rgb.shape[1]}, {len(sound)} samples of sound")
