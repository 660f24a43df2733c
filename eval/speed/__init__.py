"""How small and how fast: ratios, speeds of codecs and of prefill."""
