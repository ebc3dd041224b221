"""Work that runs the model block by block: one block in memory at a time, resumable."""
