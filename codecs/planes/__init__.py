"""Byte planes or bit planes, each coded by itself."""
