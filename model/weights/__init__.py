"""Checkpoints: reading their files, quantising, and loading the weights of all networks."""
