"""Entropy coding of sign and exponent with a table for each channel."""
