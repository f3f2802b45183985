"""Speech with the mouth that belongs to it, and silence, noise and music with a closed mouth.

espeak-ng says random words in many voices and gives the time of every phoneme. Each phoneme has a shape of the mouth,
`SHAPES`; the mouth moves smoothly from shape to shape (coarticulation), but lips that close stay closed for at least
three frames. How far the mouth opens depends on the loudness as well: it is open wide only in what is spoken loudly.
"""
# ruff: noqa: RUF001 (phonetic letters look like others)

import contextlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.ndimage
import scipy.signal
import soxr
from numpy.typing import NDArray

from model.distill import espeak, sounds
from model.distill.sounds import SAMPLE_RATE
from model.errors import UserError

FPS = 25
FRAME_SAMPLES = SAMPLE_RATE // FPS
KINDS = ("speech", "silence", "noise", "music")
KIND_SHARES = (0.8, 0.05, 0.075, 0.075)


def _read_words() -> dict[str, tuple[str, ...]]:
    """Languages and a few dozen words of each, rich in sounds of the lips; in `words.txt`, some share a line."""
    lines = Path(__file__).with_name("words.txt").read_text(encoding="utf-8").splitlines()
    parts = [line.split(":", 1) for line in lines]
    return {language: tuple(words.split()) for languages, words in parts for language in languages.split()}


WORDS = _read_words()
HELD_OUT_LANGUAGES = ("pt-br", "pl", "fi")
_HELD_OUT_VARIANTS = ("Alicia", "Diogo", "Gene", "m8", "belinda", "boris", "f5", "robert")
_NAMES = """
    Alex Andrea Andy Annie AnxiousAndy Demonic Denis Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike Nguyen
    RicishayMax RicishayMax2 RicishayMax3 Storm Tweaky UniRobot adam anika anikaRobot announcer antonio aunty benjamin
    caleb croak david ed edward edward2 f1 f2 f3 f4 grandma grandpa gustave iven iven2 iven3 iven4 john kaukovalta
    klatt klatt2 klatt3 klatt4 klatt5 klatt6 linda m1 m2 m3 m4 m5 m6 m7 marcelo max michel miguel norbert pablo paul
    pedro quincy rob robosoft robosoft2 robosoft3 robosoft4 robosoft5 robosoft6 robosoft7 robosoft8 sandro shelby steph
    steph2 steph3 travis victor whisper whisperf zac
"""
_VARIANTS = tuple(_NAMES.split())

TRAIN_VOICES = tuple(
    f"{language}+{variant}" for language in WORDS if language not in HELD_OUT_LANGUAGES for variant in _VARIANTS
)
HELD_OUT_VOICES = tuple(
    f"{language}+{variant}"
    for language in ("en", "en-us", "de", "es", *HELD_OUT_LANGUAGES)
    for variant in _HELD_OUT_VARIANTS
)

_RESOLUTION = 200  # shapes per second before they are sampled at frames
_COARTICULATION = 0.045  # standard deviations of the Gaussians that smooth shapes and closures, in seconds
_CLOSURE_EDGE = 0.018
_CLOSURE = 0.13  # least duration of a closure in seconds, which holds three frames wherever they fall
_BEFORE_BURST = 0.05  # seconds that the mouth is closed before the burst of a plosive
_AFTER_BURST = 0.015
_QUIET = -32.0  # dB below the track's loudest sounds where loudness no longer opens the mouth

