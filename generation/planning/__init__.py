"""Planning: what a model needs on a GPU, before anything is quantized or built. No torch."""
