"""`--target-bpw`: which tensors get more bits under a budget for the whole model."""
