"""A model in any of its forms in, images and figures out."""
