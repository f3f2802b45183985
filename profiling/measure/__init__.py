"""Takes measurements on a device: correctness, times, whole chunks, traces, launch parameters."""
