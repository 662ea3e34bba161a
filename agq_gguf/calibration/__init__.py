"""Runs a text through llama.cpp and collects statistics of the inputs of matrix products."""
