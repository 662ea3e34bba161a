"""Runs a model in PyTorch, with gradients."""
