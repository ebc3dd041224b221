"""Single files: a transformer under its publisher's names, or ComfyUI's, in one file of safetensors or GGUF."""
