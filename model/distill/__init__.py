"""Training at small scale: synthetic talking heads, the metrics that read them, and the networks trained on them."""
