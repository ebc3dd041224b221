"""Quantization methods, and the plan that holds a recipe against a checkpoint."""
