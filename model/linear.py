"""Linear layers of the student in any of its precisions, fused with the operations before and after them.

  plain     weights in the parameters' dtype, computed by PyTorch, so that torch.compile sees every operation
  fused     the same weights, computed by the kernel `kernels.linear.linear`
  FP8       e4m3 weights with one float32 scale per output channel; inputs are e4m3 with one scale per row

A layer is plain until `Linear.quantize` or `Linear.fuse` is called. A quantised student fuses the layers that it does
not quantise. An FP8 layer quantises a plain input itself, or takes `QuantizedRows` from a norm or from an FP8 layer
before it.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.common import FP8
from kernels.layer_norm import layer_norm, layer_norm_fp8, layer_norm_modulate, layer_norm_modulate_fp8
from kernels.linear import linear, linear_fp8, linear_fp8_quantized, output_bound, quantize_rows


class QuantizedRows(NamedTuple):
    """A matrix in e4m3: values float8_e4m3fn [rows, columns] and a scale float32 [rows] per row."""

    values: Tensor
    scale: Tensor


class Linear(nn.Module):
    """Linear layer y = x W^T + b with W [outputs, inputs]: plain, fused or FP8."""

    weight_scale: nn.Parameter  # only in FP8
    bound: nn.Parameter  # only in FP8

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        plain = nn.Linear(inputs, outputs)
        self.weight, self.bias = plain.weight, plain.bias
        self.fused = False

    @property
    def fp8(self) -> bool:
        """Whether the layer multiplies in FP8."""
        return self.weight.dtype == FP8

    def quantize(self) -> None:
        """Converts the layer to FP8 in place.

        `weight` becomes e4m3, and two float32 parameters are added: `weight_scale` [outputs], and `bound` [2], from
        which `forward_quantized` derives the scales of e4m3 outputs (see `kernels.linear.output_bound`).
        """
        weight, scale = quantize_rows(self.weight.detach())
        bound = output_bound(weight, scale, self.bias.detach())
        for name, tensor in (("weight", weight), ("weight_scale", scale), ("bound", bound)):
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def fuse(self) -> None:
        """Makes the layer use the kernel `kernels.linear.linear` from now on."""
        self.fused = True

    def forward(
        self, x: Tensor | QuantizedRows, gelu: bool = False, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """residual + gate * (x W^T + b), or gelu_tanh(x W^T + b); x [rows, inputs] -> [rows, outputs].

        The result has the residual's dtype; without a residual it has the dtype of x, or of b if x is quantised.
        """
        activation = "gelu_tanh" if gelu else None
        if self.fp8:
            dtype = residual.dtype if residual is not None else x.dtype if isinstance(x, Tensor) else self.bias.dtype
            values, scale = quantize_rows(x) if isinstance(x, Tensor) else x
            return linear_fp8(
                values, scale, self.weight, self.weight_scale, self.bias, activation, gate, residual, dtype
            )
        assert isinstance(x, Tensor)  # only FP8 layers are given quantised inputs
        if self.fused:
            return linear(x, self.weight, self.bias, activation, gate, residual)
        y = F.linear(x, self.weight, self.bias)
        y = F.gelu(y, approximate="tanh") if gelu else y
        if residual is None:
            return y
        return residual + y if gate is None else add_gated_residual(residual, y, gate)

    def forward_quantized(self, x: QuantizedRows, gelu: bool = False) -> QuantizedRows:
        """The output in e4m3, for an FP8 layer that follows: x W^T + b, or gelu_tanh of it; [rows, outputs]."""
        activation = "gelu_tanh" if gelu else None
        return QuantizedRows(
            *linear_fp8_quantized(*x, self.weight, self.weight_scale, self.bound, self.bias, activation)
        )


def add_gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + branch * gate, computed in float32 and rounded once to x's dtype."""
    return (x.float() + branch.float() * gate).to(x.dtype)


def norm_for_linear(x: Tensor, norm: nn.LayerNorm, layer: Linear) -> Tensor | QuantizedRows:
    """LayerNorm(x) with the affine parameters of `norm`, quantised to e4m3 rows if `layer` is FP8."""
    if layer.fp8:
        return QuantizedRows(*layer_norm_fp8(x, norm.weight, norm.bias, norm.eps))
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def norm_modulate_for_linear(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, layer: Linear
) -> Tensor | QuantizedRows:
    """LayerNorm(x) * (1 + scale) + shift, quantised to e4m3 rows if `layer` is FP8."""
    if layer.fp8:
        return QuantizedRows(*layer_norm_modulate_fp8(x, shift, scale, eps))
    return layer_norm_modulate(x, shift, scale, eps)
