"""Decodes recordings into blocks of mono or stereo samples.

libsndfile reads the files that it knows, to the very sample. FFmpeg reads everything else, and files of more than two
channels, because it knows which of them is the centre.
"""

import codecs
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.layout import AudioLayout
from av.error import FFmpegError
from av.packet import Packet
from numpy.typing import NDArray

from model.errors import UserError
from model.files import placeholder

LOUDEST = 100  # in units of full scale; a file with larger samples does not hold sound in [-1, 1]
FILE_RATES = range(1_000, 768_001)  # Hz, that recordings may have
SNIFFED = 4096  # bytes that `is_container` needs to know every kind
_FEWEST_CHARACTERS = 8  # different ones that a text has
_RF64 = (b"RF64", b"BW64")  # first bytes of WAV that may be larger than 4 GiB
_UNCOUNTED = 2**32 - 1  # size of a chunk that stands elsewhere, or is not known yet
_SUBWOOFER = "LFE"  # how FFmpeg calls its channel
_BLOCK = 1 << 12  # frames of a file decoded at once: its memory, however long the file
_FIVE_CHANNELS = 1 + 2 * 0.5**0.5  # what ITU-R BS.775 adds up in a channel of the stereo mix
_KNOWN = "give WAV, FLAC, OGG, MP3, M4A or WebM"

Block = NDArray[np.float32]  # [sample, channel], 1 or 2 channels


class Decoder(ABC):
    """An open recording. `rate` is in Hz, `channels` is 1 or 2, and `name` is how messages call it.

    `unheard` names the recording's channel that is not heard, such as "channel 4 of 6"; None if all are.
    """

    name: str
    rate: int
    channels: int
    unheard: str | None = None

    def blocks(self) -> Iterator[Block]:
        """Yields the samples from the start.

        Raises `UserError`, after the blocks that could be read, where the recording is damaged or holds samples that
        are not finite or far beyond full scale.
        """
        if self.rate not in FILE_RATES:
            raise UserError(f"{self.name} has {self.rate} samples a second; give audio of 1 kHz to 768 kHz")
        came = 0
        try:
            for block in self._blocks():
                self._check(block, came)
                yield block
                came += len(block)
        except (soundfile.LibsndfileError, FFmpegError) as error:
            raise self.damage(came) from error

    def damage(self, came: int) -> UserError:
        """What to raise where nothing can be read after `came` samples."""
        return UserError(f"{self.name} cannot be read any further than {came / self.rate:.2f} s; give an intact file")

    @abstractmethod
    def close(self) -> None:
        """Closes what was opened here."""

    @abstractmethod
    def _blocks(self) -> Iterator[Block]: ...

    def _check(self, block: Block, came: int) -> None:
        finite = np.isfinite(block).all(axis=1)
        if np.abs(block[finite]).max(initial=0) > LOUDEST:
            raise UserError(f"{self.name} is over {LOUDEST} times as loud as full scale; scale it to [-1, 1]")
        if not finite.all():
            second = (came + int(finite.argmin())) / self.rate
            raise UserError(f"{self.name} holds a sample that is no finite number at {second:.3f} s; repair it")


class _SequentialFile(soundfile.SoundFile):
    """A file that is read from front to back. soundfile would seek after every read, and seeks in MP3 are inexact."""

    def seekable(self) -> bool:
        return False


