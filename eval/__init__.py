"""The evaluation: does it pay? A wing for each question."""
