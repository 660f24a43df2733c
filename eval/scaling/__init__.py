"""How ratios grow with what a codec learns from, with its profile, and with the model."""
