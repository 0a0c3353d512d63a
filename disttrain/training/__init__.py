"""Training and evaluation: the loops that every rank runs, and their state."""
