"""Find out by the numbers which layout a checkpoint's tensors are in."""
