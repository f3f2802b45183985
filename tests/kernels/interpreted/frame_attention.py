"""The Triton kernel as frame attention launches it, against its reference in float64."""

# pyright: reportCallIssue=false, reportArgumentType=false

from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.frame_attention import frame_reference, launch_frame
from tests.tensors import draw, error


@settings(max_examples=20)
@given(
    st.integers(1, 50), st.integers(1, 20), st.integers(0, 45), st.sampled_from([1, 5, 16, 32, 64]), st.integers(0, 99)
)
def test_frames(tokens, tokens_per_frame, first_token, keys, seed):
    frames = -(-(first_token + tokens) // tokens_per_frame)
    q, k, v = draw((tokens, 2, 16), (frames, keys, 2, 16), (frames, keys, 2, 16), seed=seed)
    expected = frame_reference(q.double(), k.double(), v.double(), tokens_per_frame, first_token)
    assert error(launch_frame(q, k, v, tokens_per_frame, first_token), expected) < 1e-5
