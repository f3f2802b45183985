"""The student in FP8 on the golden cases, against float32: blocks, the whole, and with channels that stick out.

An e4m3 number is exact to 4 bits, 2.6 % in the mean, a product of two 3.7 %. The golden student's residual stream is
what its blocks add to it and hardly anything else (deviation 0.1 before the first block, 2.6 after it), so that the
errors of its layers count in full: 7 to 8 % of a block's output, 6 % of the student's. The goals, 3 % and 5 %, hold
where the stream outweighs what a block adds to it three to four times.
"""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn import Module

from model.config import PRECISIONS, FP8Policy
from model.dit import Block, DiT, resize_masks, rope_table
from tests.parity.cases import Case, frames_first

GOLDEN = Path(__file__).parents[1] / "golden"
Outputs = list[Tensor]  # of each block, and of the whole


def forward(case: Case, dit: DiT) -> Outputs:
    outputs: Outputs = []

    def note(_block: Module, _inputs: object, output: Tensor) -> None:
        outputs.append(output)

    hooks = [block.register_forward_hook(note) for block in dit.blocks]
    latent = frames_first(case["in.latent"])
    _, p, q = dit.config.patch_size
    grid = (latent.shape[0], latent.shape[2] // p, latent.shape[3] // q)
    masks = resize_masks(case["in.ref_target_masks"], grid) if "in.ref_target_masks" in case.tensors else None
    context = dit.embed_context(case["in.context"], case["in.clip_fea"][0])
    rope, audio = rope_table(grid, dit.config.head_dim), dit.embed_audio(case["in.audio"])
    modulation, condition = dit.modulate(case["in.t"].item()), frames_first(case["in.y"])
    outputs.append(dit(latent, condition, modulation, rope, context, audio, masks))
    for hook in hooks:
        hook.remove()
    return outputs


def errors(got: Outputs, want: Outputs) -> list[float]:
    return [float((x.float() - y).norm() / y.norm()) for x, y in zip(got, want, strict=True)]


def quantised(case: Case, precision: str, change: Callable[[DiT], object] = id) -> DiT:
    dit = case.dit()
    change(dit)
    policy = PRECISIONS[precision].fp8
    assert policy is not None
    dit.quantize(policy)
    if PRECISIONS[precision].fp8_attention:
        dit.use_fp8_attention()
    return dit


def bulge(dit: DiT) -> None:
    """Channels of a norm's output that are 25 times as large as the others, and rows of weights that are 10 times."""
    torch.manual_seed(0)
    for block in cast(list[Block], list(dit.blocks)):
        channels = torch.randperm(dit.config.dim)[:3]
        block.modulation.data[0, 1, channels] += 25
        block.modulation.data[0, 4, channels] += 25
        block.norm3.weight.data[channels] *= 25
        for layer in (block.self_attn.qkv, block.ffn.up, block.cross_attn.q):
            layer.weight.data[torch.randperm(len(layer.weight))[:3]] *= 10
            layer.weight.data[:, channels] /= 25  # what trained networks do with them


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "precision", "block", "whole"),
    [
        ("dit_forward", "fp8", 8e-2, 6.1e-2),
        ("dit_forward", "fp8-attn", 9e-2, 6.6e-2),
        # Small differences decide who speaks where: at the end below 13 % on one CPU, 13.04 % on another (Intel Xeon).
        ("dit_forward_two_people", "fp8", 15e-2, 13.5e-2),
    ],
)
def test_the_golden_student(name: str, precision: str, block: float, whole: float) -> None:
    case = Case(GOLDEN / f"{name}.json")
    *blocks, end = errors(forward(case, quantised(case, precision)), forward(case, case.dit()))
    assert 1e-2 < max(blocks) < block
    assert 1e-2 < end < whole


@torch.inference_mode()
@pytest.mark.parametrize("precision", ["fp8", "fp8-attn"])
def test_channels_that_stick_out(precision: str) -> None:
    case = Case(GOLDEN / "dit_forward.json")
    plain = case.dit()
    bulge(plain)
    *blocks, end = errors(forward(case, quantised(case, precision, bulge)), forward(case, plain))
    assert max(blocks) < 11e-2
    assert end < 8e-2


@torch.inference_mode()
def test_a_stream_that_outweighs_its_branches() -> None:
    """By 3.6 times: then the goals of 3 % and 5 % hold."""
    case = Case(GOLDEN / "dit_forward.json")

    def enlarge(dit: DiT) -> None:
        dit.patch_embedding.weight.data *= 100
        cast(Tensor, dit.patch_embedding.bias).data *= 100

    plain = case.dit()
    enlarge(plain)
    *blocks, end = errors(forward(case, quantised(case, "fp8", enlarge)), forward(case, plain))
    assert max(blocks) < 3e-2
    assert end < 5e-2


LAYERS = FP8Policy().layers


@torch.inference_mode()
@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_costs_much_more_than_its_rounding(layer: str) -> None:
    """Which of the layers costs what, one at a time: queries, keys and values most."""
    case = Case(GOLDEN / "dit_forward.json")
    dit = case.dit()
    dit.quantize(FP8Policy((layer,)))
    *blocks, end = errors(forward(case, dit), forward(case, case.dit()))
    bound = 5.5e-2 if layer.endswith("qkv") else 3.3e-2
    assert max(blocks) < bound
    assert end < 4.2e-2
