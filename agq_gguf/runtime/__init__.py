"""The llama.cpp library in this process, the plugin in it, models and contexts."""
