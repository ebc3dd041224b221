"""Checkpoints on disk, plain and quantized: read, laid out, and written in one pass over the source."""
