"""Chooses after which layers which tokens of long prompts are dropped, and stores the choice in the model file."""
