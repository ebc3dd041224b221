"""The whole road on the built-in model."""
