"""Statistics of a cache's numbers: what ideal code lengths and the codecs' fits both build on.

`documents.py`: what a fit learns from. `rope.py`: the order of a layer's channels, and its keys
with their rotation undone. `ridge.py`: regressions from sums of products. `gaussian.py`: what
channels say of each other by their covariance. `densities.py`: probabilities of numbers around what
is expected. `clusters.py`: k-means.

All of it is floating point. What a codec decides its symbols by is integers, and stays in the
codec.
"""
