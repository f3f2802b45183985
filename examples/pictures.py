"""Draws the pictures of the demo in docs/images, from what the preset `tiny` makes: python examples/pictures.py"""

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from streaming import TalkingHeadPipeline

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
PEOPLE = ("amara", "ruth", "diego")
SECONDS, SHOWN = 3.36, slice(6, 70, 8)

samples, rate = soundfile.read(HERE / "voice.wav")
samples = samples[: int(SECONDS * rate)]
with TalkingHeadPipeline.from_pretrained("tiny") as pipeline:
    videos = [
        np.concatenate([rgb for rgb, _ in pipeline.stream(HERE / "portraits" / f"{name}.jpg", (samples, rate))])
        for name in PEOPLE
    ]
still = np.concatenate([np.concatenate(video[SHOWN], 1) for video in videos])
Image.fromarray(still).save(IMAGES / "demo.jpg", quality=88, subsampling=0)
film = [Image.fromarray(np.concatenate(frames, 1)) for frames in zip(*videos, strict=True)]
film[0].save(IMAGES / "demo.webp", save_all=True, append_images=film[1:], duration=40, loop=0, quality=60)
