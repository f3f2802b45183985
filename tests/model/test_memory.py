"""GPU memory of the 14B system, counted without a GPU on fake tensors, and the plan that is held to that count.

Memory that operations allocate inside, such as workspaces of convolutions, is not counted; the plan is held to the peak
of the committed run on an H100 as well.
"""

import importlib
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.rms_norm_silu import rms_norm_silu
from model.audio import SpeechEncoder
from model.block import AudioKV, ContextKV
from model.config import FLASHTALK_14B, PRECISIONS, TINY, Config
from model.dit import DiT, Modulation
from model.errors import UserError
from model.memory import (
    GRAPHS_FACTOR,
    LAUNCHED_FACTOR,
    Card,
    Fit,
    all_fits,
    card_of,
    fit_precision,
    memory_plan,
    require_fp8,
)
from model.offload import on_device
from model.rope import rope_table
from model.vae import VAE, State, decode_schedule
from streaming.fitting import choose_fit

conv = importlib.import_module("kernels.causal_conv3d")  # the module; `kernels.causal_conv3d` is its function

GIB = 2**30
CONFIG = FLASHTALK_14B
H100_CHUNK = Path(__file__).parents[2] / "profiling" / "results" / "2026-11-27-h100-chunk.json"
A100, ADA = Card("A100", (8, 0), 79 * GIB), Card("RTX 4090", (8, 9), 23 * GIB)


