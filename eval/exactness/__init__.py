"""Is a compressed cache exact, bit for bit and token for token?"""

MOST_NEW_TOKENS = 100_000
"""That are generated after a document."""
