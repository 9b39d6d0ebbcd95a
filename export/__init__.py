"""Other formats: transformers folders, GGUF, model cards, and the original's checkpoints."""
