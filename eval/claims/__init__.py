"""What others and this project claim of lossless compression of KV caches, in the same words."""
