"""Takes: their latents are those of the codec, their speech is heard as in a stream, and files can be resumed."""

import numpy as np
import pytest
import torch

from model.audio import stream_window
from model.distill.audio import CHUNK, hear, load_audio, ring_at
from model.distill.clips import draw_motion
from model.distill.codec import SIZE, as_clip, load_codec
from model.distill.codec_network import encode_clips
from model.distill.face import MOTION, MOUTH, draw_identity, mouth_centre, render
from model.distill.speech import draw_track
from model.distill.takes import FRAMES, LEAD, LIVELINESS, STARTS, STRIDE, draw_take, join, load_takes, make_takes
from model.errors import UserError
from tests.model.distill.conditions import needs_espeak, quiet


@needs_espeak
@pytest.mark.parametrize("start", [0, 5, STARTS - 1])
def test_a_chunk_is_what_the_codec_and_the_stream_make_of_it(start):
    vae, (encoder, _) = load_codec(), load_audio()
    chunk = draw_take(3, 1, vae, encoder).chunk(start)
    rng = np.random.default_rng([3, 1, False])
    identity, track = draw_identity(rng), draw_track(rng, LEAD + FRAMES)
    begin = LEAD + STRIDE * start
    motion = draw_motion(rng, track.mouth, LIVELINESS)[begin : begin + CHUNK.frame_num]
    with torch.no_grad():
        latents = encode_clips(vae, as_clip(render(identity, motion, SIZE)))[0].transpose(0, 1)
        ring, _ = ring_at(hear(track), begin + CHUNK.frame_num)
        torch.testing.assert_close(chunk.latents[0], latents, atol=0.02, rtol=2e-3)  # kept in half precision
        torch.testing.assert_close(chunk.audio[0], stream_window(encoder, ring, CHUNK), atol=1e-4, rtol=1e-4)
    assert np.allclose(chunk.centres[0], mouth_centre(identity, motion, SIZE), atol=1e-3)
    assert np.array_equal(chunk.mouths[0], motion[:, [MOTION.index(name) for name in MOUTH]])


@needs_espeak
def test_files_are_kept_and_damaged_ones_named(tmp_path):
    make_takes(tmp_path, 1, report=quiet)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    make_takes(tmp_path, 2, report=quiet)
    make_takes(tmp_path, 1, held_out=True, report=quiet)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    first, second = load_takes(tmp_path)
    (other,) = load_takes(tmp_path, held_out=True)
    batch = join([first.chunk(0), second.chunk(3), other.chunk(12)])
    assert batch.latents.shape == (3, 9, 48, 16, 16)
    assert batch.audio.shape == (3, 33, 5, 1, 6)
    assert not torch.equal(batch.portraits[0], batch.portraits[2])
    (tmp_path / "0000-00000.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"0000-00000.npz: not a take"):
        load_takes(tmp_path)
    with pytest.raises(UserError, match="no held-out takes there"):
        load_takes(tmp_path / "empty", held_out=True)
