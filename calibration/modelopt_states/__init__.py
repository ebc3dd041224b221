"""Models that ModelOpt has quantized already: restore, read and compare them."""
