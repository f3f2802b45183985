"""A video file from a portrait and a voice: python examples/to_file.py [OUT.mp4]"""

import sys
from pathlib import Path

from streaming import TalkingHeadPipeline

HERE = Path(__file__).parent
out = sys.argv[1] if len(sys.argv) > 1 else "talk.mp4"

with TalkingHeadPipeline.from_pretrained("tiny") as pipeline:
    progress = pipeline.generate(HERE / "portrait.jpg", HERE / "voice.wav", out)
print(f"{out}: {progress.frames} frames, the first after {progress.startup:.1f} s")
