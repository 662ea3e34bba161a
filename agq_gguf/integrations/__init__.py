"""Adds AGQ4 to other packages: gguf, and llama-cpp-python's server."""
