"""The codecs that each evaluation measures unless others are named. A new codec is added here."""

from __future__ import annotations

CODECS_WITHOUT_PROFILE = ("raw", "zstd", "lz4", "planes", "channel")
"""For ratios and speeds: each codec that needs no profile, with its default settings."""
EXACTNESS_CODECS = tuple(name for name in CODECS_WITHOUT_PROFILE if name != "raw")
"""For exactness: those of them that do not store the numbers as they are."""
LINK_CODECS = ("raw", "channel", "predictive")
"""For loads over links: no compression, then codecs that spend more work on fewer bytes."""
DEMO_CODECS = ("raw", "zstd", "lz4", "planes", "planes:mode=bit", "channel", "predictive")
