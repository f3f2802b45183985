"""Checkpoints: reading, quantising and loading weights, and offloading modules to host memory."""
