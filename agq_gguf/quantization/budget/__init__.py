"""`--target-bpw`: chooses which tensors get more bits, with a budget for the whole model."""
