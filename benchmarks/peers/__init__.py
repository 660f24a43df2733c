"""The other compressors, one a file."""
