"""What viewers decode: the frames' numbers in their pixels, the sound, from the first key frame or a later one on."""

import av
import numpy as np
import pytest

from streaming.serve.encoder import Encoded, MomentEncoder
from tests.streaming.serve.kit import film, number_of, numbered, speech

COUNT = 80


@pytest.fixture(scope="module")
def stream() -> tuple[MomentEncoder, list[Encoded]]:
    encoder = MomentEncoder(128, 128, 25)
    sound = speech(COUNT / 25, 48_000).astype(np.float32).reshape(COUNT, -1) / 32768
    return encoder, [encoder.encode(k, numbered(k), sound[k], key=k == 20) for k in range(COUNT)]


@pytest.mark.parametrize("start", [0, 20, 70])
def test_the_mp4_decodes_from_any_key_frame_on(stream: tuple[MomentEncoder, list[Encoded]], start: int) -> None:
    encoder, moments = stream
    assert moments[start].key
    data = encoder.header + b"".join(moment.fragment for moment in moments[start:])
    numbers, _, begins = film(data)
    assert numbers == list(range(start, COUNT))
    assert begins == pytest.approx(start / 25)


def test_key_frames_come_when_asked_for_and_every_two_seconds(stream: tuple[MomentEncoder, list[Encoded]]) -> None:
    assert [moment.tick for moment in stream[1] if moment.key] == [0, 20, 70]


def test_h264_alone_decodes_from_a_key_frame_on(stream: tuple[MomentEncoder, list[Encoded]]) -> None:
    decoder = av.CodecContext.create("h264", "r")
    numbers = []
    for moment in stream[1][20:]:
        decoded = decoder.decode(av.Packet(moment.h264))
        numbers += [number_of(frame.to_ndarray(format="rgb24")) for frame in decoded]
    decoded = decoder.decode(None)
    numbers += [number_of(frame.to_ndarray(format="rgb24")) for frame in decoded]
    assert numbers == list(range(20, COUNT))


def test_sound_is_that_of_the_moments_and_2_5_ms_late(stream: tuple[MomentEncoder, list[Encoded]]) -> None:
    decoder = av.CodecContext.create("libopus", "r")
    decoder.sample_rate, decoder.layout = 48_000, "mono"
    assert all(len(moment.opus) == 2 for moment in stream[1])
    packets = [packet for moment in stream[1] for packet in moment.opus]
    decoded = [part.to_ndarray() for packet in packets for part in decoder.decode(av.Packet(packet))]
    heard = np.concatenate([part.astype(np.float64).reshape(-1) for part in decoded])
    said = speech(COUNT / 25, 48_000).astype(np.float64)
    wanted = said[4800:9600] / np.linalg.norm(said[4800:9600])
    match = [heard[4800 + lag :][:4800] @ wanted / np.linalg.norm(heard[4800 + lag :][:4800]) for lag in (0, 60, 120)]
    assert len(heard) == len(said)
    assert match[2] > 0.99
    assert match[2] > match[1]


def test_the_mime_type_names_the_codecs(stream: tuple[MomentEncoder, list[Encoded]]) -> None:
    assert stream[0].mime.startswith('video/mp4; codecs="avc1.42')
    assert stream[0].mime.endswith(',opus"')


def test_a_key_frame_fits_into_a_quarter_of_a_second() -> None:
    """Noise, the worst picture: no key frame has more bytes than the rate gives in 0.25 s."""
    encoder = MomentEncoder(128, 128, 25)
    noise = np.random.default_rng(0).integers(0, 256, (60, 128, 128, 3), np.uint8)
    silence = np.zeros(1920, np.float32)
    sizes = [len(encoder.encode(k, noise[k], silence, key=False).h264) for k in range(60)]
    assert max(sizes) <= 800_000 / 8 / 4 * 1.1
    assert sum(sizes) * 8 / (60 / 25) < 1.3 * 800_000
