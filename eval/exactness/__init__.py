"""Is a compressed cache exact, bit for bit and token for token?"""
