"""The student: names and shapes at full size, rotary tables, which inputs affect which outputs, errors.

Its numbers are compared with the official code in tests/parity."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.absorb_audio_projections_fp8 import AbsorbedFP8
from kernels.layer_norm import layer_norm_modulate
from model.block import AbsorbedAudio, AudioKV
from model.config import DiTConfig, FP8Policy
from model.dit import DiT, group_audio
from model.rope import rope_table, rotate

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = DiTConfig(
    dim=64, ffn_dim=96, num_layers=2, num_heads=2, text_dim=24, text_len=12, img_dim=20, img_tokens=7,
    audio_blocks=2, audio_channels=6, intermediate_dim=8, output_dim=10, context_tokens=3,
)  # fmt: skip


def test_official_names_and_shapes_at_full_size() -> None:
    official = json.loads((GOLDEN / "checkpoint_keys.json").read_text())["dit"]["keys"]
    with torch.device("meta"):
        param_map = DiT(DiTConfig()).param_map()
    assert {name: list(mapping.shape) for name, mapping in param_map.items()} == official
    assert sum(math.prod(mapping.shape) for mapping in param_map.values()) == 18_882_046_784


@pytest.mark.parametrize(
    ("position", "pair", "angle"),
    [
        ((1, 0, 0), 1, 0.657933224657568),
        ((8, 0, 0), 21, 0.0012159288663623),
        ((0, 47, 0), 22 + 20, 0.0072874241652133),
        ((0, 0, 27), 43 + 20, 0.0041863926055481),
    ],
)
def test_rope_angles(position: tuple[int, int, int], pair: int, angle: float) -> None:
    f, h, w = position
    table = rope_table((9, 48, 28), 128)
    assert table.shape == (12096, 64, 2)
    cos, sin = table[(f * 48 + h) * 28 + w, pair].double()
    assert math.atan2(sin, cos) == pytest.approx(angle, abs=1e-7)


@given(st.sampled_from([2, 6, 16, 64, 80, 128]), st.tuples(*[st.integers(1, 4)] * 3))
def test_rotation_keeps_lengths_and_depends_on_distance_only(head_dim: int, grid: tuple[int, int, int]) -> None:
    grid = (grid[0] + 1, grid[1], grid[2])
    table = rope_table(grid, head_dim)
    q, k = torch.randn(2, head_dim)
    everywhere = [rotate(x.expand(math.prod(grid), 1, head_dim), table)[:, 0] for x in (q, k)]
    torch.testing.assert_close(everywhere[0].norm(dim=-1), q.norm().expand(math.prod(grid)))
    scores = (everywhere[0] @ everywhere[1].T).unflatten(0, grid).unflatten(-1, grid)
    torch.testing.assert_close(scores[0, 0, 0, 0, 0, 0], scores[1, -1, -1, 1, -1, -1], atol=1e-4, rtol=1e-4)


def test_timestep_sinusoid_through_the_embedding() -> None:
    """`modulate` with an identity embedding returns the sinusoid: cosines first, float64 angles."""
    config = DiTConfig(dim=256, num_heads=2, num_layers=1, ffn_dim=8, img_dim=8, text_dim=8, audio_channels=1)
    dit = DiT(config)
    with torch.no_grad():
        dit.head.modulation.zero_()
        dit.time_embedding = torch.nn.Sequential()
        e = dit.modulate(833.33331298828125).head[0]
    index = [0, 1, 2, 64, 127, 128, 129, 130, 192, 255]
    want = [-0.6885855, -0.8791582, 0.5983214, -0.4612039, 0.9959930, -0.7251552, 0.4765301, -0.8012562, 0.8872942, 0.0894310]  # fmt: skip  # noqa: E501
    torch.testing.assert_close(e[index], torch.tensor(want), atol=1e-6, rtol=0)


def inputs(config: DiTConfig, grid: tuple[int, int, int], frames: int) -> dict[str, torch.Tensor]:
    f, h, w = grid
    return {
        "latent": torch.randn(f, 16, 2 * h, 2 * w),
        "condition": torch.randn(f, 20, 2 * h, 2 * w),
        "text": torch.randn(5, config.text_dim),
        "image": torch.randn(config.img_tokens, config.img_dim),
        "audio": torch.randn(1, frames, config.audio_window, config.audio_blocks, config.audio_channels),
    }


def forward(dit: DiT, x: dict[str, torch.Tensor], t: float = 625.0) -> torch.Tensor:
    f, _, h, w = x["latent"].shape
    context, audio = dit.embed_context(x["text"], x["image"]), dit.embed_audio(x["audio"])
    rope = rope_table((f, h // 2, w // 2), dit.config.head_dim)
    return dit(x["latent"], x["condition"], dit.modulate(t), rope, context, audio)


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
@torch.inference_mode()
def test_any_grid(later: int, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = inputs(SMALL, (1 + later, rows, columns), 1 + 4 * later)
    out = forward(DiT(SMALL), x)
    assert out.shape == x["latent"].shape
    assert out.dtype == torch.float32
    assert out.isfinite().all()


@torch.inference_mode()
def test_every_input_matters_and_audio_affects_its_own_frame_first() -> None:
    torch.manual_seed(0)
    dit, x = DiT(SMALL), inputs(SMALL, (3, 2, 2), 9)
    out = forward(dit, x)
    for name in x:
        assert not torch.allclose(forward(dit, x | {name: x[name] + torch.randn_like(x[name])}), out, atol=1e-5), name
    one_block = DiT(DiTConfig(**{**vars(SMALL), "num_layers": 1}))
    base = forward(one_block, x)
    audio = x["audio"].clone()
    audio[:, -1, -1] += 1  # the look-ahead of the last video frame, which only latent frame 2 uses
    changed = (forward(one_block, x | {"audio": audio}) - base).abs().amax(dim=(1, 2, 3))
    assert changed[0] == changed[1] == 0
    assert changed[2] > 0


def test_audio_groups_are_consecutive_frames() -> None:
    frames, radius = 33, 2
    window = torch.arange(frames)[:, None] + torch.arange(-radius, radius + 1)
    first, later = group_audio(window[None, :, :, None, None], 4)
    assert first.flatten().tolist() == [-2, -1, 0, 1, 2]
    for k in range(1, 9):
        assert later[0, k - 1].flatten().tolist() == list(range(4 * k - 5, 4 * k + 3))


def test_layer_norm_modulate_in_bf16_rounds_once() -> None:
    x, shift, scale = (torch.randn(4, 64) * 3).bfloat16(), torch.randn(64), torch.randn(64)
    d = x.double()
    exact = (d - d.mean(1, keepdim=True)) / (d.var(1, correction=0, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    got = layer_norm_modulate(x, shift, scale, 1e-6)
    assert got.dtype == torch.bfloat16
    assert torch.linalg.norm(got.double() - exact) < 5e-3 * torch.linalg.norm(exact)


@torch.inference_mode()
def test_bf16_student_stays_near_float32() -> None:
    torch.manual_seed(0)
    dit, x = DiT(SMALL), inputs(SMALL, (3, 2, 2), 9)
    want = forward(dit, x)
    got = forward(dit.to(torch.bfloat16), x)
    assert got.dtype == torch.float32
    assert torch.linalg.norm(got - want) < 3e-2 * torch.linalg.norm(want)


@torch.inference_mode()
def test_errors_name_the_argument() -> None:
    dit, x = DiT(SMALL), inputs(SMALL, (3, 2, 2), 9)
    for name, bad in (
        ("text", torch.zeros(13, 24)),
        ("text", torch.zeros(0, 24)),
        ("text", torch.zeros(5, 23)),
        ("image", torch.zeros(8, 20)),
        ("audio", torch.zeros(3, 9, 5, 2, 6)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            forward(dit, x | {name: bad})
    context, audio = dit.embed_context(x["text"], x["image"]), dit.embed_audio(x["audio"])
    modulation, rope = dit.modulate(1.0), rope_table((3, 2, 2), 32)
    with pytest.raises(ValueError, match=r"^rope: got"):
        dit(x["latent"], x["condition"], modulation, rope[:-1], context, audio)
    two = AudioKV(*(torch.cat((y, y), dim=2) for y in audio))
    with pytest.raises(ValueError, match=r"^masks: wanted"):
        dit(x["latent"], x["condition"], modulation, rope, context, two)


@torch.inference_mode()
@pytest.mark.parametrize("e4m3", [False, True])
def test_audio_absorbed_beforehand_gives_the_same_bits(e4m3: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with tokens of known frames that the last block leaves out."""
    monkeypatch.setattr("model.block.is_tuned", lambda *_: e4m3)
    torch.manual_seed(0)
    dit, x = DiT(SMALL), inputs(SMALL, (3, 4, 5), 9)
    dit.quantize(FP8Policy())
    context, audio = dit.embed_context(x["text"], x["image"]), dit.embed_audio(x["audio"])
    absorbed = dit.absorb_audio(audio, 20)
    assert all(isinstance(own, AbsorbedFP8 if e4m3 else AbsorbedAudio) for own in absorbed)
    assert sum(y.nbytes for own in absorbed for y in own) == dit.absorbed_bytes(3, 20)
    rope, modulation = rope_table((3, 4, 5), SMALL.head_dim), dit.modulate(1.0)
    for known in (0, 2):
        want, got = (
            dit(x["latent"], x["condition"], modulation, rope, context, y, num_motion_latents=known)
            for y in (audio, absorbed)
        )
        assert torch.equal(got, want)
    two = AudioKV(*(torch.cat((y, y), dim=2) for y in audio))
    assert dit.absorb_audio(two, 20) is two


