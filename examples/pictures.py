"""Draws the pictures in docs/images of what the preset `tiny` makes: python examples/pictures.py

demo.jpg, demo.webp   three people who say the beginning of voice.wav
minute.jpg            the first and the last seconds of a minute: a drawn person, and a photograph
"""

from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from streaming import TalkingHeadPipeline

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
PEOPLE = ("amara", "ruth", "diego")
SECONDS, SHOWN = 3.36, slice(6, 70, 8)
PHOTO = HERE.parent / "tests" / "model" / "distill" / "astronaut.png"  # Eileen Collins, NASA, public domain
MINUTE, ENDS = 60, (*range(4, 100, 24), *range(1404, 1500, 24))  # seconds; frames at the beginning and at the end

voice, rate = soundfile.read(HERE / "voice.wav")


def video(portrait: Path, seconds: float) -> np.ndarray:
    """Frames [T, height, width, 3] of a person who says so many seconds of voice.wav, again and again."""
    sound = np.resize(voice, int(seconds * rate))
    return np.concatenate([rgb for rgb, _ in pipeline.stream(portrait, (sound, rate))])


with TalkingHeadPipeline.from_pretrained("tiny") as pipeline:
    videos = [video(HERE / "portraits" / f"{name}.jpg", SECONDS) for name in PEOPLE]
    minutes = [video(portrait, MINUTE) for portrait in (HERE / "portraits" / f"{PEOPLE[0]}.jpg", PHOTO)]
for name, rows in (("demo", [v[SHOWN] for v in videos]), ("minute", [v[list(ENDS)] for v in minutes])):
    still = np.concatenate([np.concatenate(row, 1) for row in rows])
    Image.fromarray(still).save(IMAGES / f"{name}.jpg", quality=88, subsampling=0)
film = [Image.fromarray(np.concatenate(frames, 1)) for frames in zip(*videos, strict=True)]
film[0].save(IMAGES / "demo.webp", save_all=True, append_images=film[1:], duration=40, loop=0, quality=60)
