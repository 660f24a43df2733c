"""Running codecs' kernels: on a GPU, or on a CPU to test them."""
