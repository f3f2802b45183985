"""Speech with its mouth: times of phonemes against the sound, closures, other sounds with a closed mouth, seeds."""
# ruff: noqa: RUF001 (phonetic letters look like others)

import itertools

import numpy as np
import pytest

from model.distill import espeak, sounds, speech
from model.distill.espeak import Speaker, SpeakerDiedError
from model.distill.speech import (
    CLOSE,
    FPS,
    HELD_OUT_VOICES,
    LIP_TEETH,
    OPEN,
    SAMPLE_RATE,
    SHAPES,
    TRAIN_VOICES,
    WORDS,
    draw_track,
    loudness_of_frames,
    mouth_of_phonemes,
    symbols,
    timed_letters,
)
from model.errors import UserError

needs_espeak = pytest.mark.skipif(not espeak.available(), reason="needs espeak-ng")


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(espeak, "LIBRARY", "libespeak-ng-that-is-missing.so")
    with pytest.raises(UserError, match=r"apt-get install espeak-ng$"), Speaker("en"):
        pass
    assert not espeak.available()


@needs_espeak
def test_a_missing_voice_is_one_line_and_the_next_speaker_can_begin() -> None:
    with pytest.raises(UserError, match="no voice nowhere"), Speaker("nowhere"):
        pass
    with Speaker("en") as speaker:
        assert len(speaker.say("Hello.").samples) > espeak.SAMPLE_RATE // 4


@needs_espeak
def test_a_crash_of_espeak_ends_its_speaker_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with Speaker("en") as speaker:
        speaker._process.kill()
        speaker._process.wait()
        with pytest.raises(SpeakerDiedError):
            speaker.say("Hello.")
    calls: list[str] = []

    def dies_once(rng: np.random.Generator, voice: str, seconds: float) -> object:
        calls.append(voice)
        if len(calls) == 1:
            raise SpeakerDiedError(voice)
        return speak(rng, voice, seconds)

    speak = speech._speak
    monkeypatch.setattr(speech, "_speak", dies_once)
    track = draw_track(np.random.default_rng(1), 5, kind="speech")
    assert track.voice == calls[1] != calls[0]

    def dies(rng: np.random.Generator, voice: str, seconds: float) -> object:
        raise SpeakerDiedError(voice)

    monkeypatch.setattr(speech, "_speak", dies)
    with pytest.raises(UserError, match="every voice"):
        draw_track(np.random.default_rng(1), 5, kind="speech")


@needs_espeak
def test_a_sentence_has_its_phonemes_in_order() -> None:
    with Speaker("en+f2") as speaker:
        utterance = speaker.say("My puppy moves.")
    assert "".join(symbol for _, symbol in utterance.phonemes).replace("ː", "") == "maɪpʌpimuvz"
    begins = [begin for begin, _ in utterance.phonemes]
    assert begins == sorted(begins)
    assert begins[-1] <= len(utterance.samples)


@needs_espeak
def test_a_speaker_remembers_nothing_of_others() -> None:
    def said() -> espeak.Utterance:
        with Speaker("en+klatt3") as speaker:
            return speaker.say("The same sentence.")

    before = said()
    with Speaker("fr+whisper", 190, 70) as other:
        other.say("bonjour")
    after = said()
    assert np.array_equal(before.samples, after.samples)
    assert before.phonemes == after.phonemes


@needs_espeak
def test_every_language_speaks_and_its_sounds_have_shapes() -> None:
    total, unknown = 0.0, 0.0
    for language, words in WORDS.items():
        with Speaker(language) as speaker:
            utterance = speaker.say(" ".join(words))
        ends = [begin for begin, _ in utterance.phonemes[1:]] + [len(utterance.samples)]
        for (begin, phoneme), end in zip(utterance.phonemes, ends, strict=True):
            letters = symbols(phoneme)
            total += (end - begin) * bool(letters)
            unknown += sum((end - begin) / len(letters) for letter in letters if letter not in SHAPES)
        assert len(utterance.samples) > 5 * espeak.SAMPLE_RATE, language
    assert unknown < 0.01 * total


