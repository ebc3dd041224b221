"""Quantized checkpoints in the layouts of other programs, read and written a few MiB at a time. No torch."""
