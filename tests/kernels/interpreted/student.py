"""The student on the Triton kernels: within the tolerances of the golden cases, and equal to the student on the CPU."""

# pyright: reportCallIssue=false

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.absorb_audio_projections import launch_absorb
from kernels.absorbed_audio_attention import launch_absorbed
from kernels.chunk_attention import launch_triton
from kernels.frame_attention import launch_frame
from kernels.layer_norm import launch_layer_norm
from kernels.rms_norm_rope import launch_rms_norm_rope
from kernels.scheduler import kv_ranges
from kernels.text_image_attention import launch_text_image
from model import block, dit, linear, rope
from model.config import DiTConfig
from tests.parity import cases, test_golden

GOLDEN = Path(__file__).parents[2] / "golden"
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ranges = kv_ranges(len(q), len(k))
    return launch_triton(q[None], k[None], v[None], None, ranges, q.shape[2] ** -0.5, q.dtype, SMALL)[0][0]


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, one: float = 0.0) -> Tensor:
    return launch_layer_norm(x, weight, bias, eps, one)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the operations by the launchers of their Triton kernels."""
    launchers = {
        "chunk_attention": attend,
        "rms_norm_rope": launch_rms_norm_rope,
        "text_image_attention": launch_text_image,
        "frame_attention": launch_frame,
        "absorb_audio_projections": launch_absorb,
        "absorbed_audio_attention": launch_absorbed,
    }
    for name, launcher in launchers.items():
        monkeypatch.setattr(block, name, launcher)
    monkeypatch.setattr(block, "layer_norm", norm)
    monkeypatch.setattr(linear, "layer_norm", norm)
    monkeypatch.setattr(linear, "layer_norm_modulate", lambda x, shift, scale, eps: norm(x, scale, shift, eps, 1.0))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["dit_forward", "dit_forward_two_people"])
def test_golden_cases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The golden student has 6 audio tokens a frame, too few to absorb the projections.
    monkeypatch.setattr(block.AudioAttention, "absorb", lambda _self, audio, _tokens_per_frame: audio)
    assert name in cases.RUN
    test_golden.test_case(GOLDEN / f"{name}.json")


@torch.inference_mode()
def test_absorbed_audio_and_known_frames(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    config = DiTConfig(
        dim=64, ffn_dim=96, num_heads=2, num_layers=2, text_dim=24, text_len=9, img_dim=20, img_tokens=7, freq_dim=32,
        intermediate_dim=16, output_dim=24, context_tokens=16, audio_blocks=2, audio_channels=6,
    )  # fmt: skip
    student = dit.DiT(config)
    latent, condition = torch.randn(3, 16, 4, 6), torch.randn(3, 20, 4, 6)
    text, image, audio = torch.randn(4, 24), torch.randn(7, 20), torch.randn(1, 9, 5, 2, 6)

    def velocity(known: int) -> Tensor:
        context, heard = student.embed_context(text, image), student.embed_audio(audio)
        table = rope.rope_table((3, 2, 3), config.head_dim)
        return student(latent, condition, student.modulate(500.0), table, context, heard, num_motion_latents=known)

    whole, expected = velocity(0), velocity(2)
    torch.testing.assert_close(expected[2:], whole[2:], rtol=1e-5, atol=1e-5)
    request.getfixturevalue("kernels")
    got = velocity(2)
    assert (got[:2] == 0).all()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
