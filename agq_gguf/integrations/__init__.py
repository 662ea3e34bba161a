"""Other packages that learn the type AGQ4: gguf, and llama-cpp-python's server."""
