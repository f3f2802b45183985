"""Cases of the whole VAE: decoding and encoding of a clip, step by step."""

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.config import VAEConfig
from model.vae import VAE
from profiling.cases.case import CUDA, FP8_LEVELS, Backend, Call, Dims, InputFactory, Operation
from profiling.official_baseline import official_baseline


def vae_of(config: VAEConfig, values: Tensor) -> VAE:
    """A VAE with random weights, taken from the normal `values`, whose layers keep the magnitude of their input."""
    with torch.device("meta"):
        vae = VAE(config)
    vae.to_empty(device=values.device).to(values.dtype)
    taken = 0
    for name, parameter in vae.named_parameters():
        own = values[taken : taken + parameter.numel()].view_as(parameter)
        taken += parameter.numel()
        if name.endswith("weight"):
            parameter.data = own * (parameter.numel() / len(parameter)) ** -0.5
        else:
            parameter.data = (1 if name.endswith("gamma") else 0) + 0.1 * own
    return vae


@cache
def vae_size(config: VAEConfig, half: str | None = None) -> int:
    """Number of parameters of a VAE, or of those that its decoder or encoder uses."""
    used = {None: "", "decode": ("conv2.", "decoder."), "encode": ("encoder.", "conv1.")}[half]
    with torch.device("meta"):
        return sum(parameter.numel() for name, parameter in VAE(config).named_parameters() if name.startswith(used))


@cache
def vae_flops(config: VAEConfig, half: str, frames: int, rows: int, columns: int) -> float:
    """FLOPs of the published code, which also multiplies zero frames and doubled images."""
    with torch.device("meta"), official_baseline(), FlopCounterMode(display=False) as counter:
        coded(half, VAE(config), torch.empty(frames, config.z_dim if half == "decode" else 3, rows, columns))
    return counter.get_total_flops()


def vae_bytes(config: VAEConfig, half: str, dims: Dims, item: int) -> float:
    """Bytes of latents, frames and weights, each moved once."""
    time, area = config.temporal_stride, config.spatial_stride**2
    count, size = dims["frames"], dims["rows"] * dims["columns"]
    if half == "decode":
        latents, frames = count * size, (1 + time * (count - 1)) * size * area
    else:
        latents, frames = (1 + (count - 1) // time) * size // area, count * size
    return item * (vae_size(config, half) + config.z_dim * latents + 3.0 * frames)


def coded(half: str, vae: VAE, x: Tensor) -> Tensor:
    """Decodes latents to frames, or encodes frames to latents, step by step."""
    return torch.cat(list(getattr(vae, half)(x)))


def whole_vae(config: VAEConfig, half: str) -> Operation:
    """`VAE.decode` or `VAE.encode` of a clip."""
    decodes = half == "decode"

    def inputs(d: Dims, randn: InputFactory) -> tuple[Tensor, Tensor]:
        x = randn(d["frames"], config.z_dim if decodes else 3, d["rows"], d["columns"])
        return x if decodes else (0.3 * x).clamp(-1, 1), randn(vae_size(config))

    def prepare_ours(levels: Sequence[int], x: Tensor, values: Tensor) -> Call:
        vae = vae_of(config, values)
        vae.prepare_weights()
        vae.quantize(levels)
        return partial(coded, half, vae, x)

    def as_published(vae: VAE, x: Tensor) -> Tensor:
        with official_baseline():
            return coded(half, vae, x)

    def reference(x: Tensor, values: Tensor) -> Tensor:
        return as_published(vae_of(config, values), x)

    @cache
    def compiled_vae(device: torch.device, dtype: torch.dtype) -> VAE:
        vae = VAE(config).to(device, dtype)
        (vae.decoder if decodes else vae.encoder).compile(dynamic=False)
        return vae

    def prepare_compiled(x: Tensor, values: Tensor) -> Call:
        # Compiling takes a minute: all sets of inputs share one module, which has the weights of the last set.
        vae = compiled_vae(x.device, x.dtype)
        vae.load_state_dict(vae_of(config, values).state_dict())
        return partial(as_published, vae, x)

    # Only the decoder has levels in FP8.
    in_fp8 = (Backend("ours-fp8", partial(prepare_ours, FP8_LEVELS), ours=True, devices=CUDA),) if decodes else ()
    return Operation(
        name=f"vae_{half}",
        inputs=inputs,
        reference=reference,
        flops=lambda d: vae_flops(config, half, d["frames"], d["rows"], d["columns"]),
        bytes=partial(vae_bytes, config, half),
        backends={
            dtype: (
                Backend("ours", partial(prepare_ours, ()), ours=True),
                *(in_fp8 if dtype == "bf16" else ()),
                Backend("published", lambda x, values: partial(as_published, vae_of(config, values), x)),
                Backend("published-compiled", prepare_compiled, devices=CUDA),
            )
            for dtype in ("fp32", "bf16")
        },
        # Twice the errors on a CPU: sixty layers in bf16 0.016 at width 32 and 0.0094 at 96, one level in FP8 0.036.
        tolerances={"bf16": 0.07 if decodes else 0.02},
    )
