"""One kernel alone, against PyTorch: python examples/one_kernel.py"""

import torch
import torch.nn.functional as F

from kernels import chunk_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
q, k, v = torch.randn(3, 256, 4, 64, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)
o = chunk_attention(q, k, v)  # [tokens, heads, head_dim]
expected = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
print(f"{device}: largest difference {(o - expected).abs().max().item():.1e}")