def test_held_out_voices_and_languages_are_never_trained_on() -> None:
    trained, held_out = ({tuple(voice.split("+")) for voice in voices} for voices in (TRAIN_VOICES, HELD_OUT_VOICES))
    assert not {variant for _, variant in trained} & {variant for _, variant in held_out}
    assert len({language for language, _ in held_out} - {language for language, _ in trained}) >= 2
    assert len({language for language, _ in trained}) >= 15
    assert len({variant for _, variant in trained}) >= 80


@needs_espeak
@pytest.mark.parametrize("kind", speech.KINDS)
@pytest.mark.parametrize("frames", [5, 60])
def test_track_lengths_and_ranges(kind: str, frames: int) -> None:
    track = draw_track(np.random.default_rng([1, frames]), frames, kind=kind)
    assert (track.wave.dtype, track.wave.shape) == (np.float32, (640 * frames,))
    assert (track.mouth.dtype, track.mouth.shape) == (np.float32, (frames, 6))
    assert np.abs(track.wave).max() <= 1
    assert track.mouth.min() >= 0
    assert track.mouth.max() <= 1
    assert track.kind == kind
    if kind == "speech":
        assert track.voice in TRAIN_VOICES
        assert all(0 <= begin < frames / FPS for begin, _ in track.phonemes)
    else:
        assert not track.mouth.any()
        assert (track.voice, track.phonemes) == ("", ())
    assert track.wave.any() or kind == "silence"


@needs_espeak
def test_kinds_and_voices_are_drawn_as_documented() -> None:
    tracks = [draw_track(np.random.default_rng([2, index]), 10) for index in range(60)]
    speaking = [track.kind == "speech" for track in tracks]
    assert 0.65 < np.mean(speaking) < 0.95  # 80 % are expected; the seeds are fixed
    assert {track.kind for track in tracks} == set(speech.KINDS)
    held_out = [draw_track(np.random.default_rng([2, index]), 10, True, "speech").voice for index in range(10)]
    assert set(held_out) <= set(HELD_OUT_VOICES)


@needs_espeak
def test_a_seed_decides_everything() -> None:
    for kind in speech.KINDS:
        one, same, other = (draw_track(np.random.default_rng(seed), 40, kind=kind) for seed in (5, 5, 6))
        assert np.array_equal(one.wave, same.wave)
        assert np.array_equal(one.mouth, same.mouth)
        assert one.phonemes == same.phonemes
        assert not np.array_equal(one.wave, other.wave)


@needs_espeak
def test_in_a_studio_pauses_are_silent() -> None:
    studio, elsewhere = (
        [draw_track(np.random.default_rng([8, seed]), 100, kind="speech", studio=studio).wave for seed in range(6)]
        for studio in (True, False)
    )
    assert all((wave[:-1] == 0).mean() > 0.02 for wave in studio)
    assert min((wave[:-1] == 0).mean() for wave in elsewhere) < 0.01


@needs_espeak
def test_the_mouth_opens_with_the_sound() -> None:
    by_lag = np.zeros(7)
    for voice in ("en+f2", "de+m3", "es+f4", "fr+m1"):
        wave, phonemes = speech._speak(np.random.default_rng(7), voice, 12)
        opening = mouth_of_phonemes(phonemes, len(wave) / SAMPLE_RATE)[:, OPEN]
        loudness = loudness_of_frames(wave)
        lags = range(-3, 4)
        by_lag += [np.corrcoef(opening[3 + lag : len(opening) - 3 + lag], loudness[3:-3])[0, 1] for lag in lags]
    assert by_lag.argmax() == 3
    assert by_lag.max() > 4 * 0.4


@needs_espeak
def test_closures_are_held_for_three_frames() -> None:
    found = 0
    kinds = ((CLOSE, "mbp"), (LIP_TEETH, "fv"))
    for voice, (column, letters) in itertools.product(("en+f2", "pl+m3", "en+m5"), kinds):
        wave, phonemes = speech._speak(np.random.default_rng(3), voice, 15)
        seconds = len(wave) / SAMPLE_RATE
        mouth = mouth_of_phonemes(phonemes, seconds)
        timed = timed_letters(phonemes, seconds)
        for (begin, letter), (end, _) in itertools.pairwise(timed):
            frame = round((begin + end) / 2 * FPS - 0.5)
            if letter and letter in letters and 2 <= frame < len(mouth) - 2:
                found += 1
                near = mouth[frame - 2 : frame + 3, column]
                assert near.max() >= 0.95
                assert (near > 0.5).sum() >= 3
                assert mouth[frame, OPEN] < 0.25
    assert found > 60


