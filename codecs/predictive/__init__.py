"""Prediction from the layers and channels before, and entropy coding of what is left."""
