"""A finished model leaves: model folders, GGUF files, publishing to the hubs."""