class SndfileDecoder(Decoder):
    """A file that libsndfile reads. More than two channels become their mean."""

    def __init__(self, path: str) -> None:
        self.name, self._path = repr(path), path
        self.file = _SequentialFile(path)
        self.rate = self.file.samplerate
        self.channels = 2 if self.file.channels == 2 else 1

    @property
    def is_exact(self) -> bool:
        """Whether no other decoder might make more of the file.

        The header of an unfinished recording may tell of no samples though there are some, channels of surround sound
        have unknown places, and libsndfile takes the padding of WAV files in GSM 6.10 for a block of samples. But of
        big-endian WAV files FFmpeg makes noise.
        """
        if (self.file.format, self.file.endian) == ("WAV", "BIG"):
            return True
        padded = (self.file.format, self.file.subtype) == ("WAV", "GSM610")
        whole = self.file.frames > 0 or _is_empty_riff(self._path)
        return whole and self.file.channels <= 2 and not padded

    def _blocks(self) -> Iterator[Block]:
        try:
            self.file.seek(0)
        except soundfile.LibsndfileError:  # telephone codecs can only be read forwards
            self.file.close()
            self.file = _SequentialFile(self._path)
        while len(block := self.file.read(_BLOCK, dtype="float32", always_2d=True)):
            yield _at_most_two(block)

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def _is_empty_riff(path: str) -> bool:
    """Whether the chunks of a WAV file without samples end where the file does: then none were left uncounted."""
    with Path(path).open("rb") as file:
        end, at = file.seek(0, os.SEEK_END), 12
        file.seek(0)
        if file.read(4) not in (b"RIFF", *_RF64):
            return False
        while at < end:
            file.seek(at)
            name, size = file.read(4), int.from_bytes(file.read(4), "little")
            if not all(ord(" ") <= letter <= ord("~") for letter in name):
                return False
            at += 8 + (0 if size == _UNCOUNTED else size + size % 2)
        return at - end <= 1  # the last may lack what pads it to an even size


class FFmpegDecoder(Decoder):
    """A recording that FFmpeg reads from a binary file or pipe; of a film, its sound.

    Surround sound is mixed down to stereo with the weights of ITU-R BS.775, scaled so that five full channels do not
    clip. More than eight channels, or more than two whose places are not known, become their mean. Packets that cannot
    be decoded are skipped, as players do, unless nothing comes after them.

    Construction decodes the first packet, and raises `UserError` if there is none. `head` is what was already read of
    a pipe, which can be decoded only once.
    """

    def __init__(self, file: BinaryIO, name: str, head: bytes = b"") -> None:
        self.name, self._file, self._head = name, file, head
        frames = self._frames()
        try:
            first = next(frames, None)
        except FFmpegError as error:
            raise UserError(f"{name} is not audio in a known format; {_KNOWN}") from error
        if first is None:
            raise UserError(f"{name} holds no sound that can be decoded; {_KNOWN}")
        self._ahead: Iterator[AudioFrame] | None = chain([first], frames)
        self.rate = first.sample_rate
        self._is_surround = _is_surround(first.layout)
        self.channels = 2 if self._is_surround or first.layout.nb_channels == 2 else 1
        places = [channel.name for channel in first.layout.channels]
        if self._is_surround and _SUBWOOFER in places:
            self.unheard = f"channel {places.index(_SUBWOOFER) + 1} of {len(places)}"

    def close(self) -> None:
        """Closes the file."""
        self._ahead = None  # closes the container
        self._file.close()

    def _frames(self) -> Iterator[AudioFrame]:
        # FFmpeg must not take the file's name for an address, nor open what a playlist names.
        options, file = {"protocol_whitelist": ""}, _Nameless(self._file, self._head)
        with av.open(file, "r", options=options, metadata_errors="ignore") as container:
            stream = container.streams.best("audio")
            if stream is None:
                return
            failure = None
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except FFmpegError as error:
                    failure = failure if _is_part_of_a_sample(packet) else error
                    continue
                if frames and packet.size:  # not what the decoder still held
                    failure = None
                yield from (frame for frame in frames if isinstance(frame, AudioFrame))
            if failure is not None:
                raise failure

    def _blocks(self) -> Iterator[Block]:
        frames, self._ahead = self._ahead, None
        if frames is None:
            self._file.seek(0)
            frames = self._frames()
        to_float = av.AudioResampler("flt", "stereo" if self._is_surround else None)
        came = 0
        for frame in frames:
            try:
                parts = to_float.resample(frame)
            except ValueError as error:
                second = came / self.rate
                raise UserError(f"{self.name} changes its rate or channels at {second:.2f} s; convert it") from error
            for part in parts:
                came += part.samples
                block = part.to_ndarray().reshape(part.samples, -1)
                yield _at_most_two(block / _FIVE_CHANNELS if self._is_surround else block)


