"""Operations: a reference in PyTorch, Triton and Gluon kernels, and a `torch.library` op each; a file per operation."""