@torch.inference_mode()
def test_fp8_attention_stays_near_float32() -> None:
    torch.manual_seed(0)
    dit, x = DiT(SMALL), inputs(SMALL, (3, 4, 5), 9)
    want = forward(dit, x)
    dit.use_fp8_attention()
    error = torch.linalg.norm(forward(dit, x) - want) / torch.linalg.norm(want)
    assert 1e-5 < error < 5e-2


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("speakers", "context_tokens"), [(1, 16), (2, 16), (1, 8)])
@torch.inference_mode()
def test_gpu_student_equals_the_cpu_student(
    dtype: torch.dtype, bound: float, speakers: int, context_tokens: int
) -> None:
    """Through the GPU's kernels, compiled and not, with motion latents and without."""
    torch.manual_seed(0)
    config = replace(SMALL, dim=128, num_heads=2, context_tokens=context_tokens)
    dit, x = DiT(config), inputs(config, (3, 4, 5), 9)
    x["audio"] = x["audio"].expand(speakers, -1, -1, -1, -1) + torch.randn(speakers, 1, 1, 1, 1)
    masks = torch.zeros(3, 20)
    masks[0, :7] = masks[1, 7:12] = masks[2, 12:] = 1

    def run(dit: DiT, device: str, num_motion_latents: int) -> torch.Tensor:
        on = {name: value.to(device) for name, value in x.items()}
        context, audio = dit.embed_context(on["text"], on["image"]), dit.embed_audio(on["audio"])
        rope = rope_table((3, 4, 5), config.head_dim, device)
        people = masks.to(device) if speakers == 2 else None
        return dit(on["latent"], on["condition"], dit.modulate(625.0), rope, context, audio, people, num_motion_latents)

    want = run(dit, "cpu", 0)
    dit = dit.to("cuda", dtype)
    for num_motion_latents in (0, 1):
        got = run(dit, "cuda", num_motion_latents).cpu()
        new, wanted = got[num_motion_latents:], want[num_motion_latents:]
        assert torch.linalg.norm(new - wanted) < bound * torch.linalg.norm(wanted)
    eager = run(dit, "cuda", 1)
    for block in dit.blocks:
        block.compile(fullgraph=True)
    torch.testing.assert_close(run(dit, "cuda", 1), eager, rtol=bound, atol=bound)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("speakers", [1, 2])
