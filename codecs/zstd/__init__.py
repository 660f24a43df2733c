"""Zstandard on the numbers as they lie."""
