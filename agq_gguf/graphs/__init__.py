"""Runs models in PyTorch, with gradients."""