def test_a_vowel_and_a_closure_at_known_times() -> None:
    mouth = mouth_of_phonemes([(0.0, ""), (0.4, "ɑː"), (1.0, "m"), (1.1, "ɑː"), (1.6, "")], 2.0)
    assert mouth.shape == (50, 6)
    assert mouth[:6].max() < 0.01  # a pause is a mouth at rest
    np.testing.assert_allclose(mouth[17], SHAPES["ɑ"], atol=1e-3)  # 0.7 s, in the middle of the vowel
    assert mouth[25, OPEN] < 0.05  # 1.02 s
    assert mouth[25, CLOSE] > 0.95
    assert (mouth[:, CLOSE] > 0.5).sum() == 3


def test_a_plosive_closes_before_its_burst() -> None:
    closed = mouth_of_phonemes([(0.0, "a"), (1.0, "p"), (1.06, "a")], 2.0)[:, CLOSE]
    centre = (closed * (np.arange(50) + 0.5) / FPS).sum() / closed.sum()
    assert 0.96 < centre < 1.0


@pytest.mark.parametrize(
    ("phoneme", "letters"),
    [("aɪ", "aɪ"), ("tʃʲ", "tʃ"), ("ɐ̃ʊ̃", "ɐʊ"), ("uː", "u"), ("ç", "ç"), ("r̝̊", "r"), ("", ""), ("k-", "k"), ("ё", "е")],
)
def test_letters_of_phonemes(phoneme: str, letters: str) -> None:
    assert "".join(symbols(phoneme)) == letters


def test_loudness_of_frames_follows_the_level_and_not_the_scale() -> None:
    time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    level = np.where(time < 1, 0.0, -16.0)  # dB
    wave = (0.3 * 10 ** (level / 20) * np.sin(2 * np.pi * 700 * time)).astype(np.float32)
    loudness = loudness_of_frames(wave)
    assert loudness.shape == (50,)
    np.testing.assert_allclose(loudness[5:20], 1, atol=0.02)
    np.testing.assert_allclose(loudness[30:45], 0.5, atol=0.02)  # 16 of 32 dB
    np.testing.assert_allclose(loudness_of_frames(0.01 * wave)[:-1], loudness[:-1], atol=1e-3)


def test_an_equaliser_is_linear_in_decibels_over_octaves() -> None:
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    for frequency, decibel in ((500, 0.0), (1000, -6.0), (2000, -12.0)):
        tone = np.sin(2 * np.pi * frequency * time).astype(np.float32)
        heard = sounds.filtered(tone, np.array([500.0, 2000.0]), np.array([0.0, -12.0]))
        assert 20 * np.log10(sounds.rms(heard[2000:-2000]) / sounds.rms(tone)) == pytest.approx(decibel, abs=0.1)


def test_a_room_keeps_the_direct_sound_and_dies_away() -> None:
    click = np.zeros(SAMPLE_RATE, np.float32)
    click[100] = 1
    heard = sounds.in_room(np.random.default_rng(1), click)
    assert heard[100] == pytest.approx(1, abs=1e-4)
    assert np.abs(heard[:100]).max() < 1e-5
    assert 0 < np.abs(heard[101:]).max() < 1
    assert np.abs(heard[100 + SAMPLE_RATE // 2 :]).max() < 1e-5


@pytest.mark.parametrize("make", [sounds.noise, sounds.music])
def test_sounds_have_unit_power(make: object) -> None:
    for seed in range(5):
        wave = make(np.random.default_rng(seed), 20_001)  # type: ignore[operator]
        assert (wave.dtype, wave.shape) == (np.float32, (20_001,))
        assert sounds.rms(wave) == pytest.approx(1, rel=1e-3)
