"""Back-ends by other packages: called with what they take, where they are installed and a table names them.

The packages are fakes, which count their calls and compute by definition.
"""

import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import tuning
from kernels.chunk_attention_library import FLASH_ATTN, launch_flash_attn, why_not_flash_attn
from kernels.common import FP8, installed
from kernels.linear_epilogue import Epilogue
from kernels.linear_library import TORCHAO, launch_library, launch_torchao, libraries
from kernels.scheduler import kv_ranges
from kernels.tuning import GPU, TunedEntry, TunedTable, assume_gpu

attention = importlib.import_module("kernels.chunk_attention")  # the modules, not the functions
linear = importlib.import_module("kernels.linear")

made: list[tuple[Any, ...]] = []


def module(name: str, **contents: Any) -> ModuleType:
    found = ModuleType(name)
    found.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(found).update(contents)
    return found


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, return_attn_probs: bool) -> Any:
    """As the package has it: [batch, tokens, heads, head_dim], and the log-sum-exp as [batch, heads, queries]."""
    assert return_attn_probs
    made.append((tuple(q.shape), tuple(k.shape)))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1), None


def int_scaled_matmul(a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    made.append((tuple(a.shape), tuple(b.shape)))
    return (a.double() @ b.double()).float() * scales


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "flash_attn", module("flash_attn", flash_attn_func=flash_attn_func))
    for name, contents in (
        ("torchao", {}), ("torchao.kernel", {}), ("torchao.kernel.intmm", {"int_scaled_matmul": int_scaled_matmul})
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module(name, **contents))
    made.clear()
    installed.cache_clear()
    yield
    installed.cache_clear()


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("chunks", "past"), [(None, 0), ((8, 12), 0), ((8, 12), 1)])
def test_flash_attn_is_called_once_for_each_range_of_queries(chunks: tuple[int, ...] | None, past: int) -> None:
    q, k, v = (torch.randn(2, 20, 3, 64) for _ in range(3))
    ranges = kv_ranges(20, 20, chunks, past)
    o, lse = launch_flash_attn(q, k, v, None, ranges, 0.2, torch.float32)
    assert made == [((2, b - a, 3, 64), (2, d - c, 3, 64)) for a, b, c, d in ranges]
    assert o.is_contiguous()
    assert lse.is_contiguous()
    for batch in range(2):
        expected, expected_lse = attention.reference(q[batch], k[batch], v[batch], ranges, 0.2)
        torch.testing.assert_close(o[batch], expected)
        torch.testing.assert_close(lse[batch], expected_lse)


def test_what_flash_attn_lacks(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 20, 2, 128, dtype=torch.bfloat16)
    assert why_not_flash_attn(q) == ""
    assert why_not_flash_attn(q.float()) == "torch.float32, wanted float16 or bfloat16"
    for head_dim in (100, 384):
        assert why_not_flash_attn(q.new_empty(1, 1, 1, head_dim)).startswith(f"head_dim {head_dim}, wanted a multiple")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    installed.cache_clear()
    assert why_not_flash_attn(q) == "flash_attn is not installed"


def table(operation: str, dtype: str, dims: dict[str, int], seconds: dict[str, float]) -> TunedTable:
    config = {"triton": {"num_stages": 2}}
    entry = TunedEntry(operation, dtype, dims, min(seconds, key=lambda name: seconds[name]), config, seconds, "", {})
    return TunedTable("any", "8.0", (entry,))


def taken(monkeypatch: pytest.MonkeyPatch, of: ModuleType, found: TunedTable, *arguments: Any) -> tuple[str, Any]:
    """The back-end that a dispatcher calls on an A100 with this table, and its launch parameters."""
    backends = {name: lambda *a, name=name: (name, a[-1]) for name in of.BACKENDS}
    monkeypatch.setattr(of, "BACKENDS", backends)
    monkeypatch.setattr(
        of, "tuned_config",
        lambda operation, dims, dtype, _device, backends=(), match_exactly=(): tuning.nearest_config(
            found, operation, dims, dtype, backends, match_exactly
        ),
    )  # fmt: skip
    with assume_gpu(GPU("any", "8.0", 108)):
        return of.dispatch(*arguments)


