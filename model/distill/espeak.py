"""espeak-ng through ctypes: speech as samples, and the time of every phoneme in it.

The library keeps state between utterances (the phase of the pitch, the position in its table of flutter), so that the
same sentence sounds a little different the second time. `Speaker` therefore loads it afresh: what a speaker says
depends on nothing but its arguments. The library serves one speaker at a time, and a lock keeps others waiting.
"""

import _ctypes
import ctypes
import threading
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from model.errors import UserError

LIBRARY = "libespeak-ng.so.1"
SAMPLE_RATE = 22050  # Hz, of every voice without mbrola

_SYNCHRONOUS = 2  # samples go to a callback, before the call that asks for them returns
_PHONEME_EVENTS_IN_IPA = 1 | 2
_DO_NOT_EXIT = 0x8000  # without its data files, the library would end the process
_UTF8 = 1
_RATE, _VOLUME, _PITCH, _PITCH_RANGE = 1, 2, 3, 4
_END_OF_EVENTS, _PHONEME_EVENT = 0, 7
_LOCK = threading.Lock()


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Utterance:
    """One sentence. `phonemes` are (first sample, IPA) in order; a pause has an empty symbol."""

    samples: NDArray[np.int16]
    phonemes: tuple[tuple[int, str], ...]


def available() -> bool:
    """Whether libespeak-ng can be loaded."""
    try:
        library = _load()
    except UserError:
        return False
    _unload(library)
    return True


class Speaker:
    """A voice for some sentences: `with Speaker("en+f3", words_per_minute=160) as speaker: speaker.say("Hello.")`.

    `voice` is a language, or a language and a variant. `pitch` and `pitch_range` are 0 to 100, with 50 as usual. No
    other speaker can begin before this one has ended.

    Raises:
        UserError: libespeak-ng cannot be loaded, or has no such voice.
    """

    def __init__(self, voice: str, words_per_minute: int = 165, pitch: int = 50, pitch_range: int = 50) -> None:
        self.voice = voice
        self.settings = {_RATE: words_per_minute, _VOLUME: 100, _PITCH: pitch, _PITCH_RANGE: pitch_range}
        self._samples: list[NDArray[np.int16]] = []
        self._phonemes: list[tuple[int, str]] = []

    def __enter__(self) -> "Speaker":
        _LOCK.acquire()
        try:
            self._library = _load()
            try:
                self._begin()
            except BaseException:
                self._end()
                raise
        except BaseException:
            _LOCK.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        _LOCK.release()

    def say(self, sentence: str) -> Utterance:
        """Speaks a sentence."""
        self._samples.clear()
        self._phonemes.clear()
        text = sentence.encode() + b"\0"
        self._library.espeak_Synth(text, len(text), 0, 0, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        samples = np.concatenate(self._samples) if self._samples else np.zeros(0, np.int16)
        return Utterance(samples, tuple(self._phonemes))

    def _begin(self) -> None:
        library = self._library
        if library.espeak_Initialize(_SYNCHRONOUS, 0, None, _PHONEME_EVENTS_IN_IPA | _DO_NOT_EXIT) != SAMPLE_RATE:
            raise UserError("espeak-ng does not find its data: apt-get install --reinstall espeak-ng")
        ctypes.CDLL(None).srand(1)  # breath and aspiration are C's random numbers
        self._callback = _Callback(self._receive)  # kept, because the library does not keep it
        library.espeak_SetSynthCallback(self._callback)
        if library.espeak_SetVoiceByName(self.voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {self.voice}: apt-get install espeak-ng")
        for parameter, value in self.settings.items():
            library.espeak_SetParameter(parameter, value, 0)

    def _end(self) -> None:
        self._library.espeak_Terminate()
        _unload(self._library)

    def _receive(
        self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: "ctypes._Pointer[_Event]"
    ) -> int:
        if count > 0:
            self._samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while (event := events[i]).type != _END_OF_EVENTS:
            if event.type == _PHONEME_EVENT:
                symbol = bytes(event.id.string).split(b"\0")[0].decode(errors="ignore")
                if not symbol.startswith("("):  # a change of language, such as "(en)", is no sound
                    self._phonemes.append((event.sample, symbol))
            i += 1
        return 0


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise UserError(f"speech needs espeak-ng ({error}): apt-get install espeak-ng") from error
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
    library.espeak_Synth.argtypes = [pointer, size, number, ctypes.c_int, number, number, pointer, pointer]
    return library


def _unload(library: ctypes.CDLL) -> None:
    """Unloads the library and with it all its state. If it stayed loaded, it could not be initialised again."""
    _ctypes.dlclose(library._handle)
