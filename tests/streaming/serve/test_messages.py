"""flashtalk.v1: what is understood, what is refused, and that the document lists the same."""

import dataclasses
import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.serve import messages
from streaming.serve.errors import CODES, RefusedError
from streaming.serve.limits import Limits
from streaming.serve.messages import (
    End,
    Hello,
    Interrupt,
    Ping,
    Pong,
    SoundFormat,
    decode,
    decode_from_server,
    decode_options,
    encode,
    pack,
    unpack,
)
from streaming.serve.socket import samples

DOCUMENT = (Path(__file__).parents[3] / "docs" / "serve.md").read_text()


def test_messages_are_read_as_they_are_written() -> None:
    for message in (Hello(SoundFormat(16000), "fmp4"), Hello(), End(), Interrupt(), Ping(1.5)):
        assert decode(encode(message)) == message
    assert decode_from_server(encode(Pong(2.0))) == Pong(2.0)
    assert json.loads(encode(Ping(1.0))) == {"type": "ping", "t": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{}", '{"type": "nothing"}', '{"type": "ping"}', '{"type": "ping", "t": "1"}',
        '{"type": "end", "more": 1}', '{"type": "hello", "video": "avi"}', '{"type": "hello", "audio": {"rate": 1}}',
        '{"type": "hello", "audio": {"rate": 1e9}}', '{"type": "hello", "audio": {"rate": 16000, "channels": 3}}',
        '{"type": "pong", "t": 1}', "[" * 10_000, '{"type": "ping", "t": NaN}',
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(RefusedError) as error:
        decode(text)
    assert error.value.code == "bad_message"
    assert "\n" not in str(error.value)


@settings(max_examples=50)
@given(st.text() | st.binary())
def test_garbage_is_refused(garbage: str | bytes) -> None:
    with pytest.raises(RefusedError):
        decode(garbage)


@pytest.mark.parametrize(
    "text", ['{"kind": "film"}', '{"seed": -1}', '{"seed": 1e300}', '{"prompt": 3}', "3", '{"a": 1}']
)
def test_options_are_checked(text: str) -> None:
    with pytest.raises(RefusedError) as error:
        decode_options(text)
    assert error.value.code == "bad_request"


def test_binary_messages_have_a_header_of_eight_bytes() -> None:
    data = pack(3, 2**32 - 1, b"abc", flags=1, moment=2**16 + 7)
    assert len(data) == 11
    assert unpack(data)[:4] == (3, 1, 7, 2**32 - 1)
    assert bytes(unpack(data).body) == b"abc"
    with pytest.raises(RefusedError):
        unpack(b"1234567")


def test_samples_are_read_in_each_format() -> None:
    ints = np.array([1, -2, 3, -4], "<i2")
    assert samples(memoryview(ints.tobytes()), SoundFormat(16000)).tolist() == [1, -2, 3, -4]
    stereo = samples(memoryview(ints.tobytes()), SoundFormat(16000, channels=2))
    assert stereo.tolist() == [[1, -2], [3, -4]]
    floats = samples(memoryview(ints.astype("<f4").tobytes()), SoundFormat(16000, "pcm_f32le"))
    assert floats.dtype == np.float32
    for form, size in (
        (SoundFormat(16000), 3),
        (SoundFormat(16000, channels=2), 6),
        (SoundFormat(16000, "pcm_f32le"), 6),
    ):
        with pytest.raises(RefusedError, match="no whole samples"):
            samples(memoryview(bytes(size)), form)


def documented(heading: str) -> dict[str, set[str]]:
    """The first column of the table under a heading: messages, and the names in the second column."""
    section = DOCUMENT.split(f"### {heading}\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", section, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", fields)) for name, fields in rows}


@pytest.mark.parametrize(("heading", "union"), [("To the server", "ToServer"), ("From the server", "FromServer")])
def test_the_document_lists_all_messages_and_their_fields(heading: str, union: str) -> None:
    kinds = getattr(messages, union).__args__
    wanted = {kind.__struct_config__.tag: {f.encode_name for f in msgspec.structs.fields(kind)} for kind in kinds}
    assert documented(heading) == wanted


def test_the_document_lists_all_limits_with_their_values() -> None:
    section = DOCUMENT.split("## Limits\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", section, re.MULTILINE)
    assert {name: float(value) for name, value in rows} == dataclasses.asdict(Limits())


def test_the_document_lists_all_codes() -> None:
    section = DOCUMENT.split("### Errors\n", 1)[1].split("\n#", 1)[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", section, re.MULTILINE))
    assert {name: int(status) for name, status in rows.items()} == {n: int(s) for n, (s, _) in CODES.items()}
