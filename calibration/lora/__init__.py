"""LoRA files of every naming, and their changes fused into 16-bit weights."""
