"""Converts a float GGUF to an AGQ4 GGUF."""
