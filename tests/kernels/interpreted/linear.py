"""The Triton kernels of the linear layers, compared with the reference in float64."""

# pyright: reportCallIssue=false

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.common import FP8_MAX
from kernels.layer_norm import launch_quantize_rows
from kernels.linear import (
    Epilogue,
    combine_linear_partials,
    launch_triton,
    output_bound,
    reference,
)
from kernels.linear_epilogue import epilogue_arguments
from tests.tensors import error

EXAMPLES = settings(max_examples=25)
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_N": 2, "num_warps": 4, "num_stages": 1}


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
    st.sampled_from(["", "gelu", "gate", "residual", "gate residual"]), st.booleans(), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_products_and_epilogues(m, groups, n, scaled, biased, what, fp32_accum, pointers, seed):
    """Any number of rows and columns, and a reduction axis that is no multiple of BLOCK_K."""
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
    config = SMALL | {"FP32_ACCUM": int(fp32_accum), "POINTERS": int(pointers)}
    y, scale = launch_triton(x, w, scales, epilogue, torch.float32, config)
    assert error(y, exact(x, w, scales, epilogue)) < 1e-5
    assert len(scale) == 0


@EXAMPLES
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 70), st.booleans(),
    st.sampled_from(["", "gelu", "gate", "residual", "gate residual", "round"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_int8_products_and_epilogues(m, groups, n, biased, what, pointers, seed):
    """Sums are exact, so that only the epilogue rounds."""
    torch.manual_seed(seed)
    x, w = (torch.randint(-127, 128, (rows, 16 * groups), dtype=torch.int8) for rows in (m, n))
    scales = (torch.rand(m) + 0.1, torch.rand(n) + 0.1)
    epilogue = Epilogue(
        torch.randn(n) if biased else None,
        "gelu" in what,
        torch.randn(n) if "gate" in what else None,
        torch.randn(m, n) if "residual" in what else None,
        torch.tensor([127.0 * 16 * groups, 1.0]) if what == "round" else None,
    )
    y, y_scale = launch_triton(x, w, scales, epilogue, torch.float32, SMALL | {"POINTERS": int(pointers)})
    if what == "round":
        y = y * y_scale[:, None]
    assert error(y, exact(x, w, scales, epilogue)) < 1e-6


def test_an_address_that_tma_cannot_read():
    torch.manual_seed(0)
    x, w = torch.randn(5, 20)[:, 1:17], torch.randn(9, 16)
    y, _ = launch_triton(x, w, None, Epilogue(), torch.float32)
    assert error(y, exact(x, w, None, Epilogue())) < 1e-5


def test_the_largest_int8_sums_are_exact():
    x = torch.full((3, 512), 127, dtype=torch.int8)
    y, _ = launch_triton(x, -x, (torch.ones(3), torch.ones(3)), Epilogue(), torch.float32, SMALL)
    assert (y == -512.0 * 127**2).all()


@pytest.mark.parametrize("rows", [1, 17])
def test_half_precision_is_rounded_once(rows):
    x, w, residual = torch.randn(rows, 48).half(), torch.randn(40, 48).half(), torch.randn(rows, 40).half()
    epilogue = Epilogue(torch.randn(40).half(), False, torch.randn(40), residual)
    y, _ = launch_triton(x, w, None, epilogue, torch.float16, SMALL)
    expected = exact(x, w, None, epilogue)
    torch.testing.assert_close(y, expected.half(), rtol=2e-3, atol=2e-3)


def rows_of(kind: str) -> Tensor:
    """Rows that are difficult to quantise."""
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
    """Without rounding to e4m3, which the interpreter cannot do: the largest value of a row becomes 448."""
    x = rows_of(kind)
    q, scale = launch_quantize_rows(x)
    assert q.isfinite().all()
    assert (scale > 0).all()
    assert (q.abs() <= FP8_MAX).all()
    largest = x.double().abs().amax(1)
    loud = largest > 1e-9
    torch.testing.assert_close(q.abs().amax(1)[loud], torch.full((int(loud.sum()),), FP8_MAX))
    torch.testing.assert_close(q.double() * scale.double()[:, None], x.double(), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("kind", KINDS[:-1])  # sums that overflow float32 are infinite
@pytest.mark.parametrize("gelu", [False, True])
def test_rounded_outputs_never_saturate(kind, gelu):
    """The bound holds even for the worst rows, and dequantised outputs equal those without quantisation."""
    x, w = rows_of(kind), torch.randn(24, 48)
    w[5] *= 300
    bias = torch.randn(24)
    q, x_scale = launch_quantize_rows(x)
    w8, w_scale = launch_quantize_rows(w)
    epilogue = Epilogue(bias, gelu, bound=output_bound(w8, w_scale, bias))
    y, y_scale = launch_triton(q, w8, (x_scale, w_scale), epilogue, torch.float8_e4m3fn, SMALL)
    assert y.isfinite().all()
    assert (y.abs() < FP8_MAX).all()
    expected = exact(q, w8, (x_scale, w_scale), epilogue)
    assert error(y.double() * y_scale.double()[:, None], expected) < 1e-5


@pytest.mark.parametrize("kernel", ["forward", "combine"])
def test_values_beyond_a_wrong_bound_are_clamped(kernel):
    """With a bound that is a thousand times too small, values saturate at 448; none is NaN or infinite."""
    torch.manual_seed(0)
    x, w, scales = torch.randn(16, 32), torch.randn(32, 32), (torch.ones(16), torch.ones(32))
    epilogue = Epilogue(bound=torch.tensor([1e-5, 1e-5]))
    if kernel == "forward":
        y, y_scale = launch_triton(x, w, scales, epilogue, torch.float8_e4m3fn, SMALL)
    else:
        y, y_scale = torch.empty(16, 32), torch.empty(16)
        pointers, strides, flags = epilogue_arguments(y, y_scale, scales, epilogue)
        combines = torch.tensor([[0, 0, 16, 0, 1]], dtype=torch.int32)
        combine_linear_partials[(1, 1)](
            x @ w.T, combines, *pointers, 16, 32, *strides, **flags, TILE=16, BLOCK_N=32, BLOCK_M=16, num_warps=4
        )
    assert y.isfinite().all()
    expected = (exact(x, w, scales, Epilogue()) / y_scale.double()[:, None]).clamp(-FP8_MAX, FP8_MAX)
    assert (expected.abs() == FP8_MAX).float().mean() > 0.5
    assert error(y, expected) < 1e-5


def test_the_bound_is_reached():
    """A row of x that is the signs of the largest row of w reaches the bound."""
    w = torch.randn(8, 32)
    x = w[3:4].sign()
    (x8, x_scale), (w8, w_scale) = launch_quantize_rows(x), launch_quantize_rows(w)
    bound = output_bound(w8, w_scale, None)
    _, y_scale = launch_triton(x8, w8, (x_scale, w_scale), Epilogue(bound=bound), torch.float8_e4m3fn, SMALL)
    assert y_scale.item() * FP8_MAX == pytest.approx(w.abs().sum(1).max().item(), rel=1e-5)


@pytest.mark.parametrize("what", ["plain", "round"])
def test_partials_are_combined(what):
    """Two tiles of 32 rows by 64 columns, one split in three, one in two."""
    torch.manual_seed(0)
    m, n, tile, block_n = 40, 100, 32, 64
    scales = (torch.rand(m), torch.rand(n))
    bound = torch.tensor([0.5, 0.25]) if what == "round" else None
    epilogue = Epilogue(torch.randn(n), what == "round", None, torch.randn(m, n) if what == "plain" else None, bound)
    partials = torch.randn(5 * tile, block_n)
    combines = torch.tensor([[0, 32, 40, 0, 3], [1, 0, 32, 3, 2]], dtype=torch.int32)
    y, y_scale = torch.full((m, n), 7.0), torch.full((m if bound is not None else 0,), 7.0)
    pointers, strides, flags = epilogue_arguments(y, y_scale, scales, epilogue)
    combine_linear_partials[(2, 2)](
        partials, combines, *pointers, m, n, *strides, **flags, TILE=tile, BLOCK_N=block_n, BLOCK_M=16, num_warps=4
    )
    sums = partials.unflatten(0, (5, tile))
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
