"""The compiled module's sources, and what runs codecs' kernels on a GPU."""
