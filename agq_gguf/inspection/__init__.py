"""Shows and checks model files: contents, digests, an HTML page."""
