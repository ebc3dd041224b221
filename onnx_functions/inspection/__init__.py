"""Say what an artifact is."""
