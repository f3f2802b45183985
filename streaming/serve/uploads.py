"""Files that clients send: portraits and recordings, believed by their content and never by their name."""

import asyncio
import io
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO

from aiohttp import BodyPartReader, StreamReader
from PIL import Image

from model.errors import UserError
from model.image import load_image
from streaming.decoding import Decoder, open_decoder
from streaming.serve.errors import RefusedError
from streaming.serve.limits import Limits
from streaming.serve.session import Session

PICTURES = ("JPEG", "PNG", "WEBP")  # not every format that Pillow knows: some start other programs
_PIECE = 1 << 16


async def read_all(body: StreamReader | BodyPartReader, limit: int, what: str) -> bytes:
    """The whole body. Raises `RefusedError` as soon as it is larger than the limit."""
    data = bytearray()
    read: Callable = body.read_chunk if isinstance(body, BodyPartReader) else body.read
    while piece := await read(_PIECE):
        data += piece
        if len(data) > limit:
            raise RefusedError("too_large", f"{what} has more than {limit} bytes")
    return bytes(data)


def portrait_of(data: bytes, limits: Limits) -> Image.Image:
    """The picture in a JPEG, PNG or WebP file. Raises `RefusedError` if it is none, or too large."""
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(io.BytesIO(data), formats=PICTURES) as file,
        ):
            if file.width * file.height > limits.portrait_pixels:
                raise RefusedError("too_large", f"the portrait has {file.width} x {file.height} pixels")
        with tempfile.NamedTemporaryFile(prefix="portrait-") as copy:
            copy.write(data)
            copy.flush()
            return load_image(Path(copy.name))
    except RefusedError:
        raise
    except UserError as error:
        raise RefusedError("bad_portrait", "the portrait is damaged; give an intact JPEG, PNG or WebP file") from error
    except Exception as error:  # Pillow's decoders raise many kinds of exceptions
        raise RefusedError("bad_portrait", "the portrait is no JPEG, PNG or WebP file") from error


async def say_recording(session: Session, data: bytes, gone: Callable[[], bool]) -> tuple[int, float]:
    """Says a recording of any format as one segment; returns its number, and its seconds that were taken.

    Waits while the queue is full. Ends the segment early if its sender is `gone`, which nobody else tells. Raises
    `RefusedError` if it is no sound; what comes before damage is said.
    """
    segment, seconds, interrupts = session.live.next_segment, 0.0, session.interrupts
    with tempfile.NamedTemporaryFile(prefix="recording-") as copy:
        try:
            decoder = await asyncio.to_thread(_opened, copy, data)
        except UserError as error:
            raise RefusedError("bad_audio", "this is no sound in a known format, such as WAV, MP3 or OGG") from error
        try:
            async for block in _blocks(decoder):
                if gone() or session.interrupts != interrupts or not await session.say(block, decoder.rate, segment):
                    break
                seconds += len(block) / decoder.rate
        except UserError as error:
            raise RefusedError("bad_audio", f"the sound is damaged after {seconds:.2f} s") from error
        finally:
            await asyncio.to_thread(decoder.close)
    session.end_segment()
    return segment, seconds


def _opened(copy: IO[bytes], data: bytes) -> Decoder:
    """A decoder of a recording, which is written into a file for it. Raises `UserError` if it is none."""
    copy.write(data)
    copy.flush()
    return open_decoder(copy.name)


async def _blocks(decoder: Decoder) -> AsyncIterator:
    """The blocks of a recording, decoded in a thread."""
    blocks = decoder.blocks()
    while (block := await asyncio.to_thread(next, blocks, None)) is not None:
        yield block
