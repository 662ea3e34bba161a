"""Uses llama.cpp in this process: the library, the plugin, models and contexts."""
