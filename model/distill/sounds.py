"""Sounds around speech: noise, simple music, a room, an equaliser. All are mono float32 at 16 kHz, from a generator.

Noise and music have no level of their own: their root mean square is 1.
"""

import numpy as np
import scipy.fft
import scipy.signal
from numpy.typing import NDArray

SAMPLE_RATE = 16000

Wave = NDArray[np.float32]

_CHORDS = ((0, 4, 7), (0, 3, 7), (0, 4, 7, 11), (0, 3, 7, 10), (0, 5, 7), (0, 7, 12))  # semitones
_STEPS = (0, 2, 3, 4, 5, 7, 9, 10, 12)  # of a melody, in semitones


def rms(wave: Wave) -> float:
    """The root mean square, never zero."""
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)) + 1e-12))


def filtered(wave: Wave, frequencies: NDArray[np.floating], gains: NDArray[np.floating]) -> Wave:
    """The wave times a gain that is linear in dB over the logarithm of frequency between the given points."""
    size = int(scipy.fft.next_fast_len(len(wave) + SAMPLE_RATE // 20, real=True) or 0)
    axis = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 1.0)
    decibel = np.interp(np.log(axis), np.log(frequencies), gains)
    spectrum = np.fft.rfft(wave, size) * 10 ** (decibel / 20)
    return np.fft.irfft(spectrum, size)[: len(wave)].astype(np.float32)


def equalised(rng: np.random.Generator, wave: Wave) -> Wave:
    """The wave through a microphone: up to 6 dB more or less at five frequencies, and often no highs or no lows."""
    frequencies = np.array([50.0, 120, 300, 800, 2000, 4500, 8000])
    gains = np.array([0.0, *rng.uniform(-6, 6, 5), 0])
    gains[0] = gains[1] - rng.choice([0, 6, 25], p=[0.4, 0.3, 0.3])
    gains[-1] = gains[-2] - rng.choice([0, 8, 40], p=[0.5, 0.3, 0.2])
    return filtered(wave, frequencies, gains)


def in_room(rng: np.random.Generator, wave: Wave) -> Wave:
    """The wave with a short reverberation: the direct sound, and noise that decays by 60 dB in 0.08 to 0.5 s."""
    duration = rng.uniform(0.08, 0.5)
    time = np.arange(int(duration * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / duration)
    tail[: int(rng.uniform(0.001, 0.015) * SAMPLE_RATE)] = 0
    tail *= 10 ** (rng.uniform(-14, 0) / 20) / max(np.linalg.norm(tail), 1e-6)
    tail[0] = 1
    return scipy.signal.fftconvolve(wave, tail)[: len(wave)].astype(np.float32)


def noise(rng: np.random.Generator, size: int) -> Wave:
    """Coloured noise whose level moves slowly, with hum or clicks at times."""
    slope = rng.uniform(-9, 2)  # dB per octave
    frequencies = np.array([50.0, 8000])
    wave = filtered(rng.standard_normal(size).astype(np.float32), frequencies, slope * np.log2(frequencies / 500))
    if rng.random() < 0.4:
        knots = rng.uniform(-12, 6, 2 + size // (SAMPLE_RATE // 2))
        wave *= 10 ** (np.interp(np.linspace(0, len(knots) - 1, size), np.arange(len(knots)), knots) / 20)
    wave /= rms(wave)
    if rng.random() < 0.2:
        phases = 2 * np.pi * rng.choice([50, 60]) * np.arange(size) / SAMPLE_RATE
        wave += rng.uniform(0.3, 2) * sum(np.sin(k * phases) / k for k in (1, 2, 3, 5))
    if rng.random() < 0.2:
        wave += _clicks(rng, size)
    return (wave / rms(wave)).astype(np.float32)


def music(rng: np.random.Generator, size: int) -> Wave:
    """Chords, a melody and at times a beat: decaying or held tones with overtones."""
    beat = rng.uniform(0.25, 0.6)  # seconds
    root = rng.uniform(80, 260)  # Hz
    brightness = rng.uniform(0.3, 0.8)
    held = rng.random() < 0.4
    wave = np.zeros(size)
    melody, drums = rng.random() < 0.7, rng.random() < 0.5
    for number in range(int(np.ceil(size / SAMPLE_RATE / beat))):
        start = number * beat
        if number % 4 == 0:
            shift = rng.choice([0, 5, 7, 9, -3])
            for step in _CHORDS[rng.integers(len(_CHORDS))]:
                _add_tone(wave, start, 4 * beat, root * 2 ** ((shift + step) / 12), 0.5, brightness, held)
        if melody and rng.random() < 0.75:
            pitch = root * 2 ** (1 + rng.choice(_STEPS) / 12)
            _add_tone(wave, start, beat * rng.choice([1, 1, 2]), pitch, rng.uniform(0.5, 1), brightness, held)
        if drums:
            hit = rng.standard_normal(SAMPLE_RATE // 10) * np.exp(-np.arange(SAMPLE_RATE // 10) / 300)
            first = int(start * SAMPLE_RATE)
            wave[first : first + len(hit)] += 0.6 * hit[: size - first]
    return (wave / rms(wave.astype(np.float32))).astype(np.float32)


def _add_tone(
    wave: NDArray[np.float64], start: float, seconds: float, pitch: float, level: float, brightness: float, held: bool
) -> None:
    """Adds a tone with six overtones, of which overtone k has the level brightness^k."""
    first = int(start * SAMPLE_RATE)
    time = np.arange(min(int(seconds * SAMPLE_RATE), len(wave) - first)) / SAMPLE_RATE
    overtones = sum(
        brightness**k * np.sin(2 * np.pi * pitch * (k + 1) * time) for k in range(6) if pitch * (k + 1) < 7500
    )
    decay = 1.0 if held else np.exp(-3 * time / seconds)
    edges = np.minimum(np.minimum(time, np.maximum(seconds - time, 0)) / 0.01, 1)
    wave[first : first + len(time)] += level * overtones * decay * edges


def _clicks(rng: np.random.Generator, size: int) -> Wave:
    """A few short bursts, such as of a keyboard or a door."""
    wave = np.zeros(size, np.float32)
    for first in rng.integers(0, size, rng.integers(1, 8)):
        length = int(rng.uniform(0.003, 0.06) * SAMPLE_RATE)
        burst = rng.standard_normal(length) * np.exp(-np.arange(length) / (0.2 * length)) * rng.uniform(1, 8)
        wave[first : first + length] += burst[: size - first]
    return wave
