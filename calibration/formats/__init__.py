"""Number formats: the arithmetic of each, slow reference beside fast path, and the linears that use it."""
