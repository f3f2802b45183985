"""Linear layers of the student in any of its precisions, fused with the operations before and after them.

  plain     weights in the parameters' dtype, computed by PyTorch, so that torch.compile sees every operation
  fused     the same weights, computed by the kernel `kernels.linear.linear`
  FP8       e4m3 weights with one float32 scale per output channel; inputs are e4m3 with one scale per row
  INT8      the same with int8, of which both weights and inputs are rotated (kernels/rotation.py)

A layer is plain until `Linear.quantize` or `Linear.fuse` is called. A quantised student fuses the layers that it does
not quantise. A quantised layer quantises a plain input itself, or takes `QuantizedRows` from a norm or, in FP8, from
the layer before it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.common import FP8, QUANTIZED_NAMES
from kernels.layer_norm import (
    layer_norm,
    layer_norm_fp8,
    layer_norm_int8,
    layer_norm_modulate,
    layer_norm_modulate_fp8,
    layer_norm_modulate_int8,
)
from kernels.linear import (
    linear,
    linear_fp8,
    linear_fp8_quantized,
    linear_int8,
    output_bound,
    quantize_rows,
    quantize_rows_int8,
)


class QuantizedRows(NamedTuple):
    """A matrix in 8 bits: e4m3 or rotated int8 values [rows, columns], and a scale float32 [rows] per row."""

    values: Tensor
    scale: Tensor


class Format(NamedTuple):
    """The operations that a quantised layer consists of, by the dtype of its weight."""

    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    layer_norm: Callable[..., tuple[Tensor, Tensor]]
    layer_norm_modulate: Callable[..., tuple[Tensor, Tensor]]
    linear: Callable[..., Tensor]


FORMATS: Mapping[torch.dtype, Format] = {
    FP8: Format(quantize_rows, layer_norm_fp8, layer_norm_modulate_fp8, linear_fp8),
    torch.int8: Format(quantize_rows_int8, layer_norm_int8, layer_norm_modulate_int8, linear_int8),
}


DTYPES = {name: dtype for dtype, name in QUANTIZED_NAMES.items()}  # of weights, by the format of a policy


class Linear(nn.Module):
    """Linear layer y = x W^T + b with W [outputs, inputs]: plain, fused, FP8 or INT8."""

    weight_scale: nn.Parameter  # only in FP8 and INT8
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

    @property
    def format(self) -> Format | None:
        """The operations of a quantised layer; None for a plain or fused one."""
        return FORMATS.get(self.weight.dtype)

    def quantize(self, dtype: torch.dtype = FP8) -> None:
        """Converts the layer to FP8, or to INT8 if `dtype` is int8, in place.

        `weight` becomes `dtype`, rotated in INT8, and the float32 parameter `weight_scale` [outputs] is added. In FP8
        so is `bound` [2], from which `forward_quantized` derives the scales of e4m3 outputs (see
        `kernels.linear.output_bound`).
        """
        tensors = quantized_parameters(
            QuantizedRows(*FORMATS[dtype].quantize(self.weight.detach())), self.bias.detach()
        )
        for name, tensor in tensors.items():
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
        if self.format is not None:
            dtype = residual.dtype if residual is not None else x.dtype if isinstance(x, Tensor) else self.bias.dtype
            values, scale = self.format.quantize(x) if isinstance(x, Tensor) else x
            return self.format.linear(
                values, scale, self.weight, self.weight_scale, self.bias, activation, gate, residual, dtype
            )
        assert isinstance(x, Tensor)  # only quantised layers are given quantised inputs
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


def quantized_parameters(weight: QuantizedRows, bias: Tensor) -> dict[str, Tensor]:
    """The parameters of a quantised layer, by name and without its bias."""
    tensors = {"weight": weight.values, "weight_scale": weight.scale}
    return tensors | {"bound": output_bound(*weight, bias)} if weight.values.dtype == FP8 else tensors


def add_gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + branch * gate, computed in float32 and rounded once to x's dtype."""
    return (x.float() + branch.float() * gate).to(x.dtype)


def norm_for_linear(x: Tensor, norm: nn.LayerNorm, layer: Linear) -> Tensor | QuantizedRows:
    """LayerNorm(x) with the affine parameters of `norm`, quantised by row if `layer` is."""
    if layer.format is not None:
        return QuantizedRows(*layer.format.layer_norm(x, norm.weight, norm.bias, norm.eps))
    return layer_norm(x, norm.weight, norm.bias, norm.eps)


def norm_modulate_for_linear(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, layer: Linear
) -> Tensor | QuantizedRows:
    """LayerNorm(x) * (1 + scale) + shift, quantised by row if `layer` is."""
    if layer.format is not None:
        return QuantizedRows(*layer.format.layer_norm_modulate(x, shift, scale, eps))
    return layer_norm_modulate(x, shift, scale, eps)
