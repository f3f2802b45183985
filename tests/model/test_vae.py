"""The streaming VAE: official keys and numbers, and step by step equal to whole-clip formulas that know no steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

import model.vae
from model.config import VAEConfig, from_official
from model.vae import VAE

# The formulas of the whole clip, [channel, frame, row, column], on a state dict `p` with a layer at `key`.

Parameters = dict[str, Tensor]


def conv(p: Parameters, key: str, x: Tensor) -> Tensor:
    kt, k = p[f"{key}.weight"].shape[2:4]
    padded = F.pad(x, (k // 2, k // 2, k // 2, k // 2, kt - 1, 0))
    return F.conv3d(padded[None], p[f"{key}.weight"], p[f"{key}.bias"])[0]


def norm(p: Parameters, key: str, x: Tensor) -> Tensor:
    length = (x * x).sum(0, keepdim=True).sqrt().clamp_min(1e-12)
    return x / length * len(x) ** 0.5 * p[f"{key}.gamma"].reshape(-1, 1, 1, 1)


def residual(p: Parameters, key: str, x: Tensor) -> Tensor:
    y = conv(p, f"{key}.residual.2", F.silu(norm(p, f"{key}.residual.0", x)))
    y = conv(p, f"{key}.residual.6", F.silu(norm(p, f"{key}.residual.3", y)))
    return y + (conv(p, f"{key}.shortcut", x) if f"{key}.shortcut.weight" in p else x)


def attention(p: Parameters, key: str, x: Tensor) -> Tensor:
    def pointwise(name: str, x: Tensor) -> Tensor:
        return (
            torch.einsum("oc,ctn->otn", p[f"{key}.{name}.weight"][:, :, 0, 0], x)
            + p[f"{key}.{name}.bias"][:, None, None]
        )

    q, k, v = pointwise("to_qkv", norm(p, f"{key}.norm", x).flatten(2)).chunk(3)
    weights = (torch.einsum("ctn,ctm->tnm", q, k) / len(x) ** 0.5).softmax(-1)
    return x + pointwise("proj", torch.einsum("tnm,ctm->ctn", weights, v)).reshape(x.shape)


def middle(p: Parameters, key: str, x: Tensor) -> Tensor:
    return residual(p, f"{key}.2", attention(p, f"{key}.1", residual(p, f"{key}.0", x)))


def head(p: Parameters, key: str, x: Tensor) -> Tensor:
    return conv(p, f"{key}.2", F.silu(norm(p, f"{key}.0", x)))


def downsample(p: Parameters, key: str, x: Tensor) -> Tensor:
    w, b = p[f"{key}.resample.1.weight"], p[f"{key}.resample.1.bias"]
    x = F.conv2d(F.pad(x.transpose(0, 1), (0, 1, 0, 1)), w, b, stride=2).transpose(0, 1)
    if f"{key}.time_conv.weight" not in p:
        return x
    w, b = p[f"{key}.time_conv.weight"], p[f"{key}.time_conv.bias"]
    later = [F.conv3d(x[None, :, 2 * j - 2 : 2 * j + 1], w, b)[0] for j in range(1, (x.shape[1] + 1) // 2)]
    return torch.cat([x[:, :1], *later], 1)


def upsample(p: Parameters, key: str, x: Tensor) -> Tensor:
    if f"{key}.time_conv.weight" in p:
        frames = [x[:, 0]]
        for pair in conv(p, f"{key}.time_conv", x[:, 1:]).unbind(1) if x.shape[1] > 1 else ():
            frames += [pair[: len(x)], pair[len(x) :]]
        x = torch.stack(frames, 1)
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    w, b = p[f"{key}.resample.1.weight"], p[f"{key}.resample.1.bias"]
    return F.conv2d(x.transpose(0, 1), w, b, padding=1).transpose(0, 1)


def layers(p: Parameters, key: str, x: Tensor) -> Tensor:
    for i in range(1 + max(int(name.split(".")[2]) for name in p if name.startswith(key))):
        if f"{key}.{i}.residual.0.gamma" in p:
            x = residual(p, f"{key}.{i}", x)
        else:
            x = (downsample if "down" in key else upsample)(p, f"{key}.{i}", x)
    return x


def statistics(config: VAEConfig) -> tuple[Tensor, Tensor]:
    shape = (config.z_dim, 1, 1, 1)
    return torch.tensor(config.latent_mean).double().view(shape), torch.tensor(config.latent_std).double().view(shape)


def encode_whole(p: Parameters, config: VAEConfig, frames: Tensor) -> Tensor:
    x = layers(p, "encoder.downsamples", conv(p, "encoder.conv1", frames.transpose(0, 1)))
    x = conv(p, "conv1", head(p, "encoder.head", middle(p, "encoder.middle", x)))
    mean, std = statistics(config)
    return ((x[: config.z_dim] - mean) / std).transpose(0, 1)


def decode_whole(p: Parameters, config: VAEConfig, latents: Tensor) -> Tensor:
    mean, std = statistics(config)
    x = conv(p, "decoder.conv1", conv(p, "conv2", latents.transpose(0, 1) * std + mean))
    x = head(p, "decoder.head", layers(p, "decoder.upsamples", middle(p, "decoder.middle", x)))
    return x.clamp(-1, 1).transpose(0, 1)


def random_vae(seed: int, z_dim: int = 4, **values: Any) -> VAE:
    """A float64 VAE whose norms and biases matter as well."""
    torch.manual_seed(seed)
    mean, std = torch.randn(z_dim).tolist(), (torch.rand(z_dim) + 0.5).tolist()
    vae = VAE(VAEConfig(z_dim=z_dim, latent_mean=tuple(mean), latent_std=tuple(std), **values)).double()
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
    return vae


CONFIGS = st.fixed_dictionaries(
    {
        "dim": st.sampled_from([4, 6]),
        "z_dim": st.integers(2, 4),
        "num_res_blocks": st.integers(1, 2),
    }
).flatmap(
    lambda sizes: st.sampled_from(
        [
            {"dim_mult": (1, 2, 4, 4), "temperal_downsample": (False, True, True)},
            {"dim_mult": (1, 2, 2), "temperal_downsample": (True, False)},
            {"dim_mult": (2, 1), "temperal_downsample": (True,)},
            {"dim_mult": (1, 3), "temperal_downsample": (False,)},
        ]
    ).map(lambda shape: sizes | shape)
)


@settings(deadline=None, max_examples=20)
@given(CONFIGS, st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_steps_equal_the_whole_clip(values, groups, rows, columns, seed):
    vae = random_vae(seed, **values)
    config, p = vae.config, vae.state_dict()
    stride = config.spatial_stride
    frames = torch.rand(1 + config.temporal_stride * groups, 3, stride * rows, stride * columns).double() * 2 - 1
    latents = torch.cat(list(vae.encode(frames)))
    torch.testing.assert_close(latents, encode_whole(p, config, frames), rtol=1e-6, atol=1e-6)

    latents = torch.randn(1 + groups, config.z_dim, rows, columns).double()
    steps = list(vae.decode(latents))
    assert [len(step) for step in steps] == [1] + [config.temporal_stride] * groups
    torch.testing.assert_close(torch.cat(steps), decode_whole(p, config, latents), rtol=1e-6, atol=1e-6)


def test_keys_and_shapes_are_official():
    expected = json.loads((Path(__file__).parents[1] / "golden/checkpoint_keys.json").read_text())["vae"]["keys"]
    with torch.device("meta"):
        state = VAE(VAEConfig()).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == expected


def test_golden_numbers(request):
    golden = request.config.getoption("--golden")
    vae = VAE(from_official(VAEConfig, json.loads((golden / "vae_decode.json").read_text())["config"]["vae"]))
    vae.load_state_dict(load_file(golden / "weights_vae.safetensors"))
    case = load_file(golden / "vae_encode.safetensors")
    frames = case["in.video"][0].transpose(0, 1)
    for count, name in ((len(frames), "out.latent"), (1, "out.latent_single_frame")):
        latents = torch.cat(list(vae.encode(frames[:count]))).transpose(0, 1)
        torch.testing.assert_close(latents, case[name], rtol=0, atol=1e-4)
    case = load_file(golden / "vae_decode.safetensors")
    latents = case["in.latent"].transpose(0, 1)
    for count, name in ((len(latents), "out.video"), (1, "out.video_single_frame")):
        video = torch.cat(list(vae.decode(latents[:count]))).transpose(0, 1)[None]
        torch.testing.assert_close(video, case[name], rtol=0, atol=1e-4)


def test_same_state_same_result_and_state_unchanged():
    vae = random_vae(1, dim=4)
    for step, first, later in (
        (vae.encode_step, torch.rand(1, 3, 16, 24).double(), torch.rand(4, 3, 16, 24).double()),
        (vae.decode_step, torch.randn(1, 4, 2, 3).double(), torch.randn(1, 4, 2, 3).double()),
    ):
        _, state = step(first)
        for _ in range(3):  # the first steps differ from all later ones
            kept = [leaf.clone() for leaf in tree_leaves(state)]
            (once, after), (again, after_again) = step(later, state), step(later, state)
            assert torch.equal(once, again)
            assert all(map(torch.equal, tree_leaves(after), tree_leaves(after_again)))
            assert all(map(torch.equal, tree_leaves(state), kept))
            state = after


def test_state_holds_no_input():
    vae = random_vae(2, dim=4)
    first, later = torch.rand(1, 3, 16, 16).double(), torch.rand(4, 3, 16, 16).double()
    _, state = vae.encode_step(first)
    _, state = vae.encode_step(later, state)
    kept = [leaf.clone() for leaf in tree_leaves(state)]
    first.zero_()
    later.zero_()
    assert all(map(torch.equal, tree_leaves(state), kept))
    assert not any(leaf.requires_grad for leaf in tree_leaves(state))


def test_state_is_as_small_as_the_convolutions_reach():
    vae = random_vae(3, dim=4)
    _, state = vae.decode_step(torch.randn(1, 4, 2, 2).double())
    for _ in range(2):
        _, state = vae.decode_step(torch.randn(1, 4, 2, 2).double(), state)
    leaves = tree_leaves(state)
    assert len(leaves) == 32
    assert all(len(leaf) == 2 and leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in leaves)


def test_interleaved_clips_do_not_meet():
    vae = random_vae(4, dim=4)
    clips = torch.randn(2, 3, 4, 2, 2).double()
    pairs = list(zip(*map(vae.decode, clips), strict=True))
    for clip, steps in zip(clips, zip(*pairs, strict=True), strict=True):
        assert torch.equal(torch.cat(steps), torch.cat(list(vae.decode(clip))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_and_dtype(dtype, monkeypatch):
    torch.manual_seed(5)
    vae = VAE(VAEConfig(dim=8)).to(dtype)
    seen = []

    def check(module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        seen.append(x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last))

    def checked(function):
        def call(*arguments, **more):
            output = function(*arguments, **more)
            check(function, arguments, output)
            return output

        return call

    for module in vae.modules():
        if not isinstance(module, VAE):
            module.register_forward_hook(check)
    for name in ("pixel_norm", "conv3d", "causal_conv3d"):
        monkeypatch.setattr(f"model.vae.{name}", checked(getattr(model.vae, name)))
    state = None
    for latent in torch.randn(3, 16, 2, 3).to(dtype).split(1):
        frames, state = vae.decode_step(latent, state)
        assert frames.dtype == dtype
        assert frames.is_contiguous(memory_format=torch.channels_last)
        assert frames.abs().max() <= 1
    list(vae.encode(torch.rand(9, 3, 16, 24).to(dtype)))
    assert all(leaf.is_contiguous(memory_format=torch.channels_last) for leaf in tree_leaves(state))
    assert len(seen) > 400
    assert all(seen)


def test_bfloat16_stays_close():
    torch.manual_seed(6)
    vae = VAE(VAEConfig(dim=8))
    latents = torch.randn(3, 16, 3, 2)
    expected = torch.cat(list(vae.decode(latents)))
    video = torch.cat(list(vae.to(torch.bfloat16).decode(latents.bfloat16())))
    assert torch.linalg.vector_norm(video - expected) < 0.05 * torch.linalg.vector_norm(expected)


def test_says_what_is_wrong():
    vae = VAE(VAEConfig(dim=2))
    _, state = vae.encode_step(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"frames: shape \[4, 3, 8, 8\], wanted \[1, 3, height, width\]"):
        vae.encode_step(torch.zeros(4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"frames: shape \[1, 3, 8, 8\], wanted \[4, 3, height, width\]"):
        vae.encode_step(torch.zeros(1, 3, 8, 8), state)
    with pytest.raises(ValueError, match=r"frames: shape \[1, 3, 8, 12\], .* multiples of 8"):
        vae.encode_step(torch.zeros(1, 3, 8, 12))
    with pytest.raises(ValueError, match=r"frames: 3 of them, wanted 1 \+ a multiple of 4"):
        next(vae.encode(torch.zeros(3, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"latent: shape \[2, 16, 1, 1\], wanted \[1, 16, rows, columns\]"):
        vae.decode_step(torch.zeros(2, 16, 1, 1))
    with pytest.raises(ValueError, match=r"frames: dtype torch.float64, wanted the parameters', torch.float32"):
        vae.encode_step(torch.zeros(1, 3, 8, 8).double())
    with pytest.raises(ValueError, match=r"latent: dtype torch.float64, wanted the parameters', torch.float32"):
        vae.decode_step(torch.zeros(1, 16, 1, 1).double())


def test_another_layout_of_weights_changes_nothing():
    torch.manual_seed(0)
    vae, latents = VAE(VAEConfig(dim=4)).double(), torch.randn(2, 16, 2, 3).double()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    video = torch.cat(list(vae.decode(latents)))
    vae.lay_out()
    assert vae.decoder.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert all(torch.equal(before[name], tensor) for name, tensor in vae.state_dict().items())
    torch.testing.assert_close(torch.cat(list(vae.decode(latents))), video, rtol=1e-9, atol=1e-9)
