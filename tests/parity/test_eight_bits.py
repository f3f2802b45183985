"""The student in FP8 and INT8 against float32 on the golden cases: blocks, the whole student, and outlier channels.

An e4m3 number has 4 significant bits: its mean rounding error is 2.6 %, and that of a product of two is 3.7 %. A
product of two rotated int8 rows is 1.4 % off. The golden student has random weights, so its residual stream consists
almost only of its blocks' updates (standard deviation 0.1 before the first block, 2.6 after it), and errors of layers
count in full. In FP8 they are 7 to 8 % of a block's output and 6 % of the student's. In INT8 they are 2.4 and 1.8 %,
which is within the goals of 3 % and 5 %. FP8 is within them where the residual stream is three to four times as large
as a block's update.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import Module

from kernels.chunk_attention_fp8 import bounded_reference
from kernels.layer_norm import quantize_rows
from kernels.text_image_attention import text_image_bounded_reference
from model.block import AudioKV, Block
from model.config import PRECISIONS, FP8Policy, INT8Policy
from model.dit import DiT, resize_masks
from model.linear import QuantizedRows
from model.rope import rope_table
from tests.parity.cases import Case, frames_first

GOLDEN = Path(__file__).parents[1] / "golden"
Outputs = list[Tensor]  # outputs of each block and of the whole student


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
    policy = PRECISIONS[precision].eight_bits
    assert policy is not None
    dit.quantize(policy)
    if PRECISIONS[precision].fp8_attention:
        dit.use_fp8_attention()
    return dit


def add_outliers(dit: DiT) -> None:
    """Makes some channels of norm outputs 25 times as large, and some rows of weights 10 times."""
    torch.manual_seed(0)
    for block in cast(list[Block], list(dit.blocks)):
        channels = torch.randperm(dit.config.dim)[:3]
        block.modulation.data[0, 1, channels] += 25
        block.modulation.data[0, 4, channels] += 25
        block.norm3.weight.data[channels] *= 25
        for layer in (block.self_attn.qkv, block.ffn.up, block.cross_attn.q):
            layer.weight.data[torch.randperm(len(layer.weight))[:3]] *= 10
            layer.weight.data[:, channels] /= 25  # as trained networks have it


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "precision", "block", "whole"),
    [
        ("dit_forward", "fp8", 8e-2, 6.1e-2),
        ("dit_forward", "fp8-attn", 9e-2, 6.6e-2),
        # Small differences decide which speaker a token belongs to: below 13 % on one CPU, 13.04 % on an Intel Xeon.
        ("dit_forward_two_people", "fp8", 15e-2, 13.5e-2),
        ("dit_forward", "int8", 3e-2, 2.2e-2),
        ("dit_forward_two_people", "int8", 11e-2, 10e-2),
    ],
)
def test_the_golden_student(name: str, precision: str, block: float, whole: float) -> None:
    case = Case(GOLDEN / f"{name}.json")
    *blocks, end = errors(forward(case, quantised(case, precision)), forward(case, case.dit()))
    assert 1e-2 < max(blocks) < block
    assert 1e-2 < end < whole


@torch.inference_mode()
@pytest.mark.parametrize(
    ("precision", "block", "whole"), [("fp8", 11e-2, 8e-2), ("fp8-attn", 11e-2, 8e-2), ("int8", 4e-2, 3.2e-2)]
)
def test_outlier_channels(precision: str, block: float, whole: float) -> None:
    case = Case(GOLDEN / "dit_forward.json")
    plain = case.dit()
    add_outliers(plain)
    *blocks, end = errors(forward(case, quantised(case, precision, add_outliers)), forward(case, plain))
    assert max(blocks) < block
    assert end < whole


@torch.inference_mode()
@pytest.mark.parametrize("change", [id, add_outliers], ids=["", "outliers"])
def test_scales_of_attention_from_bounds(change: Callable[[DiT], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of attention rounded in its epilogue, with scales known beforehand, cost no more than with one by row."""
    case = Case(GOLDEN / "dit_forward.json")
    plain = case.dit()
    change(plain)
    expected = forward(case, plain)
    by_row = errors(forward(case, quantised(case, "fp8-attn", change)), expected)
    monkeypatch.setattr("model.block.chunk_attention_fp8_quantized", bounded_reference)
    monkeypatch.setattr("model.block.text_image_attention_quantized", text_image_bounded_reference)
    bounded = errors(forward(case, quantised(case, "fp8-attn", change)), expected)
    assert bounded != by_row
    for ours, today in zip(bounded, by_row, strict=True):
        assert ours < 1.03 * today


