"""espeak-ng: speech as samples, and the time of every phoneme in it.

Each speaker is a process of its own (`espeak_process.py`). The library keeps state between utterances, such as the
phase of the pitch, so in one process the same sentence would sound a little different the second time; and a few
sentences in a few voices end the process that speaks them.
"""

import ctypes
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError

LIBRARY = "libespeak-ng.so.1"
SAMPLE_RATE = 22050  # Hz, of every voice without mbrola

_PROCESS = Path(__file__).with_name("espeak_process.py")


class SpeakerDiedError(Exception):
    """espeak-ng crashed on a sentence. The same speaker would crash again on it."""


@dataclass(frozen=True)
class Utterance:
    """One sentence. `phonemes` are (first sample, IPA) in order; a pause has an empty symbol."""

    samples: NDArray[np.int16]
    phonemes: tuple[tuple[int, str], ...]


def available() -> bool:
    """Whether libespeak-ng can be loaded."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


class Speaker:
    """A voice for some sentences: `with Speaker("en+f3", words_per_minute=160) as speaker: speaker.say("Hello.")`.

    `voice` is a language, or a language and a variant. `pitch` and `pitch_range` are 0 to 100, with 50 as usual. What a
    speaker says depends on nothing but its arguments and the sentences before.

    Raises:
        UserError: libespeak-ng cannot be loaded, or has no such voice.
    """

    def __init__(self, voice: str, words_per_minute: int = 165, pitch: int = 50, pitch_range: int = 50) -> None:
        self._arguments = (LIBRARY, voice, str(words_per_minute), str(pitch), str(pitch_range))

    def __enter__(self) -> "Speaker":
        command = [sys.executable, "-I", "-S", str(_PROCESS), *self._arguments]  # without site packages: starts fast
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            header = self._answer()
            if "error" in header:
                raise UserError(header["error"])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def say(self, sentence: str) -> Utterance:
        """Speaks a sentence, which is one line. Raises `SpeakerDiedError` if espeak-ng crashes on it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(sentence.replace("\n", " ").encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise SpeakerDiedError(sentence) from error
        header = self._answer()
        content = self._process.stdout.read(header["bytes"])
        phonemes = tuple((int(sample), str(symbol)) for sample, symbol in header["phonemes"])
        return Utterance(np.frombuffer(content, np.int16), phonemes)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SpeakerDiedError(f"voice {self._arguments[1]}")
        return json.loads(line)
