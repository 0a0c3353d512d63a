"""What every rank trains with and how: the loops and their state."""
