"""A linear layer in any of the student's precisions, with what comes before and after it inside.

    plain     the parameters' dtype, by PyTorch, whose compiler sees every operation
    fused     the same by `kernels.linear.linear`: layers that a quantised student keeps
    FP8       e4m3 weights, a float32 scale for each output channel; inputs quantised row by row

A layer is plain until `quantize` makes it FP8, or `fuse` fused. Rows that are quantised already come as `Rows`: norms
make them, and layers whose output the next one takes in e4m3.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.layer_norm import layer_norm, layer_norm_fp8, layer_norm_modulate, layer_norm_modulate_fp8
from kernels.linear import linear, linear_fp8, linear_fp8_quantized, output_bound, quantize_rows
from kernels.sm90 import FP8


class Rows(NamedTuple):
    """Quantised rows: values float8_e4m3fn [rows, columns], and the float32 scale of each."""

    values: Tensor
    scale: Tensor


class Linear(nn.Module):
    """y = x W^T + b, W [outputs, inputs]."""

    weight_scale: nn.Parameter  # in FP8 only, as the bound
    bound: nn.Parameter

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        plain = nn.Linear(inputs, outputs)
        self.weight, self.bias = plain.weight, plain.bias
        self.fused = False

    @property
    def fp8(self) -> bool:
        """Whether products are FP8."""
        return self.weight.dtype == FP8

    def quantize(self) -> None:
        """From now on in FP8: `weight` is e4m3, and there are two more parameters, float32.

        `weight_scale` [outputs]; `bound` [2], from which the scales of e4m3 outputs come (`kernels.linear`).
        """
        weight, scale = quantize_rows(self.weight.detach())
        bound = output_bound(weight, scale, self.bias.detach())
        for name, tensor in (("weight", weight), ("weight_scale", scale), ("bound", bound)):
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def fuse(self) -> None:
        """From now on by `kernels.linear.linear`."""
        self.fused = True

    def forward(
        self, x: Tensor | Rows, gelu: bool = False, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """residual + gate (x W^T + b), or gelu(x W^T + b); x [rows, inputs] -> [rows, outputs].

        In the residual's dtype, or that of x, or of b if x is quantised.
        """
        activation = "gelu_tanh" if gelu else None
        if self.fp8:
            dtype = residual.dtype if residual is not None else x.dtype if isinstance(x, Tensor) else self.bias.dtype
            values, scale = quantize_rows(x) if isinstance(x, Tensor) else x
            return linear_fp8(
                values, scale, self.weight, self.weight_scale, self.bias, activation, gate, residual, dtype
            )
        assert isinstance(x, Tensor)  # nobody quantises for a layer that does not take it
        if self.fused:
            return linear(x, self.weight, self.bias, activation, gate, residual)
        y = F.linear(x, self.weight, self.bias)
        y = F.gelu(y, approximate="tanh") if gelu else y
        if residual is None:
            return y
        return residual + y if gate is None else add_gated(residual, y, gate)

    def rows(self, x: Rows, gelu: bool = False) -> Rows:
        """The same in e4m3, for an FP8 layer that follows: x W^T + b, or gelu of it."""
        activation = "gelu_tanh" if gelu else None
        return Rows(*linear_fp8_quantized(*x, self.weight, self.weight_scale, self.bound, self.bias, activation))


def add_gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + branch gate, in float32, rounded once to x's dtype."""
    return (x.float() + branch.float() * gate).to(x.dtype)


def normed(x: Tensor, norm: nn.LayerNorm, layer: Linear) -> Tensor | Rows:
    """LayerNorm of x as `layer` takes it."""
    if layer.fp8:
        return Rows(*layer_norm_fp8(x, norm.weight, norm.bias, norm.eps))
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float, layer: Linear) -> Tensor | Rows:
    """LayerNorm(x) (1 + scale) + shift as `layer` takes it."""
    if layer.fp8:
        return Rows(*layer_norm_modulate_fp8(x, shift, scale, eps))
    return layer_norm_modulate(x, shift, scale, eps)
