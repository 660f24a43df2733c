"""The numbers as they are."""