@torch.inference_mode()
def test_a_residual_stream_larger_than_its_updates() -> None:
    """3.6 times as large: then the goals of 3 % and 5 % hold."""
    case = Case(GOLDEN / "dit_forward.json")

    def enlarge(dit: DiT) -> None:
        dit.patch_embedding.weight.data *= 100
        cast(Tensor, dit.patch_embedding.bias).data *= 100

    plain = case.dit()
    enlarge(plain)
    *blocks, end = errors(forward(case, quantised(case, "fp8", enlarge)), forward(case, plain))
    assert max(blocks) < 3e-2
    assert end < 5e-2


@torch.inference_mode()
@pytest.mark.parametrize(
    ("policy", "layer"), [(policy, layer) for policy in (FP8Policy, INT8Policy) for layer in policy().layers]
)
def test_error_of_each_kind_of_layer(policy: type[FP8Policy | INT8Policy], layer: str) -> None:
    """One kind of layer at a time in 8 bits. Queries, keys and values have the largest error."""
    case = Case(GOLDEN / "dit_forward.json")
    dit = case.dit()
    dit.quantize(policy((layer,)))
    *blocks, end = errors(forward(case, dit), forward(case, case.dit()))
    if policy is INT8Policy:
        assert max(blocks) < 1.6e-2
        assert end < 1.2e-2
    else:
        assert max(blocks) < (5.5e-2 if layer.endswith("qkv") else 3.3e-2)
        assert end < 4.2e-2


@torch.inference_mode()
@pytest.mark.parametrize(("e4m3", "low", "high"), [(False, 3e-2, 5e-2), (True, 5e-2, 8e-2)])
def test_error_of_the_audio_layer(e4m3: bool, low: float, high: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its output alone, for what the float32 student gives it: with e4m3 weights, and wholly in e4m3.

    4.7 and 7.7 %. The golden keys have next to nothing in common, which is the worst case of the e4m3 form.
    """
    case = Case(GOLDEN / "dit_forward.json")
    exact, rounded = case.dit(), quantised(case, "fp8")
    given: list[tuple[Any, ...]] = []
    hooks = [
        cast(Block, block).audio_cross_attn.register_forward_pre_hook(lambda _, args: given.append(args))
        for block in exact.blocks
    ]
    forward(case, exact)
    for hook in hooks:
        hook.remove()
    monkeypatch.setattr("model.block.is_tuned", lambda *_: e4m3)
    audio, found = exact.embed_audio(case["in.audio"]), []
    for i, (h, x, absorbed, tokens_per_frame, *rest) in enumerate(given):
        layers = (cast(Block, dit.blocks[i]).audio_cross_attn for dit in (exact, rounded))
        alone, sizes = torch.zeros_like(x), (tokens_per_frame, *rest)
        want = next(layers)(h, alone, absorbed, *sizes)
        layer = next(layers)
        got = layer(
            QuantizedRows(*quantize_rows(h)) if e4m3 else h, alone,
            layer.absorb(AudioKV(audio.k[i], audio.v[i]), tokens_per_frame), *sizes,
        )  # fmt: skip
        found.append(float((got - want).norm() / want.norm()))
    assert low < max(found) < high