class Live(TorchDispatchMode):
    """Counts the bytes of live tensors that were created or used while this mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def conv_then_norm(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, past: Tensor, scale: Tensor | None,
    out_scale: float | None, tail: Tensor | None,
) -> Tensor:  # fmt: skip
    """What runs inside the operation unless a table says "fused"; outside of it, it is counted."""
    return rms_norm_silu(conv.causal_conv3d_op(x, weight, bias, past, None, scale), gamma, True, out_scale, tail)


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


@pytest.fixture(scope="module")
def counted() -> dict[str, int]:
    """Bytes by purpose, of the student with FP8 attention and of the other networks."""
    return count(CONFIG, "fp8-attn")


def count(config: Config, name: str) -> dict[str, int]:
    """Bytes by purpose of a system in a precision: of parameters, and at the peak of what runs in a chunk."""
    dit, chunk, precision = config.dit, config.chunk, PRECISIONS[name]
    frames, channels, rows, columns = config.latent_shape
    found = {}
    default = torch.get_default_dtype()
    try:
        with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), torch.inference_mode():
            patch.setattr(conv, "_conv3d_stacked", conv._conv3d_library)  # what runs on a GPU
            patch.setattr(conv, "causal_conv3d_norm_op", conv_then_norm)
            found["speech"] = parameters(SpeechEncoder(config.audio))
            torch.set_default_dtype(precision.dit)
            student, vae = DiT(dit), VAE(config.vae)
            if precision.eight_bits is not None:
                student.quantize(precision.eight_bits)
            if precision.fp8_attention:
                student.use_fp8_attention()
            found["offloaded"] = parameters(*student.offloadable_modules().values())
            found["student"] = parameters(student) - found["offloaded"]
            found["vae"] = parameters(vae)

            def keys(*counts: int) -> Tensor:
                return torch.empty(dit.num_layers, *counts, dit.num_heads, dit.head_dim)

            num_text_tokens = torch.empty(1, dtype=torch.int32)
            context = ContextKV(
                *(keys(n) for n in (dit.text_len, dit.text_len, dit.img_tokens, dit.img_tokens)),
                num_text_tokens=num_text_tokens,
                o_bound=torch.empty(dit.num_layers).float(),
            )
            audio = AudioKV(*(keys(frames, dit.context_tokens) for _ in range(2)))
            found["keys and values"] = sum(x.nbytes for x in (*context, *audio))
            vectors = torch.empty(dit.num_layers, 6, dit.dim).float(), torch.empty(2, dit.dim).float()
            rope = rope_table(config.grid, dit.head_dim)
            condition = torch.empty(frames, dit.in_dim - channels, rows, columns)
            student.blocks = student.blocks[:2]  # the others run after these in the same memory
            latents = torch.empty(config.latent_shape).float()

            def denoise() -> object:
                return student(latents, condition, Modulation(*vectors), rope, context, audio, num_motion_latents=2)

            found["denoise"] = peak(denoise) - found["keys and values"]  # they are counted there as well
            latent = torch.empty(frames, channels, rows, columns)
            found["decode"] = peak(lambda: decode(vae, latent)) - parameters(vae.decoder)
            found["decoder's state"] = sum(x.nbytes for x in tree_leaves(decode(vae, latent)))
            motion = torch.empty(chunk.motion_frames_num, 3, chunk.height, chunk.width)
            found["motion"] = peak(lambda: [len(x) for x in vae.encode(motion)]) - parameters(vae.encoder)
    finally:
        torch.set_default_dtype(default)
    return found


def decode(vae: VAE, latents: Tensor) -> State | None:
    """Decodes as the chunk loop does: at most two latents per step."""
    state = None
    for step in decode_schedule(len(latents), 0, vae.config.temporal_stride):
        _, state = vae.decode_step(latents[step.latents], state)
    return state


def peak(run: Callable[[], object]) -> int:
    with Live() as live:
        run()
    return live.peak


def test_weights_and_a_whole_chunk_take_less_than_20_gib(counted: dict[str, int]) -> None:
    stay = sum(counted[name] for name in ("student", "vae", "speech", "keys and values"))
    assert stay + max(counted[name] for name in ("denoise", "decode", "motion")) < 18 * GIB
    # With CUDA graphs, student and VAE have separate memory pools, and results that pass between stages stay allocated.
    coder = max(counted["decode"], counted["decoder's state"] + counted["motion"])
    assert stay + counted["denoise"] + coder < 20 * GIB


def test_where_the_memory_is(counted: dict[str, int]) -> None:
    """The numbers in the documentation, in GiB, counted in eager mode."""
    assert {name: round(size / GIB, 1) for name, size in counted.items()} == {
        "speech": 0.4,
        "offloaded": 8.3,
        "student": 13.8,
        "vae": 0.2,
        "keys and values": 0.8,
        "denoise": 1.1,  # 0.2 of them what is absorbed of a block's audio, if not once a chunk
        "decoder's state": 1.5,
        "decode": 2.6,  # at most 3 GiB beyond the weights are asked for
        "motion": 1.8,
    }


def test_int8_takes_two_gib_more_than_fp8_for_its_audio_layers(counted: dict[str, int]) -> None:
    policy = PRECISIONS["int8"].eight_bits
    assert policy is not None
    default = torch.get_default_dtype()
    torch.set_default_dtype(PRECISIONS["int8"].dit)
    try:
        with torch.device("meta"):
            student = DiT(CONFIG.dit)
            student.quantize(policy)
    finally:
        torch.set_default_dtype(default)
    size = parameters(student) - parameters(*student.offloadable_modules().values())
    assert round(size / GIB, 1) == 15.8
    projections = 2 * CONFIG.dit.num_layers * CONFIG.dit.dim**2  # one byte more for each weight
    assert math.isclose(size - counted["student"], projections, rel_tol=1e-2)


def test_e4m3_weights_are_nearly_all_of_the_student(counted: dict[str, int]) -> None:
    dim, wide = CONFIG.dit.dim, CONFIG.dit.ffn_dim
    products = CONFIG.dit.num_layers * (8 * dim * dim + 2 * dim * wide)
    assert 0.9 < products / counted["student"] < 1
    assert math.isclose(products, 14.05e9, rel_tol=1e-2)


def test_offloaded_modules_are_restored_after_an_exception() -> None:
    layer, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
    before = [*layer.parameters(), *norm.parameters(), *norm.buffers()]

    def fail() -> None:
        with torch.inference_mode(), on_device(torch.device("meta"), layer, norm):
            assert all(x.is_meta for x in (*layer.parameters(), *norm.buffers()))
            assert layer(torch.ones(2, 4, device="meta")).shape == (2, 4)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    after = [*layer.parameters(), *norm.parameters(), *norm.buffers()]
    assert all(x is y for x, y in zip(before, after, strict=True))


@pytest.mark.gpu
def test_gpu_on_device_frees_its_memory() -> None:
    layer, x = nn.Linear(1024, 1024), torch.randn(2, 1024)
    want, before = layer(x), torch.cuda.memory_allocated()
    with torch.inference_mode(), on_device(torch.device("cuda"), layer):
        torch.testing.assert_close(layer(x.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)
    assert torch.cuda.memory_allocated() == before


# --- The plan -------------------------------------------------------------------------------------------------------


def resized(width: int, height: int, config: Config = CONFIG) -> Config:
    return replace(config, chunk=replace(config.chunk, width=width, height=height))


SHALLOW = replace(CONFIG, dit=replace(CONFIG.dit, num_layers=3))


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        (CONFIG, "fp8-attn"),
        (SHALLOW, "int8"),
        (resized(320, 256, SHALLOW), "fp8"),
        (resized(704, 1024, SHALLOW), "bf16"),
    ],
    ids=["fp8-attn", "int8", "small", "large"],
)
def test_the_plan_is_what_runs(config: Config, precision: str, counted: dict[str, int]) -> None:
    """Weights to the byte; a chunk's tensors, of which the fakes of the absorption make more than kernels do."""
    found = counted if (config, precision) == (CONFIG, "fp8-attn") else count(config, precision)
    launched, graphs = (memory_plan(config, PRECISIONS[precision], graphs) for graphs in (False, True))
    assert launched.weights == found["student"] + found["vae"] + found["speech"]
    assert math.isclose(launched.keys_values, found["keys and values"], rel_tol=1e-5)  # which has counters too
    coder = max(found["decode"], found["decoder's state"] + found["motion"])
    assert 0.95 < launched.chunk / LAUNCHED_FACTOR / (found["denoise"] + found["decode"]) < 1.25
    assert 0.95 < graphs.chunk / GRAPHS_FACTOR / (found["denoise"] + coder) < 1.25
    assert 1 <= launched.portrait / LAUNCHED_FACTOR / found["motion"] < 1.5


