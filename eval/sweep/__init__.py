"""The same measurement at every point of a grid."""
