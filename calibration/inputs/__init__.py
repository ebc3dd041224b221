"""What the transformer is run on: captured calls, prompts and pictures."""