@pytest.mark.parametrize("graphs", [False, True])
def test_pairs_of_caches_are_counted(graphs: bool) -> None:
    """The plan for the 14B picture grows by what the decoder's second buffers take."""
    precision = PRECISIONS["fp32"]
    one, two = (memory_plan(CONFIG, precision, graphs, paired=paired) for paired in (False, True))
    with FakeTensorMode(), torch.inference_mode():
        vae, latents = VAE(CONFIG.vae), torch.empty(2, *CONFIG.latent_shape[1:])
        caches = sum(x.nbytes for x in tree_leaves(decode(vae, latents)))
        vae.pair_caches()
        more = sum(x.nbytes for x in tree_leaves(decode(vae, latents))) - caches
    assert round(more / 1e9, 1) == 3.2  # in float32; of 16 bits half
    assert math.isclose((two.chunk - one.chunk) / (GRAPHS_FACTOR if graphs else LAUNCHED_FACTOR), more, rel_tol=0.02)
    assert (two.weights, two.keys_values) == (one.weights, one.keys_values)


def test_a_card_whose_table_names_pairs_has_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(card: Card) -> Fit:
        fit = next(fit for fit in all_fits(CONFIG, card) if fit.precision == "fp8-vae")
        assert choose_fit(CONFIG, "fp8-vae", None, None, card, random_weights=False)[0] == fit
        return fit

    card = Card("NVIDIA H100 80GB HBM3", (9, 0), 78 * GIB)
    before = found(card)
    monkeypatch.setattr("model.vae.tail_is_tuned", lambda *_: True)
    assert round((found(card).plan.chunk - before.plan.chunk) / GRAPHS_FACTOR / GIB, 1) == 1.5
    assert before.spare - found(card).spare == found(card).plan.chunk - before.plan.chunk


