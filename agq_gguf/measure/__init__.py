"""Measures quality and speed of models."""