def _is_part_of_a_sample(packet: Packet) -> bool:
    """Whether a packet is smaller than one sample of all channels: the recording was cut there, and lacks nothing."""
    codec = packet.stream.codec_context
    if not isinstance(codec, AudioCodecContext) or not codec.name.startswith("pcm_"):
        return False
    return packet.size < codec.layout.nb_channels * codec.format.bytes


class _Nameless:
    """A binary file without its name. It gives `head` first, and then what is there, without waiting for more."""

    def __init__(self, file: BinaryIO, head: bytes) -> None:
        self._head, self._read = head, getattr(file, "read1", file.read)
        if not head and file.seekable():
            self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """The next bytes, `size` at most; none at the end."""
        if not self._head:
            return _with_known_end(self._read(size))
        data, self._head = self._head[:size], self._head[size:]
        return _with_known_end(data)


def _with_known_end(data: bytes) -> bytes:
    """The data, but RF64 whose size was never filled in begins as WAV does, which FFmpeg reads up to the file's end."""
    unfinished = data.startswith(_RF64) and data[12:16] == b"ds64" and data[28:36] == bytes(8)
    return b"RIFF" + data[4:] if unfinished else data


def _at_most_two(block: NDArray[Any]) -> Block:
    """The block, or the mean of its channels."""
    block = block if block.shape[1] <= 2 else block.mean(axis=1, keepdims=True)
    return block.astype(np.float32, copy=False)


def _is_surround(layout: AudioLayout) -> bool:
    """Whether a recording has three to eight channels whose places are known. Others are such as a field recorder's."""
    return 2 < layout.nb_channels <= 8 and all(channel.name != "NONE" for channel in layout.channels)


