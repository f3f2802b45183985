"""The model: student, VAE, encoders, sampler and checkpoints. Imports `kernels`, never `streaming`."""

from importlib.util import find_spec

if find_spec("kernels.causal_conv3d") is None:
    raise ImportError("another distribution named 'kernels' hides flashtalk-triton's; run: pip uninstall kernels")
