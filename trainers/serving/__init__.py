"""The inside of an engine: its HTTP face and transformers' continuous batching."""
