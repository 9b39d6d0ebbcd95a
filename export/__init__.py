"""Other formats: transformers folders, GGUF files and model cards."""
