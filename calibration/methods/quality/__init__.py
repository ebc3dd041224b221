"""The method of nvfp4-quality."""