@torch.inference_mode()
def test_gpu_student_in_fp8_equals_the_cpu_student(attention: bool, speakers: int) -> None:
    """The same e4m3 weights: residual stream in bf16 through the GPU's kernels, in float32 on the CPU."""
    torch.manual_seed(0)
    config = replace(SMALL, dim=128, num_heads=2, context_tokens=16)
    dit, x = DiT(config), inputs(config, (3, 4, 5), 9)
    x["audio"] = x["audio"].expand(speakers, -1, -1, -1, -1) + torch.randn(speakers, 1, 1, 1, 1)
    masks = torch.zeros(3, 20)
    masks[0, :7] = masks[1, 7:12] = masks[2, 12:] = 1
    outputs = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        student = copy.deepcopy(dit).to(device, dtype)
        student.quantize(FP8Policy())
        if attention:
            student.use_fp8_attention()
        on = {name: value.to(device) for name, value in x.items()}
        context, audio = student.embed_context(on["text"], on["image"]), student.embed_audio(on["audio"])
        rope, modulation = rope_table((3, 4, 5), config.head_dim, device), student.modulate(625.0)
        people = masks.to(device) if speakers == 2 else None
        outputs.append(student(on["latent"], on["condition"], modulation, rope, context, audio, people).cpu())
    want, got = outputs
    assert torch.linalg.norm(got - want) < 8e-2 * torch.linalg.norm(want)
