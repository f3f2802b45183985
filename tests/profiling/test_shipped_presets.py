"""A preset that ships with weights runs on GPUs: its launchers take the shapes of a chunk, its kernels compile."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from triton.runtime.jit import JITFunction

from kernels.common import Op
from kernels.tuning import GPU, assume_gpu
from model.config import BUNDLED, PRESETS
from profiling.analyse.recipe import meta_models, record
from profiling.devices import of_target
from profiling.fake_gpu import FakeCudaMode, compiling_for

chunk_attention = import_module("kernels.chunk_attention")  # the package exports the function under this name
Call = tuple[Op, tuple[Any, ...]]


def calls_of_a_chunk(preset: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Every operation of kernels/ that a chunk calls, with its arguments on the meta device; equal calls once."""
    calls: dict[str, Call] = {}

    def call(op: Op, *args: Any) -> Any:
        calls[f"{op.name} {tree_map(described, args)}"] = op, args
        return op.library_op(*args)

    monkeypatch.setattr(Op, "__call__", call)
    record(meta_models(PRESETS[preset], precision))
    return list(calls.values())


def described(x: Any) -> Any:
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x


def on_gpu(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("preset", BUNDLED)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_launchers_take_the_shapes_of_a_chunk(preset: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled: what a launcher or a check refuses is refused before."""
    calls = calls_of_a_chunk(preset, precision, monkeypatch)
    launched: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel.__name__))
    monkeypatch.setattr(chunk_attention, "_sdpa_ranges", lambda *operands: operands[0])
    for device in map(of_target, ("sm_80", "sm_90")):
        launched.clear()
        with assume_gpu(GPU(device.name, device.capability, device.multiprocessors)), FakeCudaMode():
            for op, args in calls:
                op.cuda(*tree_map(on_gpu, args))
        assert {"absorb_projection", "absorbed_attention_weights", "lab_transfer_fwd"} <= set(launched)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("preset", BUNDLED)
def test_kernels_of_a_chunk_compile(preset: str, precision: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, calls = of_target(target), calls_of_a_chunk(preset, precision, monkeypatch)
    monkeypatch.setattr(chunk_attention, "_sdpa_ranges", lambda *operands: operands[0])
    with compiling_for(GPU(device.name, device.capability, device.multiprocessors)) as recorder:
        for op, args in calls:
            op.cuda(*tree_map(on_gpu, args))
    assert all(launch.compiled.metadata.shared <= device.shared_bytes_block for launch in recorder.launches)