def test_attention_is_by_flash_attn_where_a_table_names_it(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 20, 2, 128, dtype=torch.bfloat16)
    dims = {"queries": 20, "keys": 20, "heads": 2, "head_dim": 128}
    faster = table("chunk_attention", "bf16", dims, {"triton": 3.0, FLASH_ATTN: 2.0, "sdpa-flash": 1.0})
    slower = table("chunk_attention", "bf16", dims, {"triton": 2.0, FLASH_ATTN: 3.0})
    arguments = (q, q, q, None, kv_ranges(20, 20), 0.1, q.dtype)
    assert taken(monkeypatch, attention, faster, *arguments) == (FLASH_ATTN, {})
    assert taken(monkeypatch, attention, slower, *arguments) == ("triton", {"num_stages": 2})
    q32 = q.float()
    assert taken(monkeypatch, attention, faster, q32, q32, q32, None, kv_ranges(20, 20), 0.1, q32.dtype)[0] == "triton"
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    installed.cache_clear()
    assert taken(monkeypatch, attention, faster, *arguments) == ("triton", {"num_stages": 2})


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("launch", "calls"), [(launch_library, 0), (launch_torchao, 1)])
def test_int8_products_by_libraries_are_those_of_the_reference(launch: Any, calls: int) -> None:
    x, w = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((40, 64), (24, 64)))
    scales, epilogue = (torch.rand(40), torch.rand(24)), Epilogue(torch.randn(24))
    y, none = launch(x, w, scales, epilogue, torch.float32)
    torch.testing.assert_close(y, linear.reference(x, w, scales, epilogue, torch.float32), rtol=1e-5, atol=1e-3)
    assert none.numel() == 0
    assert made == [((40, 64), (64, 24))] * calls


def test_int8_products_are_by_a_library_where_a_table_names_it(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, scales = torch.zeros(40, 64, dtype=torch.int8), torch.zeros(24, 64, dtype=torch.int8), (torch.ones(40),) * 2
    dims = {"rows": 40, "inputs": 64, "outputs": 24}
    found = table("linear", "int8", dims, {"triton": 3.0, "library": 2.0, TORCHAO: 1.0})
    arguments = (x, w, scales, Epilogue(), torch.bfloat16)
    assert taken(monkeypatch, linear, found, *arguments)[0] == TORCHAO
    gelu = (x, w, scales, Epilogue(gelu=True), torch.bfloat16)
    assert taken(monkeypatch, linear, found, *gelu) == ("triton", {"num_stages": 2})
    monkeypatch.setitem(sys.modules, "torchao.kernel.intmm", None)
    installed.cache_clear()
    assert taken(monkeypatch, linear, found, *arguments)[0] == "library"


def test_what_libraries_multiply(packages: None) -> None:
    x, w = torch.zeros(40, 64, dtype=torch.int8), torch.zeros(24, 64, dtype=torch.int8)
    bf16 = torch.bfloat16
    assert libraries(x, w, Epilogue(), bf16) == ["library", TORCHAO]
    assert libraries(x[:16], w, Epilogue(), bf16) == []
    assert libraries(x, w[:20], Epilogue(), bf16) == []
    assert libraries(x[:, :36], w[:, :36], Epilogue(), bf16) == []
    assert libraries(x.float(), w.float(), Epilogue(gate=torch.ones(24)), torch.float32) == []
    x8, w8 = x.to(FP8), w.to(FP8)
    assert libraries(x8, w8[:16], Epilogue(), bf16) == ["library"]
    assert libraries(x8, w8, Epilogue(), bf16) == []
    assert libraries(x8[:, :40], w8[:16, :40], Epilogue(), bf16) == []
    assert libraries(x8, w8[:16], Epilogue(), torch.float32) == []
