"""``fp4trt generate``: prompts in, pictures out, by a model in any of its forms."""