def test_the_plan_reaches_the_peak_that_an_h100_had() -> None:
    """In that run the speech encoder was that of the preset tiny."""
    measured = {v["variant"]: v for v in json.loads(H100_CHUNK.read_text())["variants"]}["fp8-vae"]
    plan = memory_plan(replace(CONFIG, audio=TINY.audio), PRECISIONS["fp8-vae"], graphs=True)
    assert 1 <= plan.running / measured["peak_bytes"] < 1.02
    assert math.isclose(plan.weights, measured["weights_bytes"], rel_tol=0.02)


def test_24_gb_take_any_prompt_because_the_text_encoder_runs_on_the_cpu() -> None:
    plan = memory_plan(CONFIG, PRECISIONS["fp8-vae"], graphs=False)
    assert round(plan.text / GIB, 1) == 10.6
    assert plan.peak(text_on_card=False) < 22 * GIB < 23 * GIB < plan.peak(text_on_card=True)
    found = fit_precision(CONFIG, "fp8-vae", (True, False), ADA.free)
    assert found is not None
    assert (found.graphs, found.text_on_card) == (False, False)


def test_what_fits_where() -> None:
    def on(card: Card) -> dict[str, tuple[bool, bool]]:
        return {found.precision: (found.graphs, found.text_on_card) for found in all_fits(CONFIG, card)}

    assert on(A100) == {"fp32": (True, False), "bf16": (True, True), "int8": (True, True)}, "FP8 needs another card"
    assert set(on(ADA)) == {"fp8", "fp8-attn", "fp8-vae", "int8", "int8-vae"}
    assert on(replace(ADA, free=16 * GIB)) == {}
    assert set(on(replace(A100, free=160 * GIB))) == {"fp32", "bf16", "int8"}


@pytest.mark.parametrize(("free", "once"), [(23, False), (44, False), (78, True)])
def test_what_a_card_has_left_decides_whether_audio_is_absorbed_once_a_chunk(free: int, once: bool) -> None:
    """The results of 14B, twice, are 17.6 GiB: G and U of 40 blocks, 9 frames and 40 x 32 keys in bfloat16."""
    with torch.device("meta"):
        student = DiT(CONFIG.dit).to(torch.bfloat16)
    absorbed = 2 * student.absorbed_bytes(CONFIG.grid[0], math.prod(CONFIG.grid[1:]))
    assert absorbed == 2 * 40 * 9 * 1280 * (2 * 5120 * 2 + 4)
    found = fit_precision(CONFIG, "fp8-vae", (True, False), free * GIB)
    assert found is not None
    assert found.plan.peak(found.text_on_card) + found.spare == free * GIB
    assert (found.spare >= absorbed) == once


def test_a_larger_picture_and_random_weights_need_more() -> None:
    bf16 = PRECISIONS["bf16"]
    one = memory_plan(CONFIG, bf16, graphs=True)
    assert memory_plan(resized(704, 1024), bf16, graphs=True).chunk > 1.8 * one.chunk
    drawn = memory_plan(CONFIG, PRECISIONS["fp8"], graphs=False, random_weights=True)
    assert drawn.peak(text_on_card=False) == drawn.loading > 35 * GIB
    assert one.loading == 0


def test_fp8_wants_a_card_that_has_it() -> None:
    for precision in ("fp8", "fp8-attn", "fp8-vae", "int8-vae"):
        with pytest.raises(UserError, match=r"A100 \(compute capability 8.0\) has no FP8, which begins with 8.9"):
            require_fp8(precision, A100)
        require_fp8(precision, ADA)
    for precision in ("fp32", "bf16", "int8"):
        require_fp8(precision, A100)


def test_what_this_process_has_reserved_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "mem_get_info": (5 * GIB, 24 * GIB), "memory_reserved": 3 * GIB, "memory_allocated": 2 * GIB,
        "get_device_name": "NVIDIA GeForce RTX 4090", "get_device_capability": (8, 9),
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, answer=answer: answer)
    assert card_of(torch.device("cuda")) == Card("NVIDIA GeForce RTX 4090", (8, 9), 6 * GIB)
