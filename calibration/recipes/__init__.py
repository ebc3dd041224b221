"""Recipes: YAML files that say how to quantize, and their schema."""
