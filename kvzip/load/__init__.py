"""From a .kvz file into a serving engine's cache."""
