"""The process that `espeak.Speaker` starts: loads espeak-ng, and speaks each line that it reads from standard input.

It is run as a file, with the library, the voice and its rate, pitch and range of pitch as arguments, and imports only
the standard library. It answers each request with one line of JSON: first {"rate": Hz} or {"error": text}, then for
every sentence {"bytes": count, "phonemes": [[sample, IPA], ...]}, followed by so many bytes of 16-bit samples.
"""

import ctypes
import json
import sys
from typing import Any

_SYNCHRONOUS = 2  # samples go to a callback, before the call that asks for them returns
_PHONEME_EVENTS_IN_IPA = 1 | 2
_DO_NOT_EXIT = 0x8000  # without its data files, the library would end the process silently
_UTF8 = 1
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4
_END_OF_EVENTS, _PHONEME_EVENT = 0, 7


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


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))


def _answer(header: dict[str, Any], content: bytes = b"") -> None:
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + content)
    sys.stdout.buffer.flush()


def main(name: str, voice: str, rate: str, pitch: str, pitch_range: str) -> None:
    """Speaks until the input ends."""
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        return _answer({"error": f"speech needs espeak-ng ({error}): apt-get install espeak-ng"})
    samples, phonemes = bytearray(), []

    def receive(pointer: int | None, count: int, events: Any) -> int:
        """What the library calls with samples, and with events that end with one of type 0."""
        if pointer and count > 0:
            samples.extend(ctypes.string_at(pointer, 2 * count))
        i = 0
        while (event := events[i]).type != _END_OF_EVENTS:
            if event.type == _PHONEME_EVENT:
                symbol = bytes(event.id.string).split(b"\0")[0].decode(errors="ignore")
                if not symbol.startswith("("):  # a change of language, such as "(en)", is no sound
                    phonemes.append((event.sample, symbol))
            i += 1
        return 0

    callback = _Callback(receive)
    hertz = library.espeak_Initialize(_SYNCHRONOUS, 0, None, _PHONEME_EVENTS_IN_IPA | _DO_NOT_EXIT)
    if hertz <= 0:
        return _answer({"error": "espeak-ng does not find its data: apt-get install --reinstall espeak-ng"})
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        return _answer({"error": f"espeak-ng has no voice {voice}: apt-get install espeak-ng"})
    for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_PITCH_RANGE, pitch_range)):
        library.espeak_SetParameter(parameter, int(value), 0)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
    library.espeak_Synth.argtypes = [pointer, size, number, ctypes.c_int, number, number, pointer, pointer]
    _answer({"rate": hertz})
    for line in sys.stdin.buffer:
        samples.clear()
        phonemes.clear()
        text = line.rstrip(b"\n") + b"\0"
        library.espeak_Synth(text, len(text), 0, 0, 0, _UTF8, None, None)
        library.espeak_Synchronize()
        _answer({"bytes": len(samples), "phonemes": phonemes}, bytes(samples))
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