def open_decoder(path: str) -> Decoder:
    """Opens the audio file at `path`. Raises `UserError` if that cannot be done."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise UserError(f"{path!r} is not a file; name an audio file, or '-' for standard input")
        with Path(path).open("rb"):  # libsndfile would not say why a file cannot be opened
            pass
    except OSError as error:
        raise UserError(f"{path!r} cannot be read ({error.strerror}); name an audio file") from error
    known = _known_to_libsndfile(path)
    if known is not None and known.is_exact:
        return known
    file = Path(path).open("rb")  # noqa: SIM115, the decoder closes it
    try:
        decoder = FFmpegDecoder(file, repr(path))
    except UserError as error:
        file.close()
        if known is None:
            instead = placeholder(Path(path)) or _without_index(Path(path))
            raise (UserError(f"{path!r} {instead}") if instead else error) from error.__cause__
        return known
    if known is not None:
        known.close()
    return decoder


def _without_index(path: Path) -> str | None:
    """What is wrong with an MP4 or QuickTime file whose index is missing, as the end of a sentence; None for others."""
    with path.open("rb") as file:
        found = []
        while len(head := file.read(8)) == 8 and head[4:] in _BOXES:
            found.append(head[4:])
            size = int.from_bytes(head[:4], "big")
            size = int.from_bytes(file.read(8), "big") - 8 if size == 1 else size
            file.seek(size - 8 if size >= 8 else 0, os.SEEK_CUR if size >= 8 else os.SEEK_END)
    if not found or b"moov" in found:
        return None
    return "is a film or M4A file without its index, as after an interrupted copy; copy or record it again"


def _known_to_libsndfile(path: str) -> SndfileDecoder | None:
    with suppress(soundfile.LibsndfileError, TypeError):  # TypeError: headerless, by its suffix
        return SndfileDecoder(path)
    return None


BIG_ENDIAN_WAV = b"RIFX"  # its first bytes
# First bytes of RIFF, RF64, W64, FLAC, Ogg, tagged MP3, AU, AIFF, CAF, AMR, Matroska and WebM, ASF, WavPack, FLV, and
# of MPEG program streams.
_MAGIC = (
    *(b"RIFF", b"RF64", b"BW64", b"riff", b"fLaC", b"OggS", b"ID3", b".snd", b"FORM", b"caff", b"#!AMR"),
    *(b"\x1aE\xdf\xa3", b"0&\xb2u", b"wvpk", b"FLV", b"\0\0\1\xba"),
)
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")  # that MP4 and QuickTime begin with, after their size
_PACKET = 188  # bytes, of an MPEG transport stream; each packet begins with a "G"
_MPEG_FRAME = re.compile(rb"\xff[\xe2-\xe5\xf0-\xf5\xf8-\xfd][^\xff]")  # of MP2, MP3, or AAC in ADTS
_AAC, _LAYER_3, _LAYER_2, _MPEG_1 = 0, 1, 2, 3  # in a frame's header
_HALVINGS = {3: 0, 2: 1, 0: 2}  # of the sampling rate, in MPEG 1, 2 and 2.5
_MPEG_RATES = (44_100, 48_000, 32_000)
_MPEG_KBITS = {  # kbit/s by the number in the header: in layers of MPEG 1, and in both layers of the others
    _LAYER_2: (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 0),
    _LAYER_3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
    None: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
}


# First bytes, longer than chance would make raw samples have, of files without sound.
_SOUNDLESS = {
    b"\x89PNG\r\n\x1a\n": "a PNG picture",
    b"\xff\xd8\xff\xe0\x00\x10JFIF": "a JPEG picture",
    b"\xff\xd8\xff\xe1": "a JPEG picture",
    b"GIF87a": "a GIF picture",
    b"GIF89a": "a GIF picture",
    b"%PDF-": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b\x08\x08": "a gzip archive",
    b"\x7fELF": "a program",
}


def soundless_kind(head: bytes) -> str | None:
    """The kind of file without sound that a stream with this beginning is, such as "a PNG picture"; None if of none."""
    kind = next((kind for magic, kind in _SOUNDLESS.items() if head.startswith(magic)), None)
    return kind or ("text" if _is_text(head) else None)


def _is_text(head: bytes) -> bool:
    """Whether these bytes are some different characters of UTF-8: as raw samples, all would be far from zero."""
    characters = set(codecs.getincrementaldecoder("utf-8")("replace").decode(head))  # the last may be cut off
    readable = all((c.isprintable() and c != "\ufffd") or c.isspace() for c in characters)
    return readable and len(characters) >= _FEWEST_CHARACTERS


def is_container(head: bytes) -> bool:
    """Whether a stream that begins with `head`, of up to `SNIFFED` bytes, is a recording rather than raw samples."""
    if head.startswith(_MAGIC) or head[4:8] in _BOXES:
        return True
    packets = {head[k : k + _PACKET] for k in range(0, len(head), _PACKET)}
    if len(packets) >= 3 and all(packet.startswith(b"G") for packet in packets):  # a steady tone has equal packets
        return True
    return _begins_with_mpeg_frames(head)


def _begins_with_mpeg_frames(head: bytes) -> bool:
    """Whether three frames of MPEG audio follow each other. Raw samples may look like one, or like equal ones."""
    at = 0
    for _ in range(3):
        size = _frame_size(head[at : at + 6])
        if not size:
            return False
        at += size
    return True


def _frame_size(header: bytes) -> int:
    """Bytes of the frame of MP2, MP3 or AAC in ADTS whose first six bytes these are; 0 if there is none."""
    if len(header) < 6 or not _MPEG_FRAME.match(header):
        return 0
    version, layer, rate = header[1] >> 3 & 3, header[1] >> 1 & 3, header[2] >> 2 & 3
    if layer == _AAC:
        return (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    if rate == len(_MPEG_RATES):
        return 0
    kbits = _MPEG_KBITS[layer if version == _MPEG_1 else None][header[2] >> 4]
    samples = 576 if layer == _LAYER_3 and version != _MPEG_1 else 1152
    return samples * 125 * kbits // (_MPEG_RATES[rate] >> _HALVINGS[version]) + (header[2] >> 1 & 1)
