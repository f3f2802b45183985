"""Operations: a reference in PyTorch, Triton and Gluon kernels, and a `torch.library` op each; a file per operation.

A function is named after its file, so `kernels.linear` is the function. `importlib.import_module("kernels.linear")` is
the module.
"""

from kernels.absorb_audio_projections import absorb_audio_projections
from kernels.absorb_audio_projections_fp8 import absorb_audio_projections_fp8
from kernels.absorbed_audio_attention import absorbed_audio_attention
from kernels.absorbed_audio_attention_fp8 import absorbed_audio_attention_fp8
from kernels.causal_conv3d import causal_conv3d, causal_conv3d_norm, conv3d, quantize_conv_weight
from kernels.chunk_attention import chunk_attention, chunk_attention_with_lse, merge_attention
from kernels.chunk_attention_fp8 import (
    chunk_attention_fp8,
    chunk_attention_fp8_quantized,
    chunk_attention_fp8_with_lse,
)
from kernels.frame_attention import frame_attention
from kernels.lab_transfer import lab_statistics, lab_transfer
from kernels.layer_norm import (
    layer_norm,
    layer_norm_fp8,
    layer_norm_int8,
    layer_norm_modulate,
    layer_norm_modulate_fp8,
    layer_norm_modulate_int8,
    quantize_rows,
    quantize_rows_int8,
)
from kernels.linear import linear, linear_fp8, linear_fp8_quantized, linear_int8
from kernels.resample_conv2d import downsample_conv2d, fold_upsampling, upsample_conv2d
from kernels.rms_norm_rope import kv_statistics, rms_norm_rope, rms_norm_rope_fp8
from kernels.rms_norm_silu import rms_norm_silu
from kernels.text_image_attention import (
    text_image_attention,
    text_image_attention_quantized,
    text_image_bound,
)

__all__ = [
    "absorb_audio_projections",
    "absorb_audio_projections_fp8",
    "absorbed_audio_attention",
    "absorbed_audio_attention_fp8",
    "causal_conv3d",
    "causal_conv3d_norm",
    "chunk_attention",
    "chunk_attention_fp8",
    "chunk_attention_fp8_quantized",
    "chunk_attention_fp8_with_lse",
    "chunk_attention_with_lse",
    "conv3d",
    "downsample_conv2d",
    "fold_upsampling",
    "frame_attention",
    "kv_statistics",
    "lab_statistics",
    "lab_transfer",
    "layer_norm",
    "layer_norm_fp8",
    "layer_norm_int8",
    "layer_norm_modulate",
    "layer_norm_modulate_fp8",
    "layer_norm_modulate_int8",
    "linear",
    "linear_fp8",
    "linear_fp8_quantized",
    "linear_int8",
    "merge_attention",
    "quantize_conv_weight",
    "quantize_rows",
    "quantize_rows_int8",
    "rms_norm_rope",
    "rms_norm_rope_fp8",
    "rms_norm_silu",
    "text_image_attention",
    "text_image_attention_quantized",
    "text_image_bound",
    "upsample_conv2d",
]
