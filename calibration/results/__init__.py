"""The files of a quantized checkpoint, written in one pass or while the model runs block by block."""
