"""Runs text through llama.cpp and gathers statistics of the inputs of matrix products."""
