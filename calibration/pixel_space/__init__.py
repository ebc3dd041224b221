"""Diffusion transformers that need no pipeline: their latents are pixels, their text encoder is a hash.

A checkpoint in diffusers layout is such a model if a ``sampling.json`` beside its config says how it is sampled.
"""
