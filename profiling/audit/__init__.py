"""Audits kernels without a GPU: compiles them, reads the result, models what bounds it."""