_CLOSED_LIPS = (0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
_LIP_ON_TEETH = (0.12, 0.1, 0.0, 0.0, 1.0, 0.0)
_REST = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
_UNKNOWN = (0.3, 0.1, 0.0, 0.0, 0.0, 0.0)

# Symbols of the International Phonetic Alphabet and their shapes: open, wide, round, close, lip_teeth, tongue.
_GROUPS = {
    "a": (0.90, 0.15, 0.0, 0.0, 0.0, 0.0),
    "ɑ": (0.95, 0.0, 0.05, 0.0, 0.0, 0.0),
    "æ": (0.85, 0.45, 0.0, 0.0, 0.0, 0.0),
    "ɐ": (0.75, 0.1, 0.0, 0.0, 0.0, 0.0),
    "ʌ": (0.65, 0.1, 0.0, 0.0, 0.0, 0.0),
    "ɒ": (0.75, 0.0, 0.35, 0.0, 0.0, 0.0),
    "ɔ": (0.65, 0.0, 0.55, 0.0, 0.0, 0.0),
    "o": (0.50, 0.0, 0.75, 0.0, 0.0, 0.0),
    "ʊ": (0.32, 0.0, 0.75, 0.0, 0.0, 0.0),
    "u": (0.25, 0.0, 0.95, 0.0, 0.0, 0.0),
    "yʉ": (0.25, 0.0, 0.9, 0.0, 0.0, 0.0),
    "øɵ": (0.40, 0.0, 0.75, 0.0, 0.0, 0.0),
    "œ": (0.50, 0.0, 0.6, 0.0, 0.0, 0.0),
    "ə": (0.40, 0.1, 0.0, 0.0, 0.0, 0.0),
    "ɜɚ": (0.42, 0.0, 0.27, 0.0, 0.0, 0.0),
    "e": (0.50, 0.6, 0.0, 0.0, 0.0, 0.0),
    "ɛε": (0.60, 0.5, 0.0, 0.0, 0.0, 0.0),  # the second is a Greek letter that espeak-ng uses in Danish
    "ɪᵻɨ": (0.33, 0.55, 0.0, 0.0, 0.0, 0.0),
    "i": (0.28, 0.9, 0.0, 0.0, 0.0, 0.0),
    "ɯ": (0.28, 0.35, 0.1, 0.0, 0.0, 0.0),
    "mbpɓ": _CLOSED_LIPS,
    "fvⱱ": _LIP_ON_TEETH,
    "ʋ": (0.18, 0.1, 0.0, 0.0, 0.7, 0.0),
    "βɸ": (0.15, 0.1, 0.2, 0.5, 0.0, 0.0),
    "wʍɥ": (0.15, 0.0, 1.0, 0.0, 0.0, 0.0),
    "ɹɻ": (0.22, 0.0, 0.5, 0.0, 0.0, 0.2),
    "r": (0.25, 0.0, 0.2, 0.0, 0.0, 0.5),
    "ɾɽ": (0.20, 0.2, 0.0, 0.0, 0.0, 0.4),
    "sz": (0.12, 0.6, 0.0, 0.0, 0.0, 0.0),
    "ɕʑ": (0.15, 0.4, 0.2, 0.0, 0.0, 0.0),
    "ʃʒʂʐ": (0.18, 0.0, 0.65, 0.0, 0.0, 0.0),
    "tʈ": (0.16, 0.3, 0.0, 0.0, 0.0, 0.3),
    "dɖɗ": (0.18, 0.3, 0.0, 0.0, 0.0, 0.4),
    "nɳ": (0.18, 0.25, 0.0, 0.0, 0.0, 0.5),
    "lɫɭɬ": (0.30, 0.25, 0.0, 0.0, 0.0, 1.0),
    "ʎ": (0.25, 0.5, 0.0, 0.0, 0.0, 0.7),
    "θð": (0.20, 0.2, 0.0, 0.0, 0.0, 0.9),
    "kɡgqŋɴɣʁχʀ": (0.25, 0.2, 0.0, 0.0, 0.0, 0.0),
    "cɟɲ": (0.22, 0.5, 0.0, 0.0, 0.0, 0.2),
    "hɦħʕ": (0.35, 0.1, 0.0, 0.0, 0.0, 0.0),
    "j": (0.22, 0.8, 0.0, 0.0, 0.0, 0.2),
    "x": (0.30, 0.0, 0.0, 0.0, 0.0, 0.0),
    "çʝ": (0.20, 0.5, 0.0, 0.0, 0.0, 0.0),
    "ʔ": (0.20, 0.1, 0.0, 0.0, 0.0, 0.0),
}
SHAPES = {symbol: shape for symbols, shape in _GROUPS.items() for symbol in symbols}
PLOSIVES = frozenset("pbtdkɡgqcɟʈɖɓɗ")
_MODIFIERS = frozenset("ːˑˈˌʰʲʷˠˤᵝ.-_^\"'?!;:*@|~#0123456789")  # length, stress, breath and espeak-ng's own marks

OPEN, WIDE, ROUND, CLOSE, LIP_TEETH, TONGUE = range(6)


@dataclass(frozen=True, eq=False)
class Track:
    """Some seconds of sound, and the mouth of each frame.

    Attributes:
        wave: float32 [640 frames] at 16 kHz, within +-1.
        mouth: float32 [frames, 6], each 0 to 1: open, wide, round, close, lip_teeth, tongue; frame f is the mouth at
            (f + 0.5) / 25 s.
        kind: "speech", "silence", "noise" or "music".
        voice: the voice of espeak-ng; empty unless `kind` is "speech".
        phonemes: (begin in seconds, IPA), with an empty symbol for a pause; the first one may have begun before.
    """

    wave: NDArray[np.float32]
    mouth: NDArray[np.float32]
    kind: str
    voice: str
    phonemes: tuple[tuple[float, str], ...]

    def after(self, frames: int) -> "Track":
        """The track without its first frames."""
        begin, end = frames / FPS, len(self.mouth) / FPS
        wave, mouth = self.wave[frames * FRAME_SAMPLES :], self.mouth[frames:]
        return Track(wave, mouth, self.kind, self.voice, _part(self.phonemes, begin, end))


def draw_track(
    rng: np.random.Generator, frames: int, held_out: bool = False, kind: str | None = None, studio: bool = False
) -> Track:
    """Draws a track of some frames, by default speech in four of five cases.

    `held_out` gives voices and languages that no track without it has. In a `studio` speech has no room, no noise or
    music behind it, and a perfect microphone.

    Raises:
        UserError: the kind is speech, and espeak-ng is not installed.
    """
    if kind is None:
        kind = str(rng.choice(KINDS, p=KIND_SHARES))
    size = frames * FRAME_SAMPLES
    if kind == "speech":
        return _draw_speech(rng, frames, HELD_OUT_VOICES if held_out else TRAIN_VOICES, studio)
    if kind == "silence":
        floor = 0.0 if rng.random() < 0.3 else 10 ** (rng.uniform(-90, -55) / 20)
        wave = floor * sounds.noise(rng, size)
    else:
        wave = sounds.noise(rng, size) if kind == "noise" else sounds.music(rng, size)
        wave *= 10 ** (rng.uniform(-45, -14) / 20)
    return Track(np.clip(wave, -1, 1).astype(np.float32), np.zeros((frames, 6), np.float32), kind, "", ())


def symbols(phoneme: str) -> list[str]:
    """The letters of an IPA symbol that have a shape of their own: two for a diphthong or an affricate.

    A letter that is not in `SHAPES` is kept, as it is a sound that the table lacks. Accents and marks are dropped.
    """
    letters = unicodedata.normalize("NFD", phoneme).replace("c\u0327", "ç")
    return [c for c in letters if not unicodedata.combining(c) and c not in _MODIFIERS]


def mouth_of_phonemes(phonemes: Sequence[tuple[float, str]], seconds: float) -> NDArray[np.float64]:
    """The mouth at the frames of some seconds from phonemes alone, [trunc(25 seconds), 6], as if all was equally loud.

    Shapes are smoothed by a Gaussian with a standard deviation of 45 ms. Closed lips (m, b, p) and the lip on the teeth
    (f, v) are held for at least 0.13 s and smoothed by 18 ms only, and they shut the mouth.
    """
    steps = int(np.ceil(seconds * _RESOLUTION)) + 1
    shapes, closures = np.zeros((steps, 6)), np.zeros((steps, 6))
    letters = timed_letters(phonemes, seconds)
    ends = [begin for begin, _ in letters[1:]] + [seconds]
    for (begin, letter), end in zip(letters, ends, strict=True):
        shape = np.array(SHAPES.get(letter, _UNKNOWN) if letter else _REST)
        missing = max(0.0, _CLOSURE - (end - begin)) / 2
        for column in (CLOSE, LIP_TEETH):
            if shape[column] == 1:
                closures[_span(begin - missing, end + missing), column] = 1
                shape[column] = 0
        shapes[_span(begin, end)] = shape
    closures = _smoothed(closures, _CLOSURE_EDGE)
    mouth = np.maximum(_smoothed(shapes, _COARTICULATION), closures)
    mouth[:, OPEN] *= (1 - closures[:, CLOSE]) * (1 - 0.8 * closures[:, LIP_TEETH])
    centres = (np.arange(int(seconds * FPS + 1e-6)) + 0.5) / FPS
    return mouth[np.rint(centres * _RESOLUTION).astype(int)]


def timed_letters(phonemes: Sequence[tuple[float, str]], seconds: float) -> list[tuple[float, str]]:
    """The letters of phonemes, and when the mouth begins to form them, in order; a pause is an empty letter.

    Letters of one phoneme share its time. espeak-ng gives the time of a plosive's burst, at which the mouth has been
    closed for 50 ms and opens for the next sound.
    """
    letters: list[tuple[float, str]] = []
    released: float | None = None
    ends = [begin for begin, _ in phonemes[1:]] + [seconds]
    for (begin, phoneme), end in zip(phonemes, ends, strict=True):
        parts = symbols(phoneme) or [""]
        for k, letter in enumerate(parts):
            start = begin + (end - begin) * k / len(parts)
            formed = start if released is None else released
            released = None
            if letter in PLOSIVES:
                formed, released = start - _BEFORE_BURST, start + _AFTER_BURST
            letters.append((max(formed, letters[-1][0] if letters else 0.0), letter))
    return letters


def _span(begin: float, end: float) -> slice:
    return slice(max(0, round(begin * _RESOLUTION)), max(0, round(end * _RESOLUTION)))


def _smoothed(values: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    return scipy.ndimage.gaussian_filter1d(values, sigma * _RESOLUTION, axis=0, mode="nearest", truncate=3)


def loudness_of_frames(wave: NDArray[np.float32]) -> NDArray[np.float64]:
    """How loud each frame is, 0 to 1, from float32 [N] at 16 kHz -> [trunc(N / 640)].

    It is the level between 300 and 1500 Hz, smoothed over 90 ms: 1 at the 95th percentile of the wave and above, 0 at
    32 dB below it. So the wave's own level does not matter.
    """
    band = scipy.signal.butter(2, (300, 1500), "bandpass", fs=SAMPLE_RATE, output="sos")
    power = np.square(scipy.signal.sosfiltfilt(band, wave.astype(np.float64)))
    hop = SAMPLE_RATE // 100
    power = power[: len(power) // hop * hop].reshape(-1, hop).mean(1)
    window = np.hanning(11)[1:-1]
    level = np.convolve(10 * np.log10(power + 1e-10), window / window.sum(), "same")
    centres = (np.arange(len(wave) // FRAME_SAMPLES) + 0.5) / FPS * 100
    level = np.interp(centres, np.arange(len(level)) + 0.5, level)
    return np.clip(1 - (level - np.percentile(level, 95)) / _QUIET, 0, 1)


def _draw_speech(rng: np.random.Generator, frames: int, voices: Sequence[str], studio: bool) -> Track:
    skipped = 0 if rng.random() < 0.3 else int(rng.integers(0, 2 * FPS))  # frames: a track may begin within a sentence
    voice, wave, phonemes = _draw_voice(rng, voices, (skipped + frames) / FPS)
    mouth = mouth_of_phonemes(phonemes, len(wave) / SAMPLE_RATE)
    # The phoneme gives the shape, and the loudness most of the size. The square root makes more of small openings.
    loudness = loudness_of_frames(wave)
    mouth[:, OPEN] = 0.35 * mouth[:, OPEN] + 0.65 * np.sqrt(mouth[:, OPEN]) * loudness
    shown = slice(skipped, skipped + frames)
    voice_alone = wave[skipped * FRAME_SAMPLES :][: frames * FRAME_SAMPLES]
    sound = _at_level(rng, voice_alone, voice_alone) if studio else _recorded(rng, voice_alone)
    heard = _part(phonemes, skipped / FPS, (skipped + frames) / FPS)
    return Track(sound, np.clip(mouth[shown], 0, 1).astype(np.float32), "speech", voice, heard)


def _part(phonemes: Sequence[tuple[float, str]], begin: float, end: float) -> tuple[tuple[float, str], ...]:
    """The phonemes between two times in seconds, counted from the first of them."""
    ends = [seconds for seconds, _ in phonemes[1:]] + [end]
    return tuple(
        (max(0.0, seconds - begin), phoneme)
        for (seconds, phoneme), stop in zip(phonemes, ends[: len(phonemes)], strict=True)
        if seconds < end and stop > begin
    )


def _draw_voice(
    rng: np.random.Generator, voices: Sequence[str], seconds: float
) -> tuple[str, NDArray[np.float32], list[tuple[float, str]]]:
    """A voice and what it says, see `_speak`. Where espeak-ng crashes, in one of a thousand, another voice speaks."""
    for _ in range(20):
        voice = voices[int(rng.integers(len(voices)))]
        with contextlib.suppress(espeak.SpeakerDiedError):
            return voice, *_speak(rng, voice, seconds)
    raise UserError("espeak-ng crashes with every voice: apt-get install --reinstall espeak-ng")


def _speak(rng: np.random.Generator, voice: str, seconds: float) -> tuple[NDArray[np.float32], list[tuple[float, str]]]:
    """Sentences of at least so many seconds in whole frames, and the phonemes, beginning with a pause."""
    words = WORDS[voice.split("+")[0]]
    scale = rng.uniform(0.88, 1.12)  # of formants, pitch and speed together: other lengths of the vocal tract
    rate, pitch, pitch_range = int(rng.integers(120, 200)), int(rng.integers(15, 85)), int(rng.integers(15, 90))
    pieces, phonemes, samples = [np.zeros(0, np.float32)], [(0.0, "")], 0
    with espeak.Speaker(voice, rate, pitch, pitch_range) as speaker:
        while samples < seconds * SAMPLE_RATE:
            pause = int(rng.gamma(1.5, 0.2) * SAMPLE_RATE)
            utterance = speaker.say(_sentence(rng, words))
            source = espeak.SAMPLE_RATE * scale
            spoken = soxr.resample(utterance.samples.astype(np.float32) / 32768, source, SAMPLE_RATE, "MQ")
            begin = (samples + pause) / SAMPLE_RATE
            phonemes += [(begin + sample / source, symbol) for sample, symbol in utterance.phonemes]
            phonemes.append(((samples + pause + len(spoken)) / SAMPLE_RATE, ""))
            pieces += [np.zeros(pause, np.float32), spoken * 10 ** (rng.normal(0, 2) / 20)]
            samples += pause + len(spoken)
    pieces.append(np.zeros(-samples % FRAME_SAMPLES, np.float32))
    return np.concatenate(pieces), phonemes


def _sentence(rng: np.random.Generator, words: Sequence[str]) -> str:
    """Random words, some of them the beginning of one word with the end of another, with commas and a mark."""
    said = []
    for word in rng.choice(words, int(rng.integers(3, 12))):
        if rng.random() < 0.25:
            other = str(rng.choice(words))
            word = word[: (len(word) + 1) // 2] + other[len(other) // 2 :]
        said.append(word + ("," if rng.random() < 0.12 else ""))
    return " ".join(said).rstrip(",") + str(rng.choice([".", "?", "!"], p=[0.7, 0.15, 0.15]))


def _recorded(rng: np.random.Generator, wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """The voice as a microphone hears it: equalised, in a room, with noise or music behind it, at some level."""
    voice = sounds.equalised(rng, wave) if rng.random() < 0.7 else wave
    voice = sounds.in_room(rng, voice) if rng.random() < 0.5 else voice
    heard: NDArray[np.floating] = voice
    if rng.random() < 0.6:
        make = sounds.music if rng.random() < 0.2 else sounds.noise
        level = np.float32(sounds.rms(voice) * 10 ** (-rng.uniform(8, 40) / 20))
        heard = voice + level * make(rng, len(voice))
    return _at_level(rng, heard, voice)


def _at_level(rng: np.random.Generator, wave: NDArray[np.floating], voice: NDArray[np.float32]) -> NDArray[np.float32]:
    """The wave with the gain that brings `voice`, a part of it, to -34 to -16 dB; what is louder than 1 is cut off."""
    gain = 10 ** (rng.uniform(-34, -16) / 20) / sounds.rms(voice)
    return np.clip(gain * wave, -1, 1).astype(np.float32)
