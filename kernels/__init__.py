"""Operations of the model: their definitions and, one after another, their Triton kernels."""
