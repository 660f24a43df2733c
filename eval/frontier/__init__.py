"""How much smaller for how much computing: bits per number against multiplications."""
