"""Graph rewrites, one per file, each named after what it does."""
