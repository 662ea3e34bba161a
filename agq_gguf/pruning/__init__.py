"""Chooses which tokens of long prompts are dropped after which layer, and stores that in the model file."""
