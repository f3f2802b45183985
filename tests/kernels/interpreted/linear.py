"""The kernels of the linear layers against their definition in float64."""

# pyright: reportCallIssue=false

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.linear import Epilogue, _arguments, launch_triton, merge_linear, output_bound, reference
from kernels.norm import FP8_MAX, launch_rows
from profiling.measure.check import poisoned_memory

EXAMPLES = settings(deadline=None, max_examples=25)
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_N": 2, "num_warps": 4, "num_stages": 1}


@pytest.fixture(autouse=True)
def _poisoned():
    """What is not written is NaN."""
    with poisoned_memory():
        yield


def error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.double() for t in tensors]


def exact(x: Tensor, w: Tensor, scales: tuple[Tensor, Tensor] | None, epilogue: Epilogue) -> Tensor:
    bias, gelu, gate, residual, _ = epilogue
    bias, gate, residual = wide(bias, gate, residual)
    doubles = None if scales is None else (scales[0].double(), scales[1].double())
    return reference(x.double(), w.double(), doubles, Epilogue(bias, gelu, gate, residual), torch.float64)


@EXAMPLES
@given(
    st.integers(1, 40), st.integers(1, 12), st.integers(1, 70), st.booleans(), st.booleans(),
    st.sampled_from(["", "gelu", "gate", "residual", "gate residual"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_products_and_epilogues(m, groups, n, scaled, biased, what, promoted, seed):
    """Any number of rows and columns, a summed axis that tiles do not divide."""
    torch.manual_seed(seed)
    k = 4 * groups
    x, w = torch.randn(m, k), torch.randn(n, k)
    scales = (torch.rand(m) + 0.1, torch.rand(n) + 0.1) if scaled else None
    epilogue = Epilogue(
        torch.randn(n) if biased else None,
        "gelu" in what,
        torch.randn(n) if "gate" in what else None,
        torch.randn(m, n) if "residual" in what else None,
    )
    y, scale = launch_triton(x, w, scales, epilogue, torch.float32, SMALL | {"FP32_ACCUM": int(promoted)})
    assert error(y, exact(x, w, scales, epilogue)) < 1e-5
    assert len(scale) == 0


@pytest.mark.parametrize("rows", [1, 17])
def test_half_precision_in_float32_between(rows):
    x, w, residual = torch.randn(rows, 48).half(), torch.randn(40, 48).half(), torch.randn(rows, 40).half()
    epilogue = Epilogue(torch.randn(40).half(), False, torch.randn(40), residual)
    y, _ = launch_triton(x, w, None, epilogue, torch.float16, SMALL)
    expected = exact(x, w, None, epilogue)
    torch.testing.assert_close(y, expected.half(), rtol=2e-3, atol=2e-3)


def rows_of(kind: str) -> Tensor:
    """Rows that are hard to quantise."""
    x = torch.randn(6, 48)
    if kind == "outliers":
        x[:, ::17] *= 1000
    elif kind == "zeros":
        x[2:4] = 0
    elif kind == "one huge value":
        x[3, 7] = 1e30
    elif kind == "denormals":
        x *= 1e-40
    elif kind == "largest":
        x[1] = torch.finfo(torch.float32).max
    return x


KINDS = ["outliers", "zeros", "one huge value", "denormals", "largest"]


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_rows(kind):
    """Before rounding, which the interpreter cannot do: the largest value of a row becomes 448, and none more."""
    x = rows_of(kind)
    q, scale = launch_rows(x, None, fp8=True)
    assert q.isfinite().all()
    assert (scale > 0).all()
    assert (q.abs() <= FP8_MAX).all()
    largest = x.double().abs().amax(1)
    loud = largest > 1e-9
    torch.testing.assert_close(q.abs().amax(1)[loud], torch.full((int(loud.sum()),), FP8_MAX))
    torch.testing.assert_close(q.double() * scale.double()[:, None], x.double(), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("kind", KINDS[:-1])  # sums beyond float32 are infinite
@pytest.mark.parametrize("gelu", [False, True])
def test_rounded_outputs_never_saturate(kind, gelu):
    """The bound holds for the worst of rows, and the output is what it is without rounding."""
    x, w = rows_of(kind), torch.randn(24, 48)
    w[5] *= 300
    bias = torch.randn(24)
    q, x_scale = launch_rows(x, None, fp8=True)
    w8, w_scale = launch_rows(w, None, fp8=True)
    epilogue = Epilogue(bias, gelu, bound=output_bound(w8, w_scale, bias))
    y, y_scale = launch_triton(q, w8, (x_scale, w_scale), epilogue, torch.float8_e4m3fn, SMALL)
    assert y.isfinite().all()
    assert (y.abs() < FP8_MAX).all()
    expected = exact(q, w8, (x_scale, w_scale), epilogue)
    assert error(y.double() * y_scale.double()[:, None], expected) < 1e-5


@pytest.mark.parametrize("form", ["forward", "merge"])
def test_what_a_wrong_bound_lets_through_is_clamped(form):
    """A bound a thousand times too small: values saturate at 448, and none is NaN or infinite."""
    torch.manual_seed(0)
    x, w, scales = torch.randn(16, 32), torch.randn(32, 32), (torch.ones(16), torch.ones(32))
    epilogue = Epilogue(bound=torch.tensor([1e-5, 1e-5]))
    if form == "forward":
        y, y_scale = launch_triton(x, w, scales, epilogue, torch.float8_e4m3fn, SMALL)
    else:
        y, y_scale = torch.empty(16, 32), torch.empty(16)
        pointers, strides, flags = _arguments(y, y_scale, scales, epilogue)
        merges = torch.tensor([[0, 0, 16, 0, 1]], dtype=torch.int32)
        merge_linear[(1, 1)](
            x @ w.T, merges, *pointers, 16, 32, *strides, **flags, TILE=16, BLOCK_N=32, BLOCK_M=16, num_warps=4
        )
    assert y.isfinite().all()
    expected = (exact(x, w, scales, Epilogue()) / y_scale.double()[:, None]).clamp(-FP8_MAX, FP8_MAX)
    assert (expected.abs() == FP8_MAX).float().mean() > 0.5
    assert error(y, expected) < 1e-5


def test_the_bound_is_reached():
    """By a row that is a column of signs."""
    w = torch.randn(8, 32)
    x = w[3:4].sign()
    (x8, x_scale), (w8, w_scale) = launch_rows(x, None, fp8=True), launch_rows(w, None, fp8=True)
    bound = output_bound(w8, w_scale, None)
    _, y_scale = launch_triton(x8, w8, (x_scale, w_scale), Epilogue(bound=bound), torch.float8_e4m3fn, SMALL)
    assert y_scale.item() * FP8_MAX == pytest.approx(w.abs().sum(1).max().item(), rel=1e-5)


@pytest.mark.parametrize("what", ["plain", "round"])
def test_parts_are_merged(what):
    """Two tiles of 32 rows by 64 columns, one in three parts, one in two."""
    torch.manual_seed(0)
    m, n, tile, block_n = 40, 100, 32, 64
    scales = (torch.rand(m), torch.rand(n))
    bound = torch.tensor([0.5, 0.25]) if what == "round" else None
    epilogue = Epilogue(torch.randn(n), what == "round", None, torch.randn(m, n) if what == "plain" else None, bound)
    parts = torch.randn(5 * tile, block_n)
    merges = torch.tensor([[0, 32, 40, 0, 3], [1, 0, 32, 3, 2]], dtype=torch.int32)
    y, y_scale = torch.full((m, n), 7.0), torch.full((m if bound is not None else 0,), 7.0)
    pointers, strides, flags = _arguments(y, y_scale, scales, epilogue)
    merge_linear[(2, 2)](
        parts, merges, *pointers, m, n, *strides, **flags, TILE=tile, BLOCK_N=block_n, BLOCK_M=16, num_warps=4
    )
    sums = parts.unflatten(0, (5, tile))
    for rows, columns, acc in (
        (slice(32, 40), slice(0, 64), sums[:3].sum(0)[:8]),
        (slice(0, 32), slice(64, 100), sums[3:].sum(0)[:, :36]),
    ):
        bias, gelu, _, residual, _ = epilogue
        part = Epilogue(
            None if bias is None else bias[columns].double(), gelu, None,
            None if residual is None else residual[rows, columns].double(),
        )  # fmt: skip
        eye = torch.eye(acc.shape[1]).double()
        expected = reference(
            acc.double(), eye, (scales[0][rows].double(), scales[1][columns].double()), part, eye.dtype
        )
        if bound is not None:
            scale = scales[0][rows] * bound[0] + bound[1]
            torch.testing.assert_close(y_scale[rows], scale)
            expected = (expected / scale[:, None]).clamp(-FP8_MAX, FP8_MAX)
        assert error(y[rows, columns], expected) < 1e-6
    assert (y[:32, :64] == 7).all()
    assert (y[32:, 64:] == 7).all()
