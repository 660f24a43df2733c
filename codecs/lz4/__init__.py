"""LZ4 on the numbers as they lie."""
