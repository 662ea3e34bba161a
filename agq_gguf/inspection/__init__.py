"""What is in a model file: contents, digests, a page with pictures."""
